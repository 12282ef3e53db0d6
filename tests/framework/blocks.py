"""Quantised blocks for tests: of random weights, and the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from services.inference.engine.model.blocks import block_sizes, blocks_of, dequantise, quantise
from services.inference.engine.model.weights import Blocks, LayerWeights, ModelWeights, Parts


def in_blocks(matrix: Tensor, format_name: str) -> Blocks:
    """The matrix in blocks; for Q4_K, which nothing at hand writes, random blocks of its size."""
    if format_name != "Q4_K":
        return quantise(matrix, format_name)
    outputs, inputs = matrix.shape
    length, size = block_sizes(format_name)
    chance = np.random.default_rng(outputs * inputs)
    data = chance.integers(0, 256, (outputs, inputs // length, size), dtype=np.uint8)
    scales = (chance.random((outputs, inputs // length, 2)) * 4e-4).astype(np.float16)
    # The middle of what they stand for is zero: on average a quant is 7.5, a scale and a minimum 31.5.
    scales[..., 1] = scales[..., 0] * np.float16(7.5)
    data[..., :4] = scales.view(np.uint8).reshape(*scales.shape[:2], 4)
    return blocks_of(torch.from_numpy(data.reshape(outputs, -1)), format_name)


def quantised(weights: ModelWeights[Tensor], choose: Callable[[str], str]) -> ModelWeights[Parts]:
    """`choose` gives the format of a part by its name, as the native library has it; `float32` keeps it."""
    shape = weights.shape
    keys = shape.kv_heads * shape.head_dim

    def parts(matrix: Tensor, **outputs: int) -> Parts:
        found: list[Tensor | Blocks] = []
        for (name, _), part in zip(outputs.items(), matrix.split(list(outputs.values())), strict=True):
            kind = choose(name)
            found.append(part if kind == "float32" else in_blocks(part, kind))
        return tuple(found)

    def layer(of: LayerWeights[Tensor]) -> LayerWeights[Parts]:
        return replace(
            of,
            qkv=parts(of.qkv, query=shape.heads * shape.head_dim, key=keys, value=keys),
            output=parts(of.output, output=shape.hidden),
            gate_up=parts(of.gate_up, gate=shape.ffn, up=shape.ffn),
            down=parts(of.down, down=shape.hidden),
        )

    embedding = parts(weights.embedding, embedding=shape.vocab_tokens)
    return replace(
        weights,
        layers=tuple(layer(each) for each in weights.layers),
        embedding=embedding,
        head=embedding if weights.head is weights.embedding else parts(weights.head, head=shape.vocab_tokens),
    )


def dequantised(weights: ModelWeights[Parts]) -> ModelWeights[Tensor]:
    """The same in float32."""

    def whole(parts: Parts) -> Tensor:
        return torch.cat([dequantise(part) if isinstance(part, Blocks) else part for part in parts])

    def layer(of: LayerWeights[Parts]) -> LayerWeights[Tensor]:
        return replace(
            of, **{name: whole(getattr(of, name)) for name in ("qkv", "output", "gate_up", "down")}
        )

    embedding = whole(weights.embedding)
    return replace(
        weights,
        layers=tuple(layer(each) for each in weights.layers),
        embedding=embedding,
        head=embedding if weights.head is weights.embedding else whole(weights.head),
    )
