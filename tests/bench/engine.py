"""`make bench-engine`: the platform beside our engine alone, transformers' `generate` and its server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from services.inference.models import ModelUnusable, open_packaged
from services.inference.settings import InferenceSettings
from tests.bench import check, report, rounds
from tests.bench.alone import Alone
from tests.bench.figures import Aim, ratio
from tests.bench.generate import Generate
from tests.bench.progress import Progress
from tests.bench.rounds import Plan, PrefixRound, Rounds
from tests.bench.serve import Serve
from tests.bench.subject import Subject
from tests.bench.through_gateway import Platform
from tests.bench.work import CannotMeasure, Work
from tests.framework import broker as brokers
from tests.framework.mesh import CannotStart, MeshHarness
from tests.framework.models import ROOT
from tests.framework.ports import PortReservations

EXIT_MEASURED, EXIT_COULD_NOT = 0, 2
SUBJECTS = ("platform", "alone", "generate", "serve")
GENERATE_AIMS = {1: 1.0, 8: 1.2, 32: 1.2}
SERVE_AIMS = {1: 4.0, 8: 6.0, 32: 10.0}
ALONE_AIMS = {8: 0.95}
PREFIX_AIM = 0.2
PREFIX_TOKENS = 512
CHECK_PROMPTS = 4
CHECK_TOKENS = 24
IDLE_S = 2.0


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for."""

    model: Path
    dtype: str
    device: str
    levels: tuple[int, ...]
    rounds: int
    prompt_tokens: int
    max_tokens: int
    budget_s: float
    subjects: frozenset[str]


def arguments(argv: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.engine", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", default="1,8,32", help="how many at once, with commas")
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--minutes", type=float, default=12, help="no round begins that would end after it")
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help="with commas; always: generate")
    parser.add_argument("--model", type=Path, help="a folder of safetensors; not given: the packaged model")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args(argv)
    models = Path(os.environ.get("LLMOS_MODELS_DIR") or ROOT / ".state" / "models")
    return Options(
        model=(given.model or open_packaged(models, print, keep_blocks=False).path).resolve(),
        dtype=_dtype(given.dtype, given.device),
        device=given.device,
        levels=tuple(int(level) for level in given.streams.split(",")),
        rounds=given.rounds,
        prompt_tokens=given.prompt_tokens,
        max_tokens=given.max_tokens,
        budget_s=given.minutes * 60,
        subjects=frozenset(given.subjects.split(",")) | {"generate"},
    )


def _dtype(name: str, device: str) -> str:
    """What `auto` is here: what transformers is fast with. All subjects are told the same."""
    if name != "auto":
        return name
    quick = device == "cuda" or "avx512f" in report.machine()["instructions"]
    return "bfloat16" if quick else "float32"


@contextlib.asynccontextmanager
async def platform(options: Options, folder: Path, say: Progress) -> AsyncIterator[Platform]:
    """A mesh with the real broker, auth and audit on."""
    reservations = PortReservations()
    broker = brokers.prepare(folder / "kafka", reservations)
    mesh = MeshHarness(folder / "mesh", broker, reservations)
    most = max(options.levels)
    # The defaults suit a machine that others share; here all streams are to run at once.
    mesh.configure(
        "inference",
        backend=None,  # the service's own default, not the echo that tests run
        model_path=options.model,
        dtype=options.dtype,
        device=options.device,
        max_running=max(16, most),
        max_waiting=max(64, most),
    )
    try:
        say("starting the broker and the platform")
        broker.start()
        await broker.wait_ready()
        yield Platform(mesh, options.model.name)
    finally:
        await mesh.close()
        if broker.process.running:
            broker.kill()
        broker.process.end_group()
        reservations.release()


