"""Matrices in quantised blocks: their formats, and what they mean. The package gguf defines both."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from torch import Tensor

from services.inference.engine.model.weights import Blocks
from services.inference.models import BLOCK_FORMATS, ModelUnusable

_SCALES = {"Q8_0": 1, "Q4_0": 1, "Q4_1": 2, "Q4_K": 2}
"""How many float16 a block begins with."""


def block_sizes(format_name: str) -> tuple[int, int]:
    """Inputs and bytes of a block."""
    inputs, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format_name]]
    return int(inputs), int(size)


def blocks_of(data: Tensor, format_name: str) -> Blocks:
    """`data`: uint8 [outputs, bytes of a row]. Raises ModelUnusable."""
    if format_name not in BLOCK_FORMATS:
        raise ModelUnusable(
            f"blocks of format {format_name!r} are not served; those served: {', '.join(BLOCK_FORMATS)}"
        )
    inputs, size = block_sizes(format_name)
    if data.dtype is not torch.uint8 or data.ndim != 2 or data.shape[1] % size:
        raise ModelUnusable(f"{tuple(data.shape)} bytes of {data.dtype} are no rows of {format_name}")
    scales = data.numpy().reshape(-1, size)[:, : 2 * _SCALES[format_name]].copy().view(np.float16)
    if not np.isfinite(scales).all():
        raise ModelUnusable(f"a block of {format_name} has a scale that is not a number")
    return Blocks(format_name, data.shape[1] // size * inputs, data.contiguous())


def quantise(matrix: Tensor, format_name: str) -> Blocks:
    """[outputs, inputs] in blocks; the inputs are a multiple of `block_sizes`. gguf does not write `Q4_K`."""
    values = matrix.to(torch.float32).numpy()
    data = gguf.quantize(values, gguf.GGMLQuantizationType[format_name])
    return blocks_of(torch.from_numpy(data), format_name)


def dequantise(blocks: Blocks) -> Tensor:
    """float32 [outputs, inputs]: the numbers that the blocks stand for."""
    return torch.from_numpy(gguf.dequantize(blocks.data.numpy(), gguf.GGMLQuantizationType[blocks.format]))
