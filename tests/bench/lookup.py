"""`make bench-lookup`: prompt lookup at one stream, beside the same engine without it.

Two tasks: a text that is to be said again, which lookup is made for, and random words at temperature 1, where
guesses should cost nothing (greedy answers to them repeat themselves). Answers have to be the same.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from deploy.dev.environment import ROOT
from services.inference.models import ModelUnusable
from services.inference.settings import InferenceSettings
from tests.bench import report
from tests.bench.alone import Alone
from tests.bench.figures import Aim, Spread, ratio, rounds_from
from tests.bench.progress import Progress
from tests.bench.rounds import one
from tests.bench.work import CannotMeasure, Work

EXIT_MEASURED, EXIT_COULD_NOT = 0, 2
EXTRACTIVE_AIM, OTHER_AIM = 1.8, 0.95
TEXT_WORDS, MAX_TOKENS = 120, 96
AGAIN = "Here is the same text once more, word for word:"
TEMPERATURES = {"extractive": 0.0, "other": 1.0}
WITH, WITHOUT = "with", "without"


def extractive(rounds: int) -> Iterator[Work]:
    """Pieces of this repository's guides, each to be said again."""
    guides = sorted((ROOT / "docs").glob("*.md"))
    words = " ".join(file.read_text() for file in guides).split()
    for index in range(rounds):
        begin = index * TEXT_WORDS % (len(words) - TEXT_WORDS)
        text = " ".join(words[begin : begin + TEXT_WORDS])
        yield Work((f"{text}\n\n{AGAIN}\n\n",), MAX_TOKENS)


def other(rounds: int, seed: str) -> Iterator[Work]:
    """Random words."""
    for index in range(rounds):
        yield Work.make(
            1,
            f"{seed}/{index}",
            prompt_tokens=100,
            max_tokens=MAX_TOKENS,
            count=lambda text: len(text.split()),
        )


async def bench(rounds: int, folder: Path, say: Progress) -> None:
    machine, seed = report.machine(), f"{time.time_ns()}"
    say(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before'][0]}; seed {seed}")
    models = Path(os.environ.get("LLMOS_MODELS_DIR") or ROOT / ".state" / "models")
    engines = {
        name: Alone(
            InferenceSettings(models_dir=models, state_dir=folder / name, prompt_lookup_tokens=tokens)
        )
        for name, tokens in ((WITH, 6), (WITHOUT, 0))
    }
    rates: dict[str, dict[str, list[float]]] = {}
    try:
        for engine in engines.values():
            await engine.start()
        for task, works in (("extractive", extractive(rounds)), ("other", other(rounds, seed))):
            found = rates.setdefault(task, {name: [] for name in engines})
            for engine in engines.values():
                engine.temperature = TEMPERATURES[task]
            for index, work in enumerate(works):
                answers = {}
                for name in sorted(engines, reverse=bool(index % 2)):
                    batch = await one(engines[name], work)
                    (stream,) = batch.streams
                    answers[name] = stream.token_ids
                    # The prompt is not what lookup is about.
                    found[name].append((stream.tokens - 1) / (stream.last_s - stream.first_s))
                if answers[WITH] != answers[WITHOUT]:
                    raise CannotMeasure(f"the answers differ in round {index} of {task}")
                say(f"{task} {index + 1}/{rounds}: " + ", ".join(f"{n} {found[n][-1]:.0f}" for n in found))
    finally:
        for engine in engines.values():
            await engine.stop()
    targets = {"extractive": EXTRACTIVE_AIM, "other": OTHER_AIM}
    aims = [
        Aim(f"prompt_lookup_{task}", ratio(found[WITH], found[WITHOUT]), targets[task])
        for task, found in rates.items()
    ]
    path = report.write(
        "lookup", {"machine": machine, "tokens_per_s": rates, "aims": [a.line() for a in aims]}
    )
    say(f"raw rounds: {path.relative_to(ROOT)}")
    table = Table("task", *engines, title="Tokens/s after the first token, medians (least..greatest)")
    for task, found in rates.items():
        table.add_row(task, *(str(Spread.of(found[name])) for name in engines))
    report.show([table], aims)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.lookup", description=__doc__)
    parser.add_argument("--rounds", type=rounds_from, default=15)
    given = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="llmos-bench-") as folder:
            asyncio.run(bench(given.rounds, Path(folder), Progress()))
    except (CannotMeasure, ModelUnusable) as error:
        print(f"Could not measure: {error}", file=sys.stderr)
        return EXIT_COULD_NOT
    return EXIT_MEASURED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
