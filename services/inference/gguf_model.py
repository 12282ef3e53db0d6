"""A GGUF file of the Llama family as a model folder: what transformers' own reader gives, without its time.

The file holds the tokenizer, the shape and the quantised weights; the folder holds them as `tokenizer.json`,
`config.json` and safetensors: the blocks as they are, or float32 numbers that the package gguf makes of them.
No value changes. Only what the packaged model has is known here; anything else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from services.inference.models import BLOCK_FORMATS, QUANT_METHOD

Weights = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Values = TypeVar("Values", Weights, Bytes)
Progress = Callable[[int, str], None]
"""Gets the percentage that lies behind, and what is done next."""

_CONTROL = 3
"""The token type of special tokens."""
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}


class UnknownLayout(Exception):
    """The file holds something that this module does not know."""


def convert(
    file: Path, folder: Path, sampling: Mapping[str, float], progress: Progress, *, keep_blocks: bool
) -> None:
    """Writes the model of `file` into `folder`, `sampling` as its default. Raises UnknownLayout, OSError.

    `keep_blocks`: matrices in a format that the native step computes with stay in it; the others, and all
    without it, become float32.
    """
    progress(0, f"reading a file of {file.stat().st_size // 1_000_000} MB")
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.model"] != "gpt2":
        raise UnknownLayout(f"{file.name} is not a Llama with a byte-level tokenizer")
    progress(5, "writing the tokenizer")
    _write(folder / "tokenizer.json", _tokenizer(fields))
    _write(folder / "tokenizer_config.json", _tokenizer_config(fields))
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"])
    _write(folder / "generation_config.json", _special_ids(fields) | {"do_sample": True} | dict(sampling))
    weights: dict[str, Weights | Bytes] = {}
    formats: dict[str, str] = {}
    for index, tensor in enumerate(reader.tensors):
        if index % 32 == 0:
            progress(10 + 60 * index // len(reader.tensors), "reading the weights")
        name, kind = _name(tensor.name), tensor.tensor_type
        if keep_blocks and kind.name in BLOCK_FORMATS:
            formats[name] = kind.name
            weights[name] = _in_order(np.asarray(tensor.data), tensor.name, fields)
        else:
            weights[name] = _in_order(gguf.dequantize(tensor.data, kind), tensor.name, fields)
    quantised = {"quant_method": QUANT_METHOD, "formats": formats}
    config = _config(fields) | ({"quantization_config": quantised} if formats else {})
    _write(folder / "config.json", config)
    size = sum(values.nbytes for values in weights.values())
    progress(70, f"writing {size // 1_000_000} MB of safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _name(name: str) -> str:
    """transformers' name for a tensor."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES and parts[3] == "weight":
        return f"model.layers.{int(parts[1])}.{_LAYER_NAMES[parts[2]]}.weight"
    if len(parts) == 2 and parts[0] in _NAMES and parts[1] == "weight":
        return f"model.{_NAMES[parts[0]]}.weight"
    raise UnknownLayout(f"a tensor named {name}")


def _in_order(rows: Values, name: str, fields: Mapping[str, Any]) -> Values:
    """The rows of a tensor, numbers or blocks, in transformers' order."""
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }.get(name.split(".")[-2])
    if heads is None:
        return rows
    # GGUF turns neighbours by the rotary angle, transformers the halves of a head.
    count, columns = rows.shape
    pairs = rows.reshape(heads, count // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(count, columns)


def _special_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _config(fields: Mapping[str, Any]) -> dict[str, Any]:
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "pretraining_tp": 1,
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_theta": fields["llama.rope.freq_base"], "rope_type": "default"},
        # A file with a head of its own has a tensor `output`, which is refused above.
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    } | _special_ids(fields)


def _tokenizer(fields: Mapping[str, Any]) -> dict[str, Any]:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    special = [index for index, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == _CONTROL]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    text, pair = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": tokens[index],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index in special
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level | {"add_prefix_space": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [text],
            "pair": [text, pair],
            "special_tokens": {},
        },
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    special = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in names.items()
    }
    return {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend"} | special


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
