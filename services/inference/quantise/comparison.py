"""What the target still knows of a text, beside its source in float32: both compute it, by the same step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from services.inference.engine.kv_cache import pages_for
from services.inference.engine.model.loader import load_stored, load_weights
from services.inference.engine.model.torch_step import TorchStep
from services.inference.engine.native.build import NativeUnavailable
from services.inference.engine.native.library import Library, load_native
from services.inference.engine.native.parts import Weights
from services.inference.engine.native.step import NativeStep
from services.inference.engine.tokenizer_files import FileTokenizer
from services.inference.models import ModelUnusable, read_config
from services.inference.quantise.folder import Progress
from services.inference.quantise.precision import (
    WINDOW_TOKENS,
    Predictions,
    agreement,
    predict,
    windows,
)

MOST_TOKENS = 5000
_MOST_CHARACTERS = 200_000
"""Read of a text: more than enough for so many tokens."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of the target with its source."""

    tokens: int
    agreement: float
    """At how many positions, of 1, both hold the same token for the likeliest."""
    perplexity_before: float
    perplexity_after: float
    natively: bool
    """Whether the target's blocks were computed with as they are; else the numbers that they stand for."""


def read_text(file: Path) -> str:
    """Raises ModelUnusable."""
    try:
        with file.open(encoding="utf-8") as stream:
            return stream.read(_MOST_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelUnusable(f"{file} cannot be read as text in UTF-8: {error}") from error


def pieces_of(folder: Path, text: str) -> list[list[int]]:
    """The text's first MOST_TOKENS tokens in windows, by the folder's tokenizer.

    Raises ModelUnusable, OSError.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ModelUnusable(f"{folder} has no tokenizer.json, without which no text can be computed")
    try:
        tokenizer = FileTokenizer(folder)
    except (ValueError, jinja2.TemplateError) as error:
        raise ModelUnusable(f"{folder}: {error}") from error
    # What the model expects at the beginning of a text, such as Gemma's <bos>.
    (first, *_), begun = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    config = read_config(folder)
    context: int = (config.get("text_config") or config).get("max_position_embeddings") or WINDOW_TOKENS
    pieces = windows(
        tokenizer.encode(text, add_special_tokens=False)[:MOST_TOKENS],
        size=min(WINDOW_TOKENS, context),
        before=begun[: begun.index(first)],
    )
    if not pieces:
        raise ModelUnusable("the text is too short: it has less than two tokens")
    return pieces


def compare(
    source: Path, target: Path, pieces: Sequence[Sequence[int]], cache_dir: Path, progress: Progress
) -> Comparison:
    """`source` and `target` are folders; the native library is looked for, and built, in `cache_dir`.

    Raises ModelUnusable, OSError.
    """
    library: Library | None
    try:
        library = _library(cache_dir, lambda text: progress(0, text))
        before, after = _both(source, target, pieces, library, progress)
    except NativeUnavailable as error:
        progress(0, f"torch computes, more slowly: {error}")
        library = None
        before, after = _both(source, target, pieces, library, progress)
    except ValueError as error:
        raise ModelUnusable(f"the text cannot be computed: {error}") from error
    return Comparison(
        tokens=len(before.likeliest),
        agreement=agreement(before, after),
        perplexity_before=before.perplexity,
        perplexity_after=after.perplexity,
        natively=library is not None,
    )


def _library(cache_dir: Path, say: Callable[[str], None]) -> Library:
    if cache_dir.is_dir():
        return load_native(cache_dir, say)
    # Nothing is left where nothing was. Once the library is loaded, its file is not needed.
    with tempfile.TemporaryDirectory(prefix="llmos-native-") as folder:
        return load_native(Path(folder), say)


def _both(
    source: Path,
    target: Path,
    pieces: Sequence[Sequence[int]],
    library: Library | None,
    progress: Progress,
) -> tuple[Predictions, Predictions]:
    """One after the other: only one model is in memory."""

    def tell(start: int, name: str) -> Callable[[int, int], None]:
        return lambda done, of: progress(start + 50 * done // of, f"computing the text with the {name}")

    before = _computed(source, pieces, library, tell(0, "source"), stored=False)
    return before, _computed(target, pieces, library, tell(50, "target"), stored=True)


def _computed(
    folder: Path,
    pieces: Sequence[Sequence[int]],
    library: Library | None,
    tell: Callable[[int, int], None],
    *,
    stored: bool,
) -> Predictions:
    """`stored`: with the folder's blocks, as they are served; else, and always in torch, in float32."""
    if library is None:
        return predict(
            TorchStep(load_weights(folder, "float32"), pages=pages_for(WINDOW_TOKENS)), pieces, tell
        )
    weights: Weights = load_stored(folder) if stored else load_weights(folder, "float32")
    step = NativeStep(weights, library, pages=pages_for(WINDOW_TOKENS))
    # It has packed them.
    del weights
    try:
        return predict(step, pieces, tell)
    finally:
        step.close()
