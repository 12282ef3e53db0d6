"""A model's weights as the library takes them: each part of a matrix by itself, in its own format.

The kernels check nothing; whatever they were not made for is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from services.inference.engine.model.weights import Blocks, LayerWeights, ModelShape, ModelWeights, Parts
from services.inference.engine.native.build import NativeUnavailable
from services.inference.engine.native.library import FORMATS, VECTORS

Weights = ModelWeights[Tensor] | ModelWeights[Parts]
Matrix = Tensor | Parts
WHOLE_MODEL = -1
"""The layer of what belongs to none."""
_OPTIONAL = ("qkv_bias", "q_norm", "k_norm", "output_bias", "post_attention_norm", "post_ffn_norm")


def format_of(part: Tensor | Blocks) -> str:
    """One of FORMATS. Raises NativeUnavailable."""
    name = part.format if isinstance(part, Blocks) else str(part.dtype).removeprefix("torch.")
    if name not in FORMATS:
        raise NativeUnavailable(f"the native step computes from {', '.join(FORMATS)}, not from {name}")
    return name


def is_tied(weights: Weights) -> bool:
    """Whether the head is the embedding."""
    head, embedding = weights.head, weights.embedding
    if isinstance(head, Tensor) and isinstance(embedding, Tensor):
        return head is embedding or head.data_ptr() == embedding.data_ptr()
    return head is embedding


def parts_of(weights: Weights) -> Iterator[tuple[int, str, Tensor | Blocks]]:
    """Layer, name as in WEIGHTS, and weight; all but those that the model lacks. Raises NativeUnavailable."""
    shape = weights.shape
    _check_shape(shape, weights)
    sizes = _sizes(shape)
    layers: Sequence[LayerWeights[Tensor] | LayerWeights[Parts]] = weights.layers
    for index, layer in enumerate(layers):
        for name, part in _of_layer(shape, layer):
            if part is not None:
                _check(name, part, sizes[name])
                yield index, name, part
            elif name not in _OPTIONAL:
                raise NativeUnavailable(f"{name} is missing")
    whole: list[tuple[str, Tensor | Blocks]] = [("final_norm", weights.final_norm)]
    whole += [("head", part) for part in _split(weights.head, ["head"], [shape.vocab_tokens])]
    if not is_tied(weights):
        whole += [
            ("embedding", part) for part in _split(weights.embedding, ["embedding"], [shape.vocab_tokens])
        ]
    for name, part in whole:
        _check(name, part, sizes[name])
        yield WHOLE_MODEL, name, part


def kv_dtype(weights: Weights) -> torch.dtype:
    """Of keys and values: bfloat16, unless every matrix is float32."""
    names = {format_of(part) for _, name, part in parts_of(weights) if name not in VECTORS}
    return torch.float32 if names == {"float32"} else torch.bfloat16


def _of_layer(
    shape: ModelShape, layer: LayerWeights[Tensor] | LayerWeights[Parts]
) -> Iterator[tuple[str, Tensor | Blocks | None]]:
    keys = shape.kv_heads * shape.head_dim
    stacked: list[tuple[tuple[str, ...], Matrix, list[int]]] = [
        (("query", "key", "value"), layer.qkv, [shape.heads * shape.head_dim, keys, keys]),
        (("output",), layer.output, [shape.hidden]),
        (("gate", "up"), layer.gate_up, [shape.ffn, shape.ffn]),
        (("down",), layer.down, [shape.hidden]),
    ]
    for names, matrix, outputs in stacked:
        yield from zip(names, _split(matrix, names, outputs), strict=True)
    for name in VECTORS:
        if name != "final_norm":
            yield name, getattr(layer, name)


def _split(matrix: Matrix, names: Sequence[str], outputs: list[int]) -> Parts:
    if not isinstance(matrix, Tensor):
        return matrix
    if matrix.shape[0] != sum(outputs):
        raise NativeUnavailable(f"{', '.join(names)}: {matrix.shape[0]} outputs, not {sum(outputs)}")
    ends = list(accumulate(outputs))
    return tuple(matrix[end - count : end] for count, end in zip(outputs, ends, strict=True))


def _sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    vectors = dict.fromkeys(VECTORS, (shape.hidden,))
    return {
        **vectors,
        "qkv_bias": (queries + 2 * keys,),
        "q_norm": (shape.head_dim,),
        "k_norm": (shape.head_dim,),
        "query": (queries, shape.hidden),
        "key": (keys, shape.hidden),
        "value": (keys, shape.hidden),
        "output": (shape.hidden, queries),
        "gate": (shape.ffn, shape.hidden),
        "up": (shape.ffn, shape.hidden),
        "down": (shape.hidden, shape.ffn),
        "embedding": (shape.vocab_tokens, shape.hidden),
        "head": (shape.vocab_tokens, shape.hidden),
    }


def _check_shape(shape: ModelShape, weights: Weights) -> None:
    if shape.head_dim % 16 or shape.head_dim > 512:
        raise NativeUnavailable(
            f"the native step takes heads of 16 to 512 in steps of 16, not {shape.head_dim}"
        )
    if (
        shape.heads % shape.kv_heads
        or len(weights.layers) != shape.layers
        or len(shape.ropes) != shape.layers
    ):
        raise NativeUnavailable("the model's heads or layers do not fit each other")
    if any(rope >= len(weights.ropes) for rope in shape.ropes):
        raise NativeUnavailable("a layer names a rope that is not there")
    if any(rope.inverse_frequencies.shape != (shape.head_dim // 2,) for rope in weights.ropes):
        raise NativeUnavailable("the native step turns whole heads only")


def _check(name: str, part: Tensor | Blocks, size: tuple[int, ...]) -> None:
    if tuple(part.shape) != size:
        raise NativeUnavailable(f"{name} is {tuple(part.shape)}, not {size}")
    if name not in VECTORS:
        format_of(part)
    data = part.data if isinstance(part, Blocks) else part
    if data.device.type != "cpu":
        raise NativeUnavailable(f"{name} is on {data.device}")
