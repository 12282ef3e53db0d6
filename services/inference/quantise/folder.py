"""The target folder: what a source holds, with its matrices in blocks. It appears complete or not at all.

Weights go from file to file, some megabytes at a time, so that a model need not fit into memory. The sizes of
all blocks are known beforehand: the header of the one safetensors file is written first
(https://huggingface.co/docs/safetensors describes the format).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.inference.engine.model.blocks import block_sizes, dequantise, quantise
from services.inference.engine.model.families import check_family
from services.inference.engine.model.loader import load_stored, tensor_readers
from services.inference.models import QUANT_METHOD, ModelUnusable, block_formats, read_config

Progress = Callable[[int, str], None]
"""Gets the percentage that lies behind, and what is being done."""

KEEP = "keep"
"""A GGUF file's own blocks."""
FORMATS = ("Q8_0", "Q4_1", "Q4_0")
"""Those that can be made: 8.5, 5 and 4.5 bits a weight."""
COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    "generation_config.json",
)
_PROJECTION = re.compile(r"layers\.\d+\.(?:self_attn\.[qkvo]|mlp\.(?:gate|up|down))_proj\.weight")
_PLAIN = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Number formats by safetensors' names for them."""
_NUMBERS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Written:
    """One tensor of the target."""

    name: str
    format: str
    """One of BLOCK_FORMATS, or what numbers they are."""
    numbers: int
    bytes: int
    matrix: bool
    """Whether it is one of those that are quantised where they can be."""
    error: float | None
    """The difference's root mean square over that of the source's numbers; None where nothing was rounded."""

    @property
    def kind(self) -> str:
        """`q_proj`, `embed_tokens` and so on, without the layer."""
        return self.name.removesuffix(".weight").rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class _Plan:
    """One tensor, before it is written."""

    name: str
    stored: str
    """safetensors' name of its type in the source."""
    shape: list[int]
    matrix: bool
    target: str | None
    """The format of its blocks; None: it stays."""

    @property
    def header(self) -> tuple[str, list[int], int]:
        """Type, shape and bytes, as they will be."""
        if self.target is None:
            return self.stored, self.shape, math.prod(self.shape) * _width(self.stored)
        length, size = block_sizes(self.target)
        shape = [self.shape[0], self.shape[1] // length * size]
        return "U8", shape, math.prod(shape)


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A fresh folder that becomes `target` when the body is through, and vanishes if it fails.

    Raises ModelUnusable where `target` is more than an empty folder; OSError.
    """
    target = target.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ModelUnusable(f"{target} is there already; name a folder that is not, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    fresh.mkdir()
    try:
        yield fresh
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def in_floats(file: Path, beside: Path, progress: Progress) -> Iterator[Path]:
    """The model of a GGUF file as a folder of float32 beside `beside`, for as long as the body runs.

    Raises ModelUnusable, OSError.
    """
    beside = beside.resolve()
    beside.parent.mkdir(parents=True, exist_ok=True)
    folder = beside.with_name(f".{beside.name}.{os.getpid()}.float32.tmp")
    folder.mkdir()
    try:
        convert_gguf(file, folder, progress, keep_blocks=False)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def convert_gguf(file: Path, folder: Path, progress: Progress, *, keep_blocks: bool) -> None:
    """The model of a GGUF file into the empty `folder`. Raises ModelUnusable, OSError."""
    from services.inference.gguf_model import UnknownLayout, convert

    try:
        convert(file, folder, {}, progress, keep_blocks=keep_blocks)
    except UnknownLayout as error:
        raise ModelUnusable(f"{file} is not known: {error}") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelUnusable(f"{file} is no GGUF file that can be read: {error!r}") from error


def check_source(source: Path) -> None:
    """Raises ModelUnusable, with what to do, where `source` is no folder that `write_blocks` can read."""
    if not source.is_dir():
        raise ModelUnusable(f"there is no folder {source}")
    if not (source / "config.json").is_file():
        raise ModelUnusable(f"{source} has no config.json; a source is a model's folder, or a .gguf file")
    if not any(source.glob("*.safetensors")):
        raise ModelUnusable(f"{source} has no *.safetensors; other formats are not read, but a .gguf file is")
    config = read_config(source)
    check_family(config.get("model_type"))
    formats = block_formats(config)
    if formats:
        raise ModelUnusable(
            f"{source} is in blocks already ({', '.join(sorted(set(formats.values())))}), and to round them "
            "once more would make them worse; name the folder or the .gguf file that it was made from"
        )
    if config.get("quantization_config"):
        raise ModelUnusable(
            f"{source} is quantised already, in another way (quantization_config in its config.json); "
            "name the model's folder in float32, bfloat16 or float16"
        )


def write_blocks(source: Path, folder: Path, to: str, progress: Progress) -> list[Written]:
    """The model in `source` into the empty `folder`, its matrices in blocks of the format `to`.

    With 4 bits the embedding and the head get 8, as most GGUF files have it. Raises ModelUnusable, OSError.
    """
    check_source(source)
    written: list[Written] = []
    with tensor_readers(source) as readers:
        plans = _plans(source, readers, to)
        # Wider numbers first, so that all lie at multiples of their size.
        plans.sort(key=lambda plan: (-_width(plan.header[0]), plan.name))
        formats = {plan.name: plan.target for plan in plans if plan.target}
        if not formats:
            raise ModelUnusable(f"nothing to quantise: no matrix in {source} has rows of a multiple of 32")
        total = sum(math.prod(plan.shape) for plan in plans)
        done = 0
        with (folder / "model.safetensors").open("wb") as stream:
            _write_header(stream, plans)
            for plan in plans:
                progress(100 * done // total, f"quantising {plan.name}")
                written.append(_write(stream, readers[plan.name], plan))
                done += math.prod(plan.shape)
    config = read_config(source) | {
        "quantization_config": {"quant_method": QUANT_METHOD, "formats": dict(sorted(formats.items()))}
    }
    content = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(content + "\n", encoding="utf-8")
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    progress(100, "checking that the result can be loaded")
    load_stored(folder)
    return written


def read_written(folder: Path) -> list[Written]:
    """What a folder holds that was not rounded here."""
    formats = block_formats(read_config(folder))
    with tensor_readers(folder) as readers:
        plans = _plans(folder, readers, None)
    return [_kept(plan, formats) for plan in plans]


def _plans(folder: Path, readers: Mapping[str, Any], to: str | None) -> list[_Plan]:
    """`to`: the format that matrices get where they can; None: all stay."""
    ending = "embed_tokens.weight"
    embeddings = [name for name in readers if name.endswith(ending)]
    if len(embeddings) != 1:
        raise ModelUnusable(f"{len(embeddings)} tensors in {folder} are named *{ending}, not one")
    # A language model inside a larger one has a longer prefix, and what is beside it (eyes, mostly) stays.
    prefix = embeddings[0].removesuffix(ending)
    plans = []
    for name in sorted(readers):
        whole = name.endswith("lm_head.weight") or name in embeddings
        inner = _PROJECTION.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
        piece = readers[name].get_slice(name)
        shape, stored = list(piece.get_shape()), str(piece.get_dtype())
        plan = _Plan(name, stored, shape, len(shape) == 2 and bool(whole or inner), None)
        if to is not None and plan.matrix:
            target = "Q8_0" if whole else to
            if stored not in _PLAIN:
                known = ", ".join(_PLAIN.values())
                raise ModelUnusable(f"{name} is stored as {stored}; only {known} can be quantised")
            if shape[1] % block_sizes(target)[0] == 0:
                plan = replace(plan, target=target)
        plans.append(plan)
    return plans


def _write_header(stream: BinaryIO, plans: list[_Plan]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for plan in plans:
        kind, shape, size = plan.header
        header[plan.name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    stream.write(len(content).to_bytes(8, "little") + content)


def _write(stream: BinaryIO, reader: Any, plan: _Plan) -> Written:
    if plan.target is None:
        _write_bytes(stream, reader.get_tensor(plan.name))
        return _kept(plan, {})
    rows, columns = plan.shape
    step = max(1, _NUMBERS_AT_ONCE // columns)
    matrix = reader.get_slice(plan.name)
    noise = power = 0.0
    for start in range(0, rows, step):
        values = matrix[start : start + step].float()
        if not values.isfinite().all():
            raise ModelUnusable(f"{plan.name} holds what is not a number")
        try:
            blocks = quantise(values, plan.target)
        except ModelUnusable as error:
            raise ModelUnusable(f"{plan.name}: {error}") from error
        _write_bytes(stream, blocks.data)
        noise += _energy(dequantise(blocks) - values)
        power += _energy(values)
    off = math.sqrt(noise / power) if power else 0.0
    return Written(plan.name, plan.target, rows * columns, plan.header[2], matrix=True, error=off)


def _kept(plan: _Plan, formats: Mapping[str, str]) -> Written:
    """`formats`: of tensors that are blocks in the source already."""
    _, _, size = plan.header
    numbers, kind = math.prod(plan.shape), formats.get(plan.name)
    if kind is not None:
        length, width = block_sizes(kind)
        numbers = size // width * length
    return Written(plan.name, kind or _PLAIN.get(plan.stored, plan.stored), numbers, size, plan.matrix, None)


def _write_bytes(stream: BinaryIO, values: Tensor) -> None:
    content: npt.NDArray[np.uint8] = values.contiguous().reshape(-1).view(torch.uint8).numpy()
    stream.write(content.data)


def _energy(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


def _width(stored: str) -> int:
    """Bytes of a number by safetensors' name: the digits at its end are bits, save in the kinds of float8."""
    if stored.startswith("F8") or stored == "BOOL":
        return 1
    return int(re.sub(r"\D", "", stored)) // 8
