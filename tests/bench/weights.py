"""The same model in each precision: the folder that we serve, and the GGUF file that llama.cpp reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from services.inference.gguf_model import convert
from services.inference.models import (
    PACKAGED_MODEL_ID,
    PACKAGED_SAMPLING,
    open_cached,
    open_packaged,
    packaged_gguf,
)
from tests.bench.options import Options

Say = Callable[[str], None]
FILE = "model-q8_0.gguf"


@dataclass(frozen=True, slots=True)
class Weights:
    """What the subjects are given."""

    folder: Path
    dtype: str
    """As inference is told it."""
    gguf: Path | None
    """The same blocks; None where the weights are numbers."""


def weights(options: Options, models_dir: Path, say: Say) -> Weights:
    """Made once, then from `models_dir`. Raises ModelUnusable, OSError."""
    match options.precision:
        case "q4":
            return Weights(open_packaged(models_dir, say).path.resolve(), "stored", packaged_gguf())
        case "q8":
            folder = _in_8_bits(models_dir, say).resolve()
            return Weights(folder, "stored", folder / FILE)
        case _:
            folder = options.model or open_packaged(models_dir, say, keep_blocks=False).path
            return Weights(folder.resolve(), options.precision, None)


def _in_8_bits(models_dir: Path, say: Say) -> Path:
    packaged = packaged_gguf()

    def make(folder: Path) -> None:
        say("making the model in Q8_0, once")
        requantise(packaged, folder / FILE)
        convert(folder / FILE, folder, PACKAGED_SAMPLING, lambda percent, text: None, keep_blocks=True)

    source = f"Q8_0 of {packaged.name}/{packaged.stat().st_size}"
    return open_cached(models_dir / f"{PACKAGED_MODEL_ID}-q8_0", source, make, say).path


def requantise(source: Path, target: Path) -> None:
    """The same model with each matrix in Q8_0; vectors and what is known of the model stay."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, *parts = field.types
        writer.add_key_value(name, field.contents(), kind, sub_type=parts[-1] if parts else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    eight_bits = gguf.GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, np.asarray(numbers, dtype=np.float32))
        else:
            writer.add_tensor(tensor.name, gguf.quantize(numbers, eight_bits), raw_dtype=eight_bits)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
