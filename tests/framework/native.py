"""The native step for tests: its library, built once, random models, and what they should compute."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.inference.engine.model.weights import LayerWeights, ModelShape, ModelWeights, Rope
from services.inference.engine.native.library import Library, load_native

ROOT = Path(__file__).parents[2]


@cache
def native_library() -> Library:
    return load_native(ROOT / ".state" / "native", print)


@dataclass(frozen=True)
class Features:
    """What a family may have or lack."""

    bias: bool = False
    head_norms: bool = False
    post_norms: bool = False
    tied: bool = True
    activation: str = "silu"
    embedding_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    windows: tuple[int, ...] = (0, 0)
    ropes: tuple[int, ...] = (0, 0)


@dataclass(frozen=True)
class Sizes:
    hidden: int = 48
    group: int = 3
    kv_heads: int = 1
    head_dim: int = 16
    ffn: int = 40
    vocab: int = 50
    context: int = 256
    features: Features = field(default_factory=Features)


def random_weights(sizes: Sizes, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> ModelWeights:
    """Weights of such sizes that neither explode nor vanish."""
    random = torch.Generator().manual_seed(seed)
    features = sizes.features
    heads, dim, hidden = sizes.group * sizes.kv_heads, sizes.head_dim, sizes.hidden

    def matrix(outputs: int, inputs: int) -> Tensor:
        return (torch.randn(outputs, inputs, generator=random) * (1.5 / inputs**0.5)).to(dtype)

    def vector(size: int, present: bool = True, middle: float = 1.0) -> Tensor | None:
        return middle + 0.3 * torch.randn(size, generator=random) if present else None

    def layer() -> LayerWeights:
        return LayerWeights(
            attention_norm=vector(hidden),
            qkv=matrix((heads + 2 * sizes.kv_heads) * dim, hidden),
            qkv_bias=vector((heads + 2 * sizes.kv_heads) * dim, features.bias, 0.0),
            q_norm=vector(dim, features.head_norms),
            k_norm=vector(dim, features.head_norms),
            output=matrix(hidden, heads * dim),
            output_bias=vector(hidden, features.bias, 0.0),
            post_attention_norm=vector(hidden, features.post_norms),
            ffn_norm=vector(hidden),
            gate_up=matrix(2 * sizes.ffn, hidden),
            down=matrix(hidden, sizes.ffn),
            post_ffn_norm=vector(hidden, features.post_norms),
        )

    shape = ModelShape(
        family="random",
        hidden=hidden,
        heads=heads,
        kv_heads=sizes.kv_heads,
        head_dim=dim,
        ffn=sizes.ffn,
        vocab_tokens=sizes.vocab,
        context_tokens=sizes.context,
        norm_eps=1e-5,
        activation=features.activation,
        embedding_scale=features.embedding_scale,
        query_scale=dim**-0.5,
        attention_softcap=features.attention_softcap,
        logit_softcap=features.logit_softcap,
        windows=features.windows,
        ropes=features.ropes,
    )
    embedding = matrix(sizes.vocab, hidden)
    bases = torch.arange(0, dim, 2) / dim
    return ModelWeights(
        shape=shape,
        embedding=embedding,
        layers=tuple(layer() for _ in features.windows),
        final_norm=vector(hidden),
        head=embedding if features.tied else matrix(sizes.vocab, hidden),
        ropes=(Rope(1.0 / 10_000.0**bases, 1.0), Rope(0.25 / 500.0**bases, 1.1)),
    )


def expected_logits(weights: ModelWeights, tokens: list[int]) -> npt.NDArray[np.float64]:
    """What a step should compute, from the definition: float64, one sequence, a full mask.

    Keys and values are rounded to the weights' type, as a pool of pages keeps them.
    """
    shape, kept = weights.shape, weights.head.dtype
    length = len(tokens)
    x = weights.embedding[tokens].double() * shape.embedding_scale
    for index, layer in enumerate(weights.layers):
        inner = _norm(x, layer.attention_norm, shape.norm_eps)
        qkv = inner @ layer.qkv.double().T + (0 if layer.qkv_bias is None else layer.qkv_bias.double())
        heads = qkv.view(length, -1, shape.head_dim)
        queries, keys, values = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        queries = _turn(_norm(queries, layer.q_norm, shape.norm_eps), weights, shape.ropes[index])
        keys = _turn(_norm(keys, layer.k_norm, shape.norm_eps), weights, shape.ropes[index])
        keys, values = (
            part.to(kept).double().repeat_interleave(shape.heads // shape.kv_heads, 1)
            for part in (keys, values)
        )
        scores = torch.einsum("qhd,khd->hqk", queries * shape.query_scale, keys)
        if shape.attention_softcap:
            scores = shape.attention_softcap * torch.tanh(scores / shape.attention_softcap)
        back = torch.arange(length)[:, None] - torch.arange(length)
        seen = (back >= 0) & (back < (shape.windows[index] or length + 1))
        chances = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", chances, values).reshape(length, -1)
        y = attended @ layer.output.double().T + (
            0 if layer.output_bias is None else layer.output_bias.double()
        )
        x = x + _norm(y, layer.post_attention_norm, shape.norm_eps)
        gate_up = _norm(x, layer.ffn_norm, shape.norm_eps) @ layer.gate_up.double().T
        gate, up = gate_up.chunk(2, -1)
        activation = torch.nn.functional.silu if shape.activation == "silu" else _gelu
        x = x + _norm((activation(gate) * up) @ layer.down.double().T, layer.post_ffn_norm, shape.norm_eps)
    logits = _norm(x, weights.final_norm, shape.norm_eps) @ weights.head.double().T
    if shape.logit_softcap:
        logits = shape.logit_softcap * torch.tanh(logits / shape.logit_softcap)
    return logits.numpy()


def _gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


def _turn(x: Tensor, weights: ModelWeights, index: int) -> Tensor:
    if index < 0:
        return x
    rope = weights.ropes[index]
    angles = (torch.arange(len(x))[:, None] * rope.inverse_frequencies).double()
    cosines, sines = (rope.scale * part[:, None] for part in (angles.cos(), angles.sin()))
    low, high = x.chunk(2, -1)
    return torch.cat((low * cosines - high * sines, high * cosines + low * sines), -1)


def random_tokens(random: Random, vocab: int, length: int) -> list[int]:
    return [random.randrange(vocab) for _ in range(length)]


def with_features(sizes: Sizes, **features: object) -> Sizes:
    return replace(sizes, features=replace(sizes.features, **features))
