"""`make bench-engine`: the platform beside our engine alone and beside the engines of others."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop
from tokenizers import Tokenizer

from deploy.dev.ports import PortReservations
from services.inference.models import ModelUnusable
from services.inference.settings import InferenceSettings
from tests.bench import check, goodput, report, rounds
from tests.bench.aims import PREFIX_TOKENS, aims
from tests.bench.alone import Alone
from tests.bench.anchors import CHECK_PROMPTS, anchors
from tests.bench.options import Options, arguments
from tests.bench.progress import Progress
from tests.bench.rounds import Plan, PrefixRound
from tests.bench.subject import Subject
from tests.bench.through_gateway import Platform
from tests.bench.through_http import PlatformOverHttp
from tests.bench.weights import Weights, weights
from tests.bench.work import CannotMeasure, Work
from tests.framework import broker as brokers
from tests.framework.mesh import CannotStart, MeshHarness
from tests.framework.models import ROOT

EXIT_MEASURED, EXIT_COULD_NOT = 0, 2
CHECK_TOKENS = 24
CHOICE_TOKENS = 16
IDLE_S = 2.0
REPEATS = 2
"""Of a batch that others disturb."""


@contextlib.asynccontextmanager
async def platform(
    options: Options, given: Weights, folder: Path, say: Progress
) -> AsyncIterator[list[Platform]]:
    """A mesh with the real broker, auth and audit on, and the ways to ask it."""
    reservations = PortReservations()
    broker = brokers.prepare(folder / "kafka", reservations)
    mesh = MeshHarness(folder / "mesh", broker, reservations)
    most = max(options.levels)
    # The defaults suit a machine that others share; here all streams are to run at once.
    mesh.configure(
        "inference",
        backend=None,  # the service's own default, not the echo that tests run
        model_path=given.folder,
        dtype=given.dtype,
        device=options.device,
        max_running=max(16, most),
        max_waiting=max(64, most),
    )
    try:
        say("starting the broker and the platform")
        broker.start()
        await broker.wait_ready()
        ways = {"platform": PlatformOverHttp, "grpc": Platform}
        # Tenants, since all get the same prompts: none is to find them in a cache.
        yield [
            way(mesh, given.folder.name, tenant=f"over-{name}")
            for name, way in ways.items()
            if name in options.subjects
        ]
    finally:
        await mesh.close()
        if broker.process.running:
            broker.kill()
        broker.process.end_group()
        reservations.release()


def alone(options: Options, given: Weights, folder: Path) -> Alone:
    most = max(options.levels)
    settings = InferenceSettings(
        model_path=given.folder,
        dtype=given.dtype,
        device=options.device,
        state_dir=folder / "alone",
        max_running=max(16, most),
        max_waiting=max(64, most),
    )
    return Alone(settings)


async def warm_up(subject: Subject, plan: Plan, say: Progress) -> None:
    """Starts it, lets it do one batch of each size that is not counted, and lets it rest."""
    say(f"starting {subject.name}")
    await subject.start()
    for level in plan.levels:
        work = Work(plan.work(level, f"warm-up {subject.name}").prompts, min(4, plan.max_tokens))
        await rounds.one(subject, work)


async def bench(options: Options, folder: Path, say: Progress) -> None:
    begun_s = time.monotonic()
    models_dir = Path(os.environ.get("LLMOS_MODELS_DIR") or ROOT / ".state" / "models")
    given = weights(options, models_dir, say)
    tokenizer = Tokenizer.from_file(str(given.folder / "tokenizer.json"))
    plan = Plan(
        levels=options.levels,
        rounds=options.rounds,
        prompt_tokens=options.prompt_tokens,
        max_tokens=options.max_tokens,
        count=lambda text: len(tokenizer.encode(text).ids),
        seed=f"{time.time_ns()}",
        repeats=REPEATS,
        until_s=begun_s + options.budget_s,
    )
    machine = report.machine()
    say(
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before'][0]};"
        f" {options.precision} on {options.device}; seed {plan.seed}"
    )
    async with contextlib.AsyncExitStack() as stack:

        async def take(subject: Subject) -> Subject:
            stack.push_async_callback(subject.stop)
            await warm_up(subject, plan, say)
            return subject

        ports = PortReservations()
        stack.callback(ports.release)
        beside = anchors(options, given, tokenizer, folder, ports, say)
        ours: list[Subject] = []
        whole: Platform | None = None
        await take(beside.reference)
        say(f"{beside.reference.name}: {beside.reference.chosen}")
        if options.subjects & {"platform", "grpc"}:
            ways = await stack.enter_async_context(platform(options, given, folder, say))
            whole = ways[0]
            ours += [await take(way) for way in ways]
        if "alone" in options.subjects:
            ours.append(await take(alone(options, given, folder)))
        for subject in beside.others:
            await take(subject)
        choice: dict[int, Subject] = {}
        if options.blocks:
            choice = await rounds.faster(
                beside.ways, plan, say, most=max(plan.levels), tokens=plan.max_tokens
            )
        elif beside.ways:
            # Beyond a few streams it is the same question.
            choice = await rounds.faster(beside.ways, plan, say, most=8, tokens=CHOICE_TOKENS)

        work = Work(plan.work(CHECK_PROMPTS, "check").prompts, min(CHECK_TOKENS, plan.max_tokens))
        shares = await check.compare(
            beside.reference,
            [*ours, *beside.others],
            work,
            exact=options.precision == "float32",
            decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
        )
        agreed = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
        say(f"tokens that agree with those of {beside.reference.name}: {agreed}")
        resting = await rounds.idle(whole, IDLE_S) if whole is not None else 0.0
        say(f"the platform takes {resting:.3f} CPU seconds per second while it rests")

        by_level = {
            level: [*ours, *beside.always, *([choice[level]] if choice else [])] for level in plan.levels
        }
        found = await rounds.measure(by_level, plan, say)
        cached: list[PrefixRound] = []
        good: list[tuple[goodput.Goodput, goodput.Goodput]] = []
        if whole is not None:
            cached = await rounds.prefixes(whole, plan, prefix_tokens=PREFIX_TOKENS, say=say)
        if whole is not None and beside.vllm is not None:
            # At a rate that the platform's own rate with the most streams allows.
            most_per_s = statistics.median(found.rates(max(plan.levels), whole.name)) / plan.max_tokens
            good = await goodput.measure(whole, beside.vllm, plan, goodput.LOAD * most_per_s, say)
    made = aims(found, cached, options.precision)
    if good:
        made.append(goodput.aim(good, "vllm"))
    content: dict[str, Any] = {
        "machine": machine,
        "dtype": options.precision,
        "device": options.device,
        "model": given.folder.name,
        "prompt_tokens": options.prompt_tokens,
        "max_tokens": options.max_tokens,
        "chosen": {beside.reference.name: beside.reference.chosen},
        "agreement": shares,
        "idle_cpu_s_per_s": resting,
        "rounds": report.raw(found),
        "prefix": [{"cold_s": each.cold_s, "cached_s": each.cached_s} for each in cached],
        "goodput": [[asdict(each) for each in both] for both in good],
        "aims": [aim.line() for aim in made],
    }
    path = report.write("engine", content)
    say(f"raw rounds: {path.relative_to(ROOT)}. {report.disturbance(found)}")
    report.show([report.table(found), report.cpu_table(found)], made)


def main(argv: Sequence[str]) -> int:
    say = Progress()
    try:
        options = arguments(argv)
        with tempfile.TemporaryDirectory(prefix="llmos-bench-") as folder:
            uvloop.run(bench(options, Path(folder), say))
    except (CannotMeasure, CannotStart, ModelUnusable) as error:
        print(f"Could not measure: {error}", file=sys.stderr)
        return EXIT_COULD_NOT
    except BaseExceptionGroup as group:
        print(f"Could not measure: {'; '.join(str(error) for error in group.exceptions)}", file=sys.stderr)
        return EXIT_COULD_NOT
    return EXIT_MEASURED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
