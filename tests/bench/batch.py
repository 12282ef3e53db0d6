"""`make bench-batch`: many prompts as jobs and as a batch file, beside the engine's own time for them."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from deploy.dev.ports import PortReservations
from services.inference.models import ModelUnusable
from services.inference.settings import InferenceSettings
from tests.bench import report, rounds
from tests.bench.alone import Alone
from tests.bench.figures import rounds_from
from tests.bench.options import arguments as engine_arguments
from tests.bench.progress import Progress
from tests.bench.rounds import Plan, Rounds
from tests.bench.subject import Subject
from tests.bench.through_jobs import BatchFile, Jobs
from tests.bench.weights import weights
from tests.bench.work import CannotMeasure, Work
from tests.framework import broker as brokers
from tests.framework.mesh import CannotStart, MeshHarness
from tests.framework.models import ROOT

EXIT_MEASURED, EXIT_COULD_NOT = 0, 2
AIM = 1.1
"""The engine's own time, at most so many times."""
MAX_RUNNING = 16


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times the engine's own time a subject took, round by round."""

    subject: str
    each: tuple[float, ...]

    def line(self) -> str:
        """`aim batch_jobs 1.05 [1.03 - 1.07] <= 1.1 met`"""
        middle = statistics.median(self.each)
        said = "met" if middle <= AIM else "short"
        name = self.subject.replace(" ", "_")
        return f"aim batch_{name} {middle:.3f} [{min(self.each):.3f} - {max(self.each):.3f}] <= {AIM} {said}"


def ratios(found: Rounds, level: int, reference: str) -> list[Ratio]:
    """Of all subjects but the reference, by the time until the last answer."""

    def times(subject: str) -> list[float]:
        batches = found.batches[level][subject]
        return [max(stream.last_s for stream in batch.streams) for batch in batches]

    own = times(reference)
    return [
        Ratio(subject, tuple(late / base for late, base in zip(times(subject), own, strict=True)))
        for subject in found.batches[level]
        if subject != reference
    ]


async def bench(given: argparse.Namespace, folder: Path, say: Progress) -> None:
    options = engine_arguments(["--dtype", given.dtype])
    models_dir = Path(os.environ.get("LLMOS_MODELS_DIR") or ROOT / ".state" / "models")
    model = weights(options, models_dir, say)
    tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    plan = Plan(
        levels=(given.prompts,),
        rounds=given.rounds,
        prompt_tokens=given.prompt_tokens,
        max_tokens=given.max_tokens,
        count=lambda text: len(tokenizer.encode(text).ids),
        seed=f"{time.time_ns()}",
    )
    machine = report.machine()
    say(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before'][0]}; seed {plan.seed}")
    settings = {"model_path": model.folder, "dtype": model.dtype, "max_running": MAX_RUNNING}
    async with contextlib.AsyncExitStack() as stack:
        alone = Alone(InferenceSettings(**settings, max_waiting=given.prompts, state_dir=folder / "alone"))  # type: ignore[arg-type]
        stack.push_async_callback(alone.stop)
        say("starting the engine")
        await alone.start()
        reservations = PortReservations()
        stack.callback(reservations.release)
        broker = brokers.prepare(folder / "kafka", reservations)
        mesh = MeshHarness(folder / "mesh", broker, reservations)
        stack.callback(broker.process.end_group)
        stack.push_async_callback(mesh.close)
        mesh.configure("inference", backend=None, **settings)
        say("starting the broker and the platform")
        broker.start()
        await broker.wait_ready()
        name = model.folder.name
        subjects: list[Subject] = [alone, Jobs(mesh, name), BatchFile(mesh, name)]
        await subjects[1].start()
        for subject in subjects:
            await rounds.one(subject, Work(plan.work(MAX_RUNNING, f"warm-up {subject.name}").prompts, 4))
        found = await rounds.measure({given.prompts: subjects}, plan, say)
    made = ratios(found, given.prompts, alone.name)
    content = {
        "machine": machine,
        "model": model.folder.name,
        "dtype": model.dtype,
        "prompts": given.prompts,
        "prompt_tokens": given.prompt_tokens,
        "max_tokens": given.max_tokens,
        "rounds": report.raw(found),
        "aims": [each.line() for each in made],
    }
    path = report.write("batch", content)
    say(f"raw rounds: {path.relative_to(ROOT)}")
    for each in made:
        print(each.line())


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Ends the program where they make no sense."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.batch", description="Measures batches.")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--rounds", type=rounds_from, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto", help="as bench-engine's")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    say = Progress()
    try:
        with tempfile.TemporaryDirectory(prefix="llmos-bench-") as folder:
            asyncio.run(bench(arguments(argv), Path(folder), say))
    except (CannotMeasure, CannotStart, ModelUnusable) as error:
        print(f"Could not measure: {error}", file=sys.stderr)
        return EXIT_COULD_NOT
    return EXIT_MEASURED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
