"""A model on its device, its matrices ready to multiply."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.inference.engine.model.matrix import Product, choose
from services.inference.engine.model.weights import LayerWeights, ModelShape, ModelWeights


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer; as in LayerWeights."""

    attention_norm: Tensor
    qkv: Product
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Product
    output_bias: Tensor | None
    post_attention_norm: Tensor | None
    ffn_norm: Tensor
    gate_up: Product
    down: Product
    post_ffn_norm: Tensor | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A whole model; as in ModelWeights."""

    shape: ModelShape
    dtype: torch.dtype
    device: torch.device
    embedding: Tensor
    layers: tuple[Layer, ...]
    final_norm: Tensor
    head: Product
    ropes: tuple[tuple[Tensor, float], ...]
    """Inverse frequencies, and what multiplies cosine and sine."""
    form: str
    """Names the form of the products."""
    threads: tuple[int, ...]
    """With these numbers of threads a row of a product is the same in every batch; empty: with none."""


def prepare(weights: ModelWeights[Tensor], device: torch.device) -> Prepared:
    """Chooses the form of the products on the way. Packed matrices are copies."""
    shape, first = weights.shape, weights.layers[0]
    embedding = weights.embedding.to(device)
    head = embedding if weights.head is weights.embedding else weights.head.to(device)
    samples = [each.to(device) for each in (first.qkv, first.output, first.gate_up, first.down)] + [head]
    now = torch.get_num_threads()
    threads = (now, 1 if now > 1 else 2) if device.type == "cpu" else (now,)
    choice = choose(samples, threads)
    if not choice.exact and len(threads) > 1:
        threads = threads[:1]
        choice = choose(samples, threads)

    def product(matrix: Tensor) -> Product:
        return choice.ready.get(id(matrix)) or choice.form.prepare(matrix.to(device))

    def moved(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector.to(device)

    def layer(source: LayerWeights[Tensor]) -> Layer:
        return Layer(
            attention_norm=source.attention_norm.to(device),
            qkv=product(source.qkv),
            qkv_bias=moved(source.qkv_bias),
            q_norm=moved(source.q_norm),
            k_norm=moved(source.k_norm),
            output=product(source.output),
            output_bias=moved(source.output_bias),
            post_attention_norm=moved(source.post_attention_norm),
            ffn_norm=source.ffn_norm.to(device),
            gate_up=product(source.gate_up),
            down=product(source.down),
            post_ffn_norm=moved(source.post_ffn_norm),
        )

    return Prepared(
        shape=shape,
        dtype=embedding.dtype,
        device=device,
        embedding=embedding,
        layers=tuple(layer(each) for each in weights.layers),
        final_norm=weights.final_norm.to(device),
        head=product(head),
        ropes=tuple((rope.inverse_frequencies.to(device), rope.scale) for rope in weights.ropes),
        form=choice.form.name,
        threads=threads if choice.exact else (),
    )
