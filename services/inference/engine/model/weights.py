"""A model of the Llama family as numbers and tensors: all that a step needs, the same for every family.

What differs between families is data here, never a branch on a name: a norm that a family lacks is None, a
window of 0 sees everything. Differences of notation are folded in when a model is loaded (Gemma's norms count
from 1, its embeddings are scaled).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

M = TypeVar("M")
"""What a matrix is: a Tensor in the model's dtype, or Parts as they are stored."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes and constants of a model."""

    family: str
    """transformers' `model_type`."""
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """The width between gate and down."""
    vocab_tokens: int
    context_tokens: int
    norm_eps: float
    activation: Literal["silu", "gelu_tanh"]
    embedding_scale: float
    """Multiplies the embeddings; 1 but for Gemma."""
    query_scale: float
    """Multiplies queries before the product with keys; mostly head_dim ** -0.5."""
    attention_softcap: float
    """c * tanh(x / c) over attention's scores; 0 where there is none."""
    logit_softcap: float
    """The same over the logits."""
    windows: tuple[int, ...]
    """For each layer: how many of the latest positions a query sees, itself included; 0 is all."""
    ropes: tuple[int, ...]
    """For each layer: which of `ModelWeights.ropes` turns its queries and keys; -1 is none."""

    @property
    def layers(self) -> int:
        return len(self.windows)


@dataclass(frozen=True, slots=True)
class Rope:
    """A rotary embedding: angle = position * inverse_frequencies; halves are rotated, as in Llama."""

    inverse_frequencies: Tensor
    """float32 [head_dim / 2]."""
    scale: float
    """Multiplies cosine and sine (YaRN); 1 for most."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix [outputs, inputs] in quantised blocks, as GGUF files have them."""

    format: str
    """`Q8_0`, `Q4_0`, `Q4_1` or `Q4_K`."""
    inputs: int
    data: Tensor
    """uint8 [outputs, bytes of a row]."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.inputs


Parts = tuple["Tensor | Blocks", ...]
"""A matrix in the parts that it was stored in, below each other; each may be stored otherwise."""


@dataclass(frozen=True, slots=True)
class LayerWeights(Generic[M]):
    """One layer. Matrices are [outputs, inputs], norms and biases float32."""

    attention_norm: Tensor
    qkv: M
    """[(heads + 2 * kv_heads) * head_dim, hidden]: queries, keys, values."""
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    """[head_dim], over each head before the rotation."""
    k_norm: Tensor | None
    output: M
    """[hidden, heads * head_dim]."""
    output_bias: Tensor | None
    post_attention_norm: Tensor | None
    """Over attention's output, before it is added (Gemma)."""
    ffn_norm: Tensor
    gate_up: M
    """[2 * ffn, hidden]: gate, then up."""
    down: M
    """[hidden, ffn]."""
    post_ffn_norm: Tensor | None


@dataclass(frozen=True, slots=True)
class ModelWeights(Generic[M]):
    """A whole model. RMS norms: x / sqrt(mean(x²) + norm_eps) * weight."""

    shape: ModelShape
    embedding: M
    """[vocab_tokens, hidden]."""
    layers: tuple[LayerWeights[M], ...]
    final_norm: Tensor
    head: M
    """[vocab_tokens, hidden]; the same tensor as `embedding` where the two are tied."""
    ropes: tuple[Rope, ...]
