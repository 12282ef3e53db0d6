"""What was made, as text: sizes, errors, and how to read a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from services.inference.models import BLOCK_FORMATS
from services.inference.quantise.comparison import Comparison
from services.inference.quantise.folder import Written

_READING = (
    "Read it so: every position counts, also those where several tokens are alike; no rounding keeps",
    "100 %. llmos holds bfloat16 to 98 %, 8 bits to 95 % and a perplexity within 1 %. 4 bits may lose more:",
    "try the result before you serve it. A text like those that the model will read says most.",
)


def sizes(target: Path, written: Sequence[Written], bytes_before: int) -> str:
    """`bytes_before`: of the files that the weights came from."""
    numbers, after = sum(each.numbers for each in written), sum(each.bytes for each in written)
    lines = [
        f"{target}: {numbers / 1e6:,.1f} million weights in {after / 1e6:,.1f} MB, {8 * after / numbers:.2f} "
        f"bits each; before {bytes_before / 1e6:,.1f} MB, {8 * bytes_before / numbers:.2f} bits",
        "",
    ]
    rows = [("format", "tensors", "weights", "bytes")]
    for name in sorted({each.format for each in written}, key=lambda name: (name not in BLOCK_FORMATS, name)):
        of = [each for each in written if each.format == name]
        count, size = sum(each.numbers for each in of), sum(each.bytes for each in of)
        rows.append((name, str(len(of)), f"{count:,}", f"{size:,}"))
    lines += _table(rows)
    left = [each for each in written if each.matrix and each.format not in BLOCK_FORMATS]
    if left:
        lines += [
            "",
            f"{len(left)} matrices are plain numbers, as their rows are no multiple of 32, or their blocks "
            f"of a format that is not served: {', '.join(sorted({each.kind for each in left}))}",
        ]
    return "\n".join(lines)


def errors(written: Sequence[Written]) -> str:
    """For each kind of tensor that was rounded; empty where none was."""
    rows = [("rounded", "tensors", "mean error", "worst", "which is")]
    kinds: dict[str, list[tuple[float, str]]] = {}
    for each in written:
        if each.error is not None:
            kinds.setdefault(each.kind, []).append((each.error, each.name))
    for kind, found in sorted(kinds.items()):
        worst, name = max(found)
        mean = sum(error for error, _ in found) / len(found)
        rows.append((kind, str(len(found)), f"{100 * mean:.3f} %", f"{100 * worst:.3f} %", name))
    if not kinds:
        return ""
    return "\n".join([*_table(rows), "(errors: root mean square, relative to that of the weights)"])


def comparison(found: Comparison, text: Path) -> str:
    """What a text says, and how to read it."""
    change = found.perplexity_after / found.perplexity_before - 1
    lines = [
        f"{found.tokens:,} tokens of {text}, after each of which the source in float32 and the result were",
        f"asked what follows: the likeliest token is the same {100 * found.agreement:.1f} % of the time;",
        f"perplexity {found.perplexity_before:.3f} before, {found.perplexity_after:.3f} after "
        f"({100 * change:+.2f} %).",
        *_READING,
    ]
    if not found.natively:
        lines.append("torch computed it, with what the blocks stand for: the native step cannot be had here.")
    return "\n".join(lines)


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as they need to be; numbers on the right."""
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if rows[-1][column][:1].isdigit() else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
