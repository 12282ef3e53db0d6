"""Model folders to tensors.

Safetensors are read tensor by tensor, each straight into its place: the fused matrices are never held twice.
A GGUF file is dequantised by transformers. Code that a folder may bring along is never run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.inference.engine.model.families import Description, complete_config, describe
from services.inference.engine.model.weights import LayerWeights, ModelWeights
from services.inference.models import ModelUnusable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_weights(folder: Path, dtype: str) -> ModelWeights:
    """Loads a folder that holds `config.json` and safetensors, or one GGUF file.

    `dtype` of the matrices: `float32` or `bfloat16`. Raises ModelUnusable, with what is wrong, and OSError.
    """
    target = DTYPES[dtype]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return _load_gguf(folder, target)
    config = json.loads((folder / "config.json").read_bytes())
    description = describe(complete_config(config) or _completed(folder), target)
    with _opened(files) as tensors:
        return _assemble(description, tensors, target)


def _completed(folder: Path) -> Any:
    """The config with what it leaves out."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelUnusable(f"{folder / 'config.json'}: {error}") from error


def _load_gguf(folder: Path, dtype: torch.dtype) -> ModelWeights:
    from transformers import AutoModelForCausalLM, GgufConfig

    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelUnusable(f"{folder} holds neither *.safetensors nor one *.gguf, but {len(files)} of these")
    try:
        # It returns a pair when it is asked to report, which its annotations do not say.
        loader: Any = AutoModelForCausalLM
        model, report = loader.from_pretrained(
            folder,
            gguf_file=files[0].name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelUnusable(f"{files[0]}: {error}") from error
    # transformers fills what a file lacks with random numbers and goes on.
    lacking = sorted({*report["missing_keys"], *report["mismatched_keys"]})
    if model.config.tie_word_embeddings:
        lacking = [name for name in lacking if not name.endswith("lm_head.weight")]
    if lacking:
        raise ModelUnusable(f"{files[0]} lacks {len(lacking)} tensors, the first {lacking[0]}")
    config, state = model.config, dict(model.state_dict())
    del model
    # It says how the file stored them; the tensors are plain by now.
    config.quantization_config = None
    # Each tensor is let go of once it has been copied to its place.
    return _assemble(describe(config, dtype), _Tensors(state.pop, state), dtype)


class _Tensors:
    """A model's tensors by name, whatever they stand under."""

    def __init__(self, read: Callable[[str], Tensor], names: Any) -> None:
        self._read = read
        self._names = set(names)
        embeddings = [name for name in self._names if name.endswith("embed_tokens.weight")]
        if len(embeddings) != 1:
            raise ModelUnusable(f"{len(embeddings)} tensors are named *embed_tokens.weight, not one")
        # A language model inside a larger one has a longer prefix.
        self._prefix = embeddings[0].removesuffix("embed_tokens.weight")

    def get(self, name: str) -> Tensor:
        return self._get(self._prefix + name)

    def head(self) -> Tensor:
        heads = [name for name in self._names if name.endswith("lm_head.weight")]
        return self._get(heads[0] if heads else "lm_head.weight")

    def _get(self, name: str) -> Tensor:
        if name not in self._names:
            raise ModelUnusable(f"the weights lack {name}")
        return self._read(name)


@contextmanager
def _opened(files: list[Path]) -> Iterator[_Tensors]:
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        readers: dict[str, Any] = {}
        for file in files:
            try:
                reader: Any = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise ModelUnusable(f"{file}: {error}") from error
            readers.update(dict.fromkeys(reader.keys(), reader))
        yield _Tensors(lambda name: readers[name].get_tensor(name), readers)


def _assemble(description: Description, tensors: _Tensors, dtype: torch.dtype) -> ModelWeights:
    shape = description.shape
    embedding = _matrix(dtype, shape.hidden, (shape.vocab_tokens, tensors.get("embed_tokens.weight")))
    head = (
        embedding if description.tied else _matrix(dtype, shape.hidden, (shape.vocab_tokens, tensors.head()))
    )
    return ModelWeights(
        shape=shape,
        embedding=embedding,
        layers=tuple(_layer(description, tensors, index, dtype) for index in range(shape.layers)),
        final_norm=_norm(description, tensors.get("norm.weight"), shape.hidden),
        head=head,
        ropes=description.ropes,
    )


def _layer(description: Description, tensors: _Tensors, index: int, dtype: torch.dtype) -> LayerWeights:
    family, shape = description.family, description.shape
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def get(name: str) -> Tensor:
        return tensors.get(f"layers.{index}.{name}")

    def norm(name: str, size: int) -> Tensor:
        return _norm(description, get(f"{name}.weight"), size)

    def bias(*parts: tuple[str, int]) -> Tensor:
        return torch.cat([_vector(get(f"self_attn.{name}_proj.bias"), size) for name, size in parts])

    return LayerWeights(
        attention_norm=norm("input_layernorm", shape.hidden),
        qkv=_matrix(
            dtype,
            shape.hidden,
            (queries, get("self_attn.q_proj.weight")),
            (keys, get("self_attn.k_proj.weight")),
            (keys, get("self_attn.v_proj.weight")),
        ),
        qkv_bias=bias(("q", queries), ("k", keys), ("v", keys)) if description.qkv_bias else None,
        q_norm=norm("self_attn.q_norm", shape.head_dim) if family.qk_norm else None,
        k_norm=norm("self_attn.k_norm", shape.head_dim) if family.qk_norm else None,
        output=_matrix(dtype, queries, (shape.hidden, get("self_attn.o_proj.weight"))),
        output_bias=bias(("o", shape.hidden)) if description.output_bias else None,
        post_attention_norm=norm("post_attention_layernorm", shape.hidden) if family.gemma else None,
        ffn_norm=norm(
            "pre_feedforward_layernorm" if family.gemma else "post_attention_layernorm", shape.hidden
        ),
        gate_up=_matrix(
            dtype,
            shape.hidden,
            (shape.ffn, get("mlp.gate_proj.weight")),
            (shape.ffn, get("mlp.up_proj.weight")),
        ),
        down=_matrix(dtype, shape.ffn, (shape.hidden, get("mlp.down_proj.weight"))),
        post_ffn_norm=norm("post_feedforward_layernorm", shape.hidden) if family.gemma else None,
    )


def _matrix(dtype: torch.dtype, inputs: int, *parts: tuple[int, Tensor]) -> Tensor:
    """The parts below each other, in memory of our own. Each comes with the number of rows it must have."""
    matrix = torch.empty(sum(rows for rows, _ in parts), inputs, dtype=dtype)
    start = 0
    for rows, part in parts:
        if part.shape != (rows, inputs):
            raise ModelUnusable(f"a matrix of {tuple(part.shape)} where the config wants {(rows, inputs)}")
        matrix[start : start + rows].copy_(part)
        start += rows
    return matrix


def _norm(description: Description, weight: Tensor, size: int) -> Tensor:
    own = _vector(weight, size)
    return own + 1 if description.family.gemma else own


def _vector(part: Tensor, size: int) -> Tensor:
    if part.shape != (size,):
        raise ModelUnusable(f"a vector of {tuple(part.shape)} where the config wants {(size,)}")
    return part.to(torch.float32, copy=True)
