"""`make soak`: all kinds of requests against the whole platform for a long time; then, what is left?"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.dev.environment import ROOT
from deploy.dev.ports import PortReservations
from tests.bench import report
from tests.bench.progress import Progress
from tests.bench.rounds import Say
from tests.bench.soak_judgement import Bounds, Trend, trends
from tests.bench.soak_load import Load
from tests.bench.soak_samples import AT_REST, Sampler, write_csv
from tests.bench.tenants import tenants
from tests.framework import broker as brokers
from tests.framework.calls import OUTCOME, Caller
from tests.framework.mesh import CannotStart, MeshHarness
from tests.framework.models import TINY_CONTEXT_TOKENS, TINY_MODEL_ID, make_tiny_model
from tests.framework.waiting import eventually

EXIT_FLAT, EXIT_NOT_FLAT, EXIT_COULD_NOT = 0, 1, 2
TENANTS = ("acorn", "beech", "cedar")
MAX_RUNNING = 12
CLIENTS = 24
KV_CACHE_BYTES = 3 * 2**20
"""Small enough that prefixes are evicted and sequences give way to each other."""
REST_TIMEOUT_S = 20.0


@dataclass(slots=True)
class Verdict:
    """What a soak found."""

    load: Load
    trends: list[Trend]
    complaints: list[str]
    samples: int
    outcomes: dict[str, int] = field(default_factory=dict)


def configure(mesh: MeshHarness, model: Path) -> None:
    """Settings of inference for a soak with the tiny model."""
    mesh.configure(
        "inference",
        backend=None,
        model_path=model,
        dtype="float32",
        max_running=MAX_RUNNING,
        max_waiting=4 * CLIENTS,
        kv_cache_bytes=KV_CACHE_BYTES,
    )


async def soak(
    mesh: MeshHarness,
    model: str,
    *,
    seconds: float,
    every_s: float,
    seed: int,
    say: Say,
    bounds: Bounds,
    csv: Path | None = None,
) -> Verdict:
    """Loads a mesh that runs, notes, waits until all is quiet, and judges."""
    keys = await tenants(mesh, TENANTS)
    load = Load(mesh, model, keys, CLIENTS, seed, too_long_words=2 * TINY_CONTEXT_TOKENS)
    sampler = Sampler(mesh)
    complaints: list[str] = []
    try:
        running = asyncio.create_task(load.run(), name="soak-load")
        end_s = time.monotonic() + seconds
        told_s = 0.0
        while (left_s := end_s - time.monotonic()) > 0 and not running.done():
            await asyncio.wait((running,), timeout=min(every_s, left_s))
            sample = await sampler.take(
                {"requests": len(load.ended), "tokens": load.tokens, "load tasks": len(asyncio.all_tasks())}
            )
            if sample.time_s - told_s >= 30 or not told_s:
                told_s = sample.time_s
                memory = ", ".join(
                    f"{name.removesuffix(' rss_mib')} {value:.0f}"
                    for name, value in sample.values.items()
                    if name.endswith("rss_mib")
                )
                say(f"{len(load.ended)} requests, {load.tokens} tokens; MiB: {memory}")
        load.stop.set()
        await running
        complaints += load.complaints()
        complaints += await at_rest(sampler)
        outcomes = await _outcomes(mesh, load, complaints)
    finally:
        await sampler.close()
    judged = trends(sampler.samples, bounds)
    complaints += [
        f"{trend.name} is not flat: the line rises by {trend.growth:.1f}, median {trend.median:.1f},"
        f" greatest {trend.greatest:.1f}"
        for trend in judged
        if not trend.flat
    ]
    restarts = sampler.samples[-1].values.get("inference llmos_engine_restarts_total", 0)
    if restarts:
        complaints.append(f"the engine was restarted {restarts:.0f} times")
    if csv is not None:
        write_csv(csv, sampler.samples)
    return Verdict(load, judged, complaints, len(sampler.samples), outcomes)


async def at_rest(sampler: Sampler) -> list[str]:
    """Waits until nothing is at work; says what still is."""
    left: dict[str, float] = {}

    async def quiet() -> Any:
        values = (await sampler.metrics("inference")) | (await sampler.metrics("gateway"))
        left.clear()
        left.update({name: values[name] for name in AT_REST if values.get(name)})
        return not left

    with contextlib.suppress(AssertionError):
        await eventually(quiet, timeout_s=REST_TIMEOUT_S)
    return [f"{name} is {value:g} after the end" for name, value in left.items()]


async def _outcomes(mesh: MeshHarness, load: Load, complaints: list[str]) -> dict[str, int]:
    """What the audit log says of the requests: each has exactly one outcome."""
    asked = [ended.request_id for ended in load.ended if ended.request_id]
    if len(set(asked)) != len(asked):
        complaints.append("a request id was given twice")
    try:
        outcomes = await Caller(mesh).outcomes(set(asked), timeout_s=60)
    except AssertionError as error:
        complaints.append(f"the audit log: {error}")
        return {}
    finished = {ended.request_id for ended in load.ended if ended.end == "finished"}
    wrong = [each for each in finished if outcomes[each] != OUTCOME.OUTCOME_SUCCEEDED]
    if wrong:
        complaints.append(
            f"{len(wrong)} requests finished, which the audit log denies, {wrong[0]} for example"
        )
    return outcomes


def show(verdict: Verdict) -> None:
    """Tables for people, then a line for each complaint."""
    console = Console(width=None if Console().is_terminal else 110)
    ends = Table("kind", "ended", "how many", title="Requests", title_justify="left")
    for (kind, end), count in sorted(verdict.load.ends().items()):
        ends.add_row(kind, end, str(count))
    console.print(ends)
    lines = Table(title="After the warm-up", title_justify="left")
    for column in ("", "first", "median", "greatest", "the line rises by", ""):
        lines.add_column(column, justify="right" if column else "left")
    for trend in verdict.trends:
        figures = (trend.first, trend.median, trend.greatest, trend.growth)
        lines.add_row(
            trend.name, *(f"{figure:.1f}" for figure in figures), "flat" if trend.flat else "NOT FLAT"
        )
    console.print(lines)
    for complaint in verdict.complaints:
        print(f"soak: {complaint}")
    print(f"soak {len(verdict.load.ended)} requests: {'SHORT' if verdict.complaints else 'met'}", flush=True)


async def run(minutes: float, every_s: float, seed: int, folder: Path, say: Progress) -> Verdict:
    say(f"seed {seed}, {minutes:g} minutes")
    model = await asyncio.to_thread(make_tiny_model, folder / TINY_MODEL_ID)
    reservations = PortReservations()
    broker = brokers.prepare(folder / "kafka", reservations)
    mesh = MeshHarness(folder / "mesh", broker, reservations)
    configure(mesh, model)
    csv = report.RESULTS / f"soak-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.csv"
    try:
        say("starting the broker and the platform")
        broker.start()
        await broker.wait_ready()
        await mesh.start()
        return await soak(
            mesh,
            TINY_MODEL_ID,
            seconds=minutes * 60,
            every_s=every_s,
            seed=seed,
            say=say,
            bounds=Bounds(),
            csv=csv,
        )
    finally:
        say(f"samples: {csv.relative_to(ROOT)}")
        await mesh.close()
        if broker.process.running:
            broker.kill()
        broker.process.end_group()
        reservations.release()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every", type=float, default=5, help="seconds between samples")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    given = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices; a second thread only waits for the first
    with tempfile.TemporaryDirectory(prefix="llmos-soak-") as folder:
        try:
            verdict = asyncio.run(run(given.minutes, given.every, given.seed, Path(folder), Progress()))
        except CannotStart as error:
            print(f"Could not measure: {error}", file=sys.stderr)
            return EXIT_COULD_NOT
    show(verdict)
    return EXIT_NOT_FLAT if verdict.complaints else EXIT_FLAT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
