"""`python -m services.inference.quantise SOURCE TARGET --to Q8_0`; `llmos quantize` is the same.

What was made goes to stdout, progress and errors to stderr. Exit codes: 0; 1 failed; 2 what was given cannot
be used; 128 and the number of a signal.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from services.inference.models import ModelUnusable
from services.inference.quantise import report
from services.inference.quantise.comparison import compare, pieces_of, read_text
from services.inference.quantise.folder import (
    FORMATS,
    KEEP,
    appearing,
    check_source,
    convert_gguf,
    in_floats,
    read_written,
    write_blocks,
)
from services.inference.settings import InferenceSettings

FAILED, UNUSABLE, SIGNALLED = 1, 2, 128


class Progress:
    """Percentages on stderr: one line that changes on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._changes = sys.stderr.isatty()
        self._ten = -1

    def __call__(self, percent: int, text: str) -> None:
        if self._changes:
            sys.stderr.write(f"\r\x1b[K{percent:3} % {text[:100]}")
        elif percent // 10 != self._ten:
            sys.stderr.write(f"{percent:3} % {text}\n")
        self._ten = percent // 10
        sys.stderr.flush()

    def clear(self) -> None:
        """So that something else can be said."""
        if self._changes:
            sys.stderr.write("\r\x1b[K")
        self._ten = -1


def quantise(source: Path, target: Path, to: str | None, text: Path | None, progress: Progress) -> None:
    """Makes the folder and prints what it is. Raises ModelUnusable, OSError."""
    is_file = source.suffix == ".gguf"
    if to is None:
        if not is_file:
            raise ModelUnusable(f"say which blocks to make: --to {', '.join(FORMATS)}")
        to = KEEP
    if is_file and not source.is_file():
        raise ModelUnusable(f"there is no file {source}")
    if not is_file and to == KEEP:
        raise ModelUnusable("only a .gguf file has blocks to keep")
    if not is_file:
        check_source(source)
    content = None if text is None else read_text(text)
    with ExitStack() as stack:
        # A text is computed when the target is complete, with what it was made from.
        with appearing(target) as fresh:
            if to == KEEP:
                convert_gguf(source, fresh, progress, keep_blocks=True)
                floats, written = target, read_written(fresh)
                pieces = None if content is None else pieces_of(fresh, content)
            else:
                floats = stack.enter_context(in_floats(source, target, progress)) if is_file else source
                pieces = None if content is None else pieces_of(floats, content)
                written = write_blocks(floats, fresh, to, progress)
        files = [source] if is_file else source.glob("*.safetensors")
        progress.clear()
        _say(report.sizes(target, written, sum(file.stat().st_size for file in files)))
        _say(report.errors(written))
        if text is not None and pieces is not None:
            cache = InferenceSettings().models_path / "native"
            found = compare(floats, target, pieces, cache, progress)
            progress.clear()
            _say(report.comparison(found, text))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="llmos quantize", description="Makes a model folder whose matrices are quantised blocks."
    )
    parser.add_argument("source", type=Path, help="a model's folder of safetensors, or a .gguf file")
    parser.add_argument("target", type=Path, help="the folder to make; it must not exist, or be empty")
    parser.add_argument(
        "--to", choices=[*FORMATS, KEEP], help=f"the blocks; {KEEP}: a .gguf file's own, its default"
    )
    parser.add_argument("--text", type=Path, help="a text of which source and result are compared")
    asked = parser.parse_args(arguments)
    progress = Progress()
    try:
        quantise(asked.source, asked.target, asked.to, asked.text, progress)
    except (ModelUnusable, OSError) as error:
        progress.clear()
        sys.stderr.write(f"error: {error}\n")
        return UNUSABLE if isinstance(error, ModelUnusable) else FAILED
    return 0


def until_stopped(run: Callable[[], int]) -> int:
    """Runs to the end, or until SIGINT or SIGTERM, whose default would leave a half-made folder behind."""
    stopped: list[int] = []

    def stop(number: int, _: object) -> None:
        stopped.append(SIGNALLED + number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        return run()
    except BaseException:
        # A library that was interrupted may have made another exception of it.
        if not stopped:
            raise
        sys.stderr.write("\n")
        return stopped[0]


def _say(text: str) -> None:
    if text:
        sys.stdout.write(f"{text}\n\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(until_stopped(main))