def alone(options: Options, folder: Path) -> Alone:
    most = max(options.levels)
    settings = InferenceSettings(
        model_path=options.model,
        dtype=options.dtype,
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


async def faster(servers: Sequence[Subject], plan: Plan, say: Progress) -> dict[int, Subject]:
    """Which way of serving is the faster one, by level: the anchor is what its makers' best option gives."""
    best: dict[int, Subject] = {}
    for level in plan.levels:
        # Beyond a few streams it is the same question.
        asked = min(level, 8)
        if asked in best:
            best[level] = best[asked]
            continue
        work = Work(plan.work(asked, "choice").prompts, min(16, plan.max_tokens))
        rates = {server.name: (await rounds.one(server, work)).tokens_per_s for server in servers}
        best[level] = best[asked] = max(servers, key=lambda server: rates[server.name])
        say(f"`transformers serve`, {level} streams: " + ", ".join(f"{n} {r:.1f}" for n, r in rates.items()))
    return best


def aims(found: Rounds, cached: Sequence[PrefixRound]) -> list[Aim]:
    """Those that this run can speak about."""
    made: list[Aim] = []
    for name, others, targets in (
        ("generate", ("generate",), GENERATE_AIMS),
        ("serve", ("serve", "serve batching"), SERVE_AIMS),
        ("engine_alone", ("engine alone",), ALONE_AIMS),
    ):
        for level in found.batches:
            base = found.rates(level, "platform")
            for other in others:
                rates = found.rates(level, other)
                if base and rates and level in targets:
                    made.append(Aim(f"platform_vs_{name}_{level}", ratio(base, rates), targets[level]))
    if cached:
        measured = ratio([each.cached_s for each in cached], [each.cold_s for each in cached])
        made.append(Aim(f"cached_prefix_ttft_{PREFIX_TOKENS}", measured, PREFIX_AIM, at_most=True))
    return made


async def bench(options: Options, folder: Path, say: Progress) -> None:
    begun_s = time.monotonic()
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    plan = Plan(
        levels=options.levels,
        rounds=options.rounds,
        prompt_tokens=options.prompt_tokens,
        max_tokens=options.max_tokens,
        count=lambda text: len(tokenizer.encode(text).ids),
        seed=f"{time.time_ns()}",
        until_s=begun_s + options.budget_s,
    )
    machine = report.machine()
    say(
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before'][0]};"
        f" {options.dtype} on {options.device}; seed {plan.seed}"
    )
    async with contextlib.AsyncExitStack() as stack:

        async def take(subject: Subject) -> Subject:
            stack.push_async_callback(subject.stop)
            await warm_up(subject, plan, say)
            return subject

        generate = Generate(options.model, options.dtype, options.device)
        ours: list[Subject] = []
        whole: Platform | None = None
        servers: list[Subject] = []
        await take(generate)
        say(f"generate: {generate.chosen}")
        if "platform" in options.subjects:
            whole = await stack.enter_async_context(platform(options, folder, say))
            ours.append(await take(whole))
        if "alone" in options.subjects:
            ours.append(await take(alone(options, folder)))
        if "serve" in options.subjects:
            reservations = PortReservations()
            stack.callback(reservations.release)
            for batching in (False, True):
                name = f"serve {batching}"
                server = Serve(
                    options.model,
                    options.dtype,
                    options.device,
                    port=reservations.take([name])[name],
                    log_file=folder / "serve.log",
                    batching=batching,
                )
                servers.append(await take(server))
        choice = await faster(servers, plan, say) if servers else {}

        work = Work(plan.work(CHECK_PROMPTS, "check").prompts, min(CHECK_TOKENS, plan.max_tokens))
        shares = await check.compare(
            generate,
            [*ours, *servers],
            work,
            exact=options.dtype == "float32",
            decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
        )
        agreed = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
        say(f"tokens that agree with generate's: {agreed}")
        resting = await rounds.idle(whole, IDLE_S) if whole is not None else 0.0
        say(f"the platform takes {resting:.3f} CPU seconds per second while it rests")

        by_level = {level: [*ours, generate, *([choice[level]] if choice else [])] for level in plan.levels}
        found = await rounds.measure(by_level, plan, say)
        cached: list[PrefixRound] = []
        if whole is not None:
            cached = await rounds.prefixes(whole, plan, prefix_tokens=PREFIX_TOKENS, say=say)
    made = aims(found, cached)
    content: dict[str, Any] = {
        "machine": machine,
        "dtype": options.dtype,
        "device": options.device,
        "model": options.model.name,
        "prompt_tokens": options.prompt_tokens,
        "max_tokens": options.max_tokens,
        "generate": generate.chosen,
        "agreement": shares,
        "idle_cpu_s_per_s": resting,
        "rounds": report.raw(found),
        "prefix": [{"cold_s": each.cold_s, "cached_s": each.cached_s} for each in cached],
        "aims": [aim.line() for aim in made],
    }
    path = report.write("engine", content)
    say(f"raw rounds: {path.relative_to(ROOT)}")
    report.show([report.table(found), report.cpu_table(found)], made)


def main(argv: Sequence[str]) -> int:
    say = Progress()
    try:
        options = arguments(argv)
        with tempfile.TemporaryDirectory(prefix="llmos-bench-") as folder:
            asyncio.run(bench(options, Path(folder), say))
    except (CannotMeasure, CannotStart, ModelUnusable) as error:
        print(f"Could not measure: {error}", file=sys.stderr)
        return EXIT_COULD_NOT
    except BaseExceptionGroup as group:
        print(f"Could not measure: {'; '.join(str(error) for error in group.exceptions)}", file=sys.stderr)
        return EXIT_COULD_NOT
    return EXIT_MEASURED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
