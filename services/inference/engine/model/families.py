"""The Llama family as a table: what each member does otherwise, and how that is read from its config.

A model outside the table, or one with a setting that the step does not compute, is refused with a sentence
that says so: a model that runs is a model that runs right.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch

from services.inference.engine.model.weights import ModelShape, Rope
from services.inference.models import ModelUnusable


@dataclass(frozen=True, slots=True)
class Family:
    """What a family does otherwise than Llama."""

    qkv_bias: Literal["configured", "always", "never"] = "configured"
    """Whether queries, keys and values have a bias; attention's output has one only where configured."""
    qk_norm: bool = False
    sliding: Literal["never", "all", "by_type"] = "never"
    """Which layers have the config's window: by_type asks its `layer_types`."""
    nope_layers: bool = False
    """Some layers turn nothing (`no_rope_layers`)."""
    rope_by_type: bool = False
    """Sliding and full layers are turned differently."""
    gemma: bool = False
    """Norms count from 1 and stand behind attention and feed-forward too, embeddings are scaled by
    sqrt(hidden), queries by a scalar of the config, and scores and logits may be capped."""
    text_config: bool = False
    """The language model is a part of a larger one; only it is loaded."""


FAMILIES = {
    "llama": Family(),
    "smollm3": Family(nope_layers=True, sliding="by_type"),
    "mistral": Family(qkv_bias="never", sliding="all"),
    "qwen2": Family(qkv_bias="always", sliding="by_type"),
    "qwen3": Family(qk_norm=True, sliding="by_type"),
    "gemma2": Family(gemma=True, sliding="by_type"),
    "gemma3_text": Family(gemma=True, sliding="by_type", qk_norm=True, rope_by_type=True),
    "gemma3": Family(gemma=True, sliding="by_type", qk_norm=True, rope_by_type=True, text_config=True),
}
"""By transformers' `model_type`. Llama covers SmolLM and SmolLM2, Qwen2 covers Qwen2.5."""

ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose frequencies do not change with the length of the sequence."""


@dataclass(frozen=True, slots=True)
class Description:
    """A model without its tensors."""

    family: Family
    shape: ModelShape
    ropes: tuple[Rope, ...]
    qkv_bias: bool
    output_bias: bool
    tied: bool
    """Whether the head is the embedding."""


def check_family(model_type: object) -> Family:
    """Raises ModelUnusable where a model is not of the table."""
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelUnusable(
            f"models of type {model_type!r} are not served; those served: {', '.join(FAMILIES)}"
        )
    return family


_NUMBERS = (
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps"),
)


def complete_config(content: dict[str, Any]) -> Any:
    """The content of a `config.json` as `describe` reads it, where it leaves nothing to defaults; else None.

    Filling in what is missing or written in an older way, complaints about what makes no sense, and scaled
    ropes are transformers' affair; but to import its configs takes longer than to load a small model.
    """
    family = check_family(content.get("model_type"))
    needed = ["tie_word_embeddings", "rope_parameters", "hidden_activation" if family.gemma else "hidden_act"]
    needed += ["layer_types"] * (family.sliding == "by_type")
    needed += ["sliding_window"] * (family.sliding != "never")
    needed += ["no_rope_layers"] * family.nope_layers
    needed += ["head_dim"] * (family.gemma or family.qk_norm)
    if family.gemma:
        needed += ["query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"]
    if family.text_config or any(name not in content for name in needed):
        return None
    if not all(isinstance(content.get(name), int | float) for name in _NUMBERS):
        return None
    ropes = content["rope_parameters"]
    for rope in ropes.values() if family.rope_by_type else [ropes]:
        if not isinstance(rope, dict) or rope.get("rope_type") != "default" or "rope_theta" not in rope:
            return None
    return SimpleNamespace(**content)


def describe(config: Any, dtype: torch.dtype) -> Description:
    """Reads a config of transformers, or a complete one. `dtype` is that of the weights.

    Raises ModelUnusable.
    """
    model_type = config.model_type
    family = check_family(model_type)
    tied = bool(config.tie_word_embeddings)
    if family.text_config:
        config = config.text_config
    _refuse_unknown(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ropes, rope_of_layer = _ropes(config, family, head_dim)
    biased = bool(getattr(config, "attention_bias", False))
    shape = ModelShape(
        family=model_type,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        ffn=config.intermediate_size,
        vocab_tokens=config.vocab_size,
        context_tokens=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        activation=ACTIVATIONS[config.hidden_activation if family.gemma else config.hidden_act],
        # Gemma was trained with the scale rounded to the dtype of its weights.
        embedding_scale=float(torch.tensor(config.hidden_size**0.5, dtype=dtype)) if family.gemma else 1.0,
        query_scale=float(config.query_pre_attn_scalar if family.gemma else head_dim) ** -0.5,
        attention_softcap=float((family.gemma and config.attn_logit_softcapping) or 0.0),
        logit_softcap=float((family.gemma and config.final_logit_softcapping) or 0.0),
        windows=_windows(config, family),
        ropes=rope_of_layer,
    )
    return Description(
        family=family,
        shape=shape,
        ropes=ropes,
        qkv_bias=family.qkv_bias == "always" or (family.qkv_bias == "configured" and biased),
        output_bias=family.qkv_bias == "configured" and biased,
        tied=tied,
    )


def _refuse_unknown(config: Any) -> None:
    """Settings of these families that nobody's published models use, or that belong to other tasks."""
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in ACTIVATIONS:
        raise ModelUnusable(
            f"the activation {activation!r} is not served; those served: {', '.join(ACTIVATIONS)}"
        )
    if getattr(config, "mlp_bias", False):
        raise ModelUnusable("a bias in the feed-forward layers (mlp_bias) is not served")
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelUnusable("a model that looks ahead (use_bidirectional_attention) does not generate")
    if getattr(config, "quantization_config", None):
        raise ModelUnusable("of quantised safetensors, only those that `llmos quantize` makes are served")
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelUnusable(f"layers of type {', '.join(sorted(unknown))} are not served")


def _windows(config: Any, family: Family) -> tuple[int, ...]:
    window: int = getattr(config, "sliding_window", None) or 0
    if family.sliding == "by_type":
        return tuple(window if kind == "sliding_attention" else 0 for kind in config.layer_types)
    layers: int = config.num_hidden_layers
    return (window if family.sliding == "all" else 0,) * layers


def _ropes(config: Any, family: Family, head_dim: int) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
    """The rotary embeddings, and which of them each layer has."""
    layers: int = config.num_hidden_layers
    if family.rope_by_type:
        kinds = sorted(set(config.layer_types))
        ropes = tuple(_rope(config, config.rope_parameters[kind], head_dim, kind) for kind in kinds)
        return ropes, tuple(kinds.index(kind) for kind in config.layer_types)
    rope = _rope(config, config.rope_parameters, head_dim, None)
    if family.nope_layers:
        return (rope,), tuple(0 if config.no_rope_layers[layer] else -1 for layer in range(layers))
    return (rope,), (0,) * layers


def _rope(config: Any, parameters: dict[str, Any], head_dim: int, layer_type: str | None) -> Rope:
    kind = parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise ModelUnusable(f"rope scaling {kind!r} is not served; those served: {', '.join(ROPE_TYPES)}")
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return Rope(1.0 / parameters["rope_theta"] ** exponents, 1.0)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layer_type)
    if len(frequencies) * 2 != head_dim:
        raise ModelUnusable(f"a rope over {len(frequencies) * 2} of {head_dim} dimensions is not served")
    return Rope(frequencies.float(), float(scale))
