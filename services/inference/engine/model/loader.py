"""Model folders to tensors.

Safetensors are read tensor by tensor, each straight into its place: the fused matrices are never held twice.
Quantised blocks in them (see `quantisation`) are kept or dequantised. A GGUF file is dequantised by
transformers. Code that a folder may bring along is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from services.inference.engine.model.families import Description, complete_config, describe
from services.inference.engine.model.weights import Blocks, LayerWeights, ModelWeights, Parts
from services.inference.models import ModelUnusable, block_formats, read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
M_co = TypeVar("M_co", covariant=True)
M = TypeVar("M")


class Stack(Protocol[M_co]):
    """Makes a matrix of `inputs` columns of its parts; each comes with the number of rows it must have."""

    def __call__(self, inputs: int, *parts: tuple[int, Tensor | Blocks]) -> M_co:
        """Raises ModelUnusable."""


def load_weights(folder: Path, dtype: str) -> ModelWeights[Tensor]:
    """Loads a folder that holds `config.json` and safetensors, or one GGUF file.

    `dtype` of the matrices: `float32` or `bfloat16`. Raises ModelUnusable, with what is wrong, and OSError.
    """
    target = DTYPES[dtype]
    if not any(folder.glob("*.safetensors")):
        return _load_gguf(folder, target)
    return _load(folder, target, partial(_dense, target))


def load_stored(folder: Path) -> ModelWeights[Parts]:
    """Loads a folder of safetensors as it is stored: quantised blocks are kept. Raises as `load_weights`."""
    return _load(folder, torch.float32, _stored)


def _load(folder: Path, dtype: torch.dtype, stack: Stack[M]) -> ModelWeights[M]:
    content = read_config(folder)
    formats = block_formats(content)
    if formats:
        del content["quantization_config"]
    config = complete_config(content)
    if config is None:
        config = _completed(folder)
        if formats:
            config.quantization_config = None
    description = describe(config, dtype)
    with tensor_readers(folder) as readers:
        tensors = _Tensors(lambda name: readers[name].get_tensor(name), readers, formats)
        return _assemble(description, tensors, stack)


def _completed(folder: Path) -> Any:
    """The config with what it leaves out."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelUnusable(f"{folder / 'config.json'}: {error}") from error


def _load_gguf(folder: Path, dtype: torch.dtype) -> ModelWeights[Tensor]:
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
    return _assemble(describe(config, dtype), _Tensors(state.pop, state, {}), partial(_dense, dtype))


class _Tensors:
    """A model's tensors by name, whatever they stand under."""

    def __init__(self, read: Callable[[str], Tensor], names: Any, formats: Mapping[str, str]) -> None:
        """`formats`: of those that are blocks."""
        self._read = read
        self._names = set(names)
        self._formats = formats
        embeddings = [name for name in self._names if name.endswith("embed_tokens.weight")]
        if len(embeddings) != 1:
            raise ModelUnusable(f"{len(embeddings)} tensors are named *embed_tokens.weight, not one")
        # A language model inside a larger one has a longer prefix.
        self._prefix = embeddings[0].removesuffix("embed_tokens.weight")

    def matrix(self, name: str) -> Tensor | Blocks:
        return self._get(self._prefix + name)

    def vector(self, name: str) -> Tensor:
        found = self._get(self._prefix + name)
        if isinstance(found, Blocks):
            raise ModelUnusable(f"{name} is in blocks, which only matrices can be")
        return found

    def head(self) -> Tensor | Blocks:
        heads = [name for name in self._names if name.endswith("lm_head.weight")]
        return self._get(heads[0] if heads else "lm_head.weight")

    def _get(self, name: str) -> Tensor | Blocks:
        if name not in self._names:
            raise ModelUnusable(f"the weights lack {name}")
        if name not in self._formats:
            return self._read(name)
        from services.inference.engine.model.blocks import blocks_of

        return blocks_of(self._read(name), self._formats[name])


@contextmanager
def tensor_readers(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The readers of the tensors in a folder's safetensors, by the tensors' names. Raises ModelUnusable."""
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        readers: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                reader: Any = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise ModelUnusable(f"{file}: {error}") from error
            readers.update(dict.fromkeys(reader.keys(), reader))
        yield readers


def _assemble(description: Description, tensors: _Tensors, stack: Stack[M]) -> ModelWeights[M]:
    shape = description.shape
    embedding = stack(shape.hidden, (shape.vocab_tokens, tensors.matrix("embed_tokens.weight")))
    head = embedding if description.tied else stack(shape.hidden, (shape.vocab_tokens, tensors.head()))
    return ModelWeights(
        shape=shape,
        embedding=embedding,
        layers=tuple(_layer(description, tensors, index, stack) for index in range(shape.layers)),
        final_norm=_norm(description, tensors.vector("norm.weight"), shape.hidden),
        head=head,
        ropes=description.ropes,
    )


def _layer(description: Description, tensors: _Tensors, index: int, stack: Stack[M]) -> LayerWeights[M]:
    family, shape = description.family, description.shape
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def get(name: str) -> Tensor | Blocks:
        return tensors.matrix(f"layers.{index}.{name}_proj.weight")

    def vector(name: str) -> Tensor:
        return tensors.vector(f"layers.{index}.{name}")

    def norm(name: str, size: int) -> Tensor:
        return _norm(description, vector(f"{name}.weight"), size)

    def bias(*parts: tuple[str, int]) -> Tensor:
        return torch.cat([_vector(vector(f"self_attn.{name}_proj.bias"), size) for name, size in parts])

    return LayerWeights(
        attention_norm=norm("input_layernorm", shape.hidden),
        qkv=stack(
            shape.hidden,
            (queries, get("self_attn.q")),
            (keys, get("self_attn.k")),
            (keys, get("self_attn.v")),
        ),
        qkv_bias=bias(("q", queries), ("k", keys), ("v", keys)) if description.qkv_bias else None,
        q_norm=norm("self_attn.q_norm", shape.head_dim) if family.qk_norm else None,
        k_norm=norm("self_attn.k_norm", shape.head_dim) if family.qk_norm else None,
        output=stack(queries, (shape.hidden, get("self_attn.o"))),
        output_bias=bias(("o", shape.hidden)) if description.output_bias else None,
        post_attention_norm=norm("post_attention_layernorm", shape.hidden) if family.gemma else None,
        ffn_norm=norm(
            "pre_feedforward_layernorm" if family.gemma else "post_attention_layernorm", shape.hidden
        ),
        gate_up=stack(shape.hidden, (shape.ffn, get("mlp.gate")), (shape.ffn, get("mlp.up"))),
        down=stack(shape.ffn, (shape.hidden, get("mlp.down"))),
        post_ffn_norm=norm("post_feedforward_layernorm", shape.hidden) if family.gemma else None,
    )


def _dense(dtype: torch.dtype, inputs: int, *parts: tuple[int, Tensor | Blocks]) -> Tensor:
    """The parts below each other, in memory of our own."""
    matrix = torch.empty(sum(rows for rows, _ in parts), inputs, dtype=dtype)
    start = 0
    for rows, part in parts:
        _check(part, rows, inputs)
        if isinstance(part, Blocks):
            from services.inference.engine.model.blocks import dequantise

            part = dequantise(part)
        matrix[start : start + rows].copy_(part)
        start += rows
    return matrix


def _stored(inputs: int, *parts: tuple[int, Tensor | Blocks]) -> Parts:
    """The parts as they are; float16, which the native step has not, as float32."""
    for rows, part in parts:
        _check(part, rows, inputs)
    return tuple(
        part.float() if isinstance(part, Tensor) and part.dtype is torch.float16 else part
        for _, part in parts
    )


def _check(part: Tensor | Blocks, rows: int, inputs: int) -> None:
    if part.shape != (rows, inputs):
        raise ModelUnusable(f"a matrix of {tuple(part.shape)} where the config wants {(rows, inputs)}")


def _norm(description: Description, weight: Tensor, size: int) -> Tensor:
    own = _vector(weight, size)
    return own + 1 if description.family.gemma else own


def _vector(part: Tensor, size: int) -> Tensor:
    if part.shape != (size,):
        raise ModelUnusable(f"a vector of {tuple(part.shape)} where the config wants {(size,)}")
    return part.to(torch.float32, copy=True)
