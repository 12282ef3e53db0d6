"""`make bench-gateway`: what our gateway adds to a request, beside the gateways of others.

`python -m tests.bench.gateway --subjects grpc-all --rounds 1 --short` measures one subject; `--profile FILE`
writes a cProfile of the gateway's process. docs/benchmarks.md says what is compared, and how.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from deploy.dev.environment import ROOT
from deploy.dev.ports import PortReservations
from tests.bench import gateway_figures as figures
from tests.bench import report
from tests.bench.figures import Aim, rounds_from
from tests.bench.gateway_figures import Memory, Round, Streamed, Unary
from tests.bench.gateway_load import MODEL, Job, Target, prompt
from tests.bench.gateway_others import Bare, LiteLlm, Smg, versions
from tests.bench.gateway_pieces import ALL
from tests.bench.gateway_processes import Load, Subject, Upstream
from tests.bench.gateway_subjects import Own, OwnProcess, Platform
from tests.bench.progress import Progress
from tests.bench.subject import cpu_s
from tests.bench.work import CannotMeasure
from tests.framework import broker as brokers
from tests.framework.mesh import CannotStart, MeshHarness

T = TypeVar("T")
EXIT_MEASURED, EXIT_COULD_NOT = 0, 2
OURS = (figures.OURS, figures.ALL_ON, figures.OFF)
SUBJECTS = (*OURS, figures.BARE, figures.LITELLM, figures.SMG)
PRICE, MEMORY = "price", "memory"
SWITCHED_ON = ("telemetry", "auth", "authorisation", "limits", "admission", "audit", "cache")
"""One after the other, in the table of prices."""
TOKEN, KEY, MISS = (
    "auth: an access token",
    "auth: an API key in its place",
    "cache: a greedy request, not found",
)


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured: many short rounds, for a host is seldom as fast as a minute before."""

    rounds: int = 15
    alone_s: float = 0.5
    loaded_s: float = 1.0
    warm_s: float = 0.2
    words: int = 16
    """Of a unary call's prompt, and of its answer."""
    streamed_words: int = 200
    streams: int = 8
    memory_requests: int = 10_000
    memory_later_s: float = 10.0

    @classmethod
    def short(cls, rounds: int) -> Size:
        return cls(rounds, alone_s=0.25, loaded_s=0.5, memory_requests=2_000, memory_later_s=2.0)


class Bench:
    """The subjects, and the process that asks them."""

    def __init__(self, load: Load, size: Size, say: Progress) -> None:
        self._load, self._size, self._say = load, size, say

    async def check(self, subjects: Sequence[Subject]) -> None:
        """All have to say the same. Raises CannotMeasure."""
        size = self._size
        for subject in subjects:
            through, behind = await subject.target(), await subject.behind()
            for job in (
                Job(behind, MODEL, size.words),
                Job(through, MODEL, size.words),
                Job(through, subject.light_model, size.words),
                Job(through, subject.light_model, size.streamed_words, streamed=True),
            ):
                said = (await self._run(subject, job))["text"]
                # The last word is a number, which is another one each time.
                if said.split()[:-1] != prompt(job.words).split()[:-1] or len(said.split()) != job.words:
                    raise CannotMeasure(f"{subject.name} says {said[:200]!r}")
            subject.rest()

    async def round(self, subjects: Sequence[Subject]) -> dict[str, Round]:
        """All that is measured in one round, part by part: what is compared lies seconds apart, for a host
        may be slow for a while."""
        alone = await self._in_turn(subjects, self._alone)
        at_16 = await self._in_turn(subjects, self._at_16)
        at_32 = await self._in_turn(subjects, self._at_32)
        streamed = await self._in_turn(subjects, self._streamed)
        return {name: Round(*alone[name], *at_16[name], at_32[name], streamed[name]) for name in alone}

    async def _in_turn(
        self, subjects: Sequence[Subject], part: Callable[[Subject], Awaitable[T]]
    ) -> dict[str, T]:
        """Each is warmed, and rests while others are measured."""
        found: dict[str, T] = {}
        for subject in subjects:
            subject.wake()
            try:
                await self._run(subject, self._job(await subject.target(), 16, self._size.warm_s))
                found[subject.name] = await part(subject)
            finally:
                subject.rest()
        return found

    async def _alone(self, subject: Subject) -> tuple[Unary, Unary]:
        behind = await self._unary(None, await subject.behind(), 1, self._size.alone_s)
        return await self._unary(subject, await subject.target(), 1, self._size.alone_s), behind

    async def _at_16(self, subject: Subject) -> tuple[Unary, Unary]:
        behind = await self._unary(None, await subject.behind(), 16, self._size.alone_s)
        return await self._unary(subject, await subject.target(), 16, self._size.loaded_s), behind

    async def _at_32(self, subject: Subject) -> Unary:
        target = await subject.target()
        return await self._unary(subject, target, 32, self._size.loaded_s, subject.light_model)

    async def cpu_per_request(self, subject: Subject, *, greedy: bool) -> float:
        size = self._size
        job = replace(self._job(await subject.target(), 16, size.warm_s), greedy=greedy)
        await self._run(subject, job)
        done, used_s = await self._timed(subject, replace(job, seconds=size.loaded_s))
        return used_s / float(done["requests"])

    async def memory(self, subject: Subject, requests: int) -> Memory:
        """Of one that has just been started, and checked."""
        subject.wake()
        idle = resident(subject)
        target = await subject.target()
        await self._run(subject, Job(target, MODEL, self._size.words, streams=16, requests=requests))
        loaded = resident(subject)
        await asyncio.sleep(self._size.memory_later_s)
        later = resident(subject)
        subject.rest()
        return Memory(idle, loaded, later, requests)

    async def _unary(
        self, subject: Subject | None, target: Target, streams: int, seconds: float, model: str = MODEL
    ) -> Unary:
        done, used_s = await self._timed(subject, self._job(target, streams, seconds, model))
        return Unary(
            done["requests"] / done["took_s"], done["p50_s"], done["p99_s"], used_s / done["requests"]
        )

    def _job(self, target: Target, streams: int, seconds: float, model: str = MODEL) -> Job:
        return Job(target, model, self._size.words, streams=streams, seconds=seconds)

    async def _streamed(self, subject: Subject) -> Streamed:
        size = self._size
        job = Job(
            await subject.target(),
            subject.light_model,
            size.streamed_words,
            streamed=True,
            streams=size.streams,
            seconds=size.loaded_s,
        )
        done, used_s = await self._timed(subject, job)
        if done["tokens"] != done["requests"] * size.streamed_words:
            per_stream = done["tokens"] / done["requests"]
            raise CannotMeasure(
                f"{subject.name} streams {per_stream:.1f} pieces for {size.streamed_words} tokens"
            )
        return Streamed(done["tokens"] / done["took_s"], used_s / done["tokens"])

    async def _timed(self, subject: Subject | None, job: Job) -> tuple[dict[str, Any], float]:
        """What the load says, and the CPU seconds of the subject meanwhile."""
        processes = subject.processes() if subject else {}
        before_s = sum(cpu_s(processes).values())
        done = await self._run(subject, job)
        return done, sum(cpu_s(processes).values()) - before_s

    async def _run(self, subject: Subject | None, job: Job) -> dict[str, Any]:
        """Raises CannotMeasure, with what the subject has logged."""
        try:
            return await self._load.run(job)
        except CannotMeasure as error:
            logged = f" Its last lines:\n{subject.process.tail(30)}" if subject else ""
            raise CannotMeasure(f"{subject.name if subject else 'an upstream'}: {error}{logged}") from error


def resident(subject: Subject) -> int:
    return sum(each.memory_info().rss for each in subject.processes().values())


class Prices:
    """Gateways with more and more parts switched on, and what a request costs them."""

    def __init__(self, platform: Platform) -> None:
        self._subjects: dict[str, Own] = {"nothing": self._with(platform, ())}
        for index, part in enumerate(SWITCHED_ON, 1):
            on = self._with(platform, SWITCHED_ON[:index])
            self._subjects[{"auth": TOKEN, "cache": MISS}.get(part, part)] = on
            if part == "auth":
                self._subjects[KEY] = Own(KEY, platform, on.own, "grpc", token=False)

    def _with(self, platform: Platform, on: Sequence[str]) -> Own:
        process = OwnProcess(platform, f"price-{len(on)}", without=[part for part in ALL if part not in on])
        return Own(process.process.name, platform, process, "grpc", token=True)

    async def start(self) -> None:
        for subject in self._subjects.values():
            await subject.start()

    async def measure(self, bench: Bench, rounds: int, say: Progress) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in self._subjects}
        names = list(self._subjects)
        for index in range(rounds):
            for name in names if index % 2 == 0 else reversed(names):
                found[name].append(await bench.cpu_per_request(self._subjects[name], greedy=name == MISS))
            last = ", ".join(f"{name} {values[-1] * 1e6:.0f}" for name, values in found.items())
            say(f"prices {index + 1}/{rounds}, us: {last}")
        return found

    async def stop(self) -> None:
        for subject in self._subjects.values():
            await subject.stop()


@dataclass(frozen=True, slots=True)
class Found:
    """All that was measured."""

    rounds: Mapping[str, list[Round]]
    memory: Mapping[str, Memory]
    prices: Mapping[str, list[float]]

    def aims(self) -> list[Aim]:
        return figures.aims(self.rounds, self.memory)


async def measure(
    wanted: Sequence[str],
    size: Size,
    folder: Path,
    platform: Platform | None,
    say: Progress,
    *,
    profile: Path | None = None,
) -> Found:
    """`platform` has been started; None where no gateway of ours is wanted."""
    async with AsyncExitStack() as stack:
        ports = PortReservations()
        stack.callback(ports.release)
        load = Load(folder / "load.log")
        await load.start()
        stack.push_async_callback(load.stop)
        subjects = await _subjects(wanted, folder, platform, ports, stack, profile)
        bench = Bench(load, size, say)
        for subject in subjects:
            say(f"starting {subject.name}")
            stack.push_async_callback(subject.stop)
            await subject.start()
        await bench.check(subjects)
        say("all say the same")
        memory: dict[str, Memory] = {}
        if MEMORY in wanted:
            for subject in subjects:
                if subject.name in (figures.ALL_ON, figures.OFF):
                    continue  # the same process, or hardly another
                few = subject.name == figures.LITELLM
                memory[subject.name] = await bench.memory(subject, size.memory_requests // (10 if few else 1))
                say(f"memory of {subject.name}: {memory[subject.name]}")
        rounds: dict[str, list[Round]] = {subject.name: [] for subject in subjects}
        for index in range(size.rounds if subjects else 0):
            turn = index % len(subjects)
            order = [*subjects[turn:], *subjects[:turn]]
            found = await bench.round(order if index % 2 == 0 else order[::-1])
            for name, each in found.items():
                rounds[name].append(each)
                say(f"round {index + 1}/{size.rounds}, {name}: {_line(each)}")
        prices: dict[str, list[float]] = {}
        if PRICE in wanted and platform is not None:
            say("starting a gateway for each step of the table of prices")
            steps = Prices(platform)
            stack.push_async_callback(steps.stop)
            await steps.start()
            prices = await steps.measure(bench, size.rounds, say)
        return Found(rounds, memory, prices)


async def _subjects(
    wanted: Sequence[str],
    folder: Path,
    platform: Platform | None,
    ports: PortReservations,
    stack: AsyncExitStack,
    profile: Path | None,
) -> list[Subject]:
    subjects: list[Subject] = []
    if platform is not None:
        whole = OwnProcess(platform, "all", profile=profile)
        if figures.OURS in wanted:
            subjects.append(Own(figures.OURS, platform, whole, "http", token=False))
        if figures.ALL_ON in wanted:
            subjects.append(Own(figures.ALL_ON, platform, whole, "grpc", token=False))
        if figures.OFF in wanted:
            off = OwnProcess(platform, "off", without=ALL, profile=profile)
            subjects.append(Own(figures.OFF, platform, off, "grpc", token=False))
    upstreams = {"grpc": (figures.BARE,), "http": (figures.LITELLM, figures.SMG)}
    for protocol, names in upstreams.items():
        if not set(names) & set(wanted):
            continue
        upstream = Upstream(protocol, ports, folder)
        stack.push_async_callback(upstream.stop)
        await upstream.start()
        makers: dict[str, type[Bare | LiteLlm | Smg]] = {
            figures.BARE: Bare,
            figures.LITELLM: LiteLlm,
            figures.SMG: Smg,
        }
        subjects += [makers[name](upstream, ports, folder) for name in names if name in wanted]
    return subjects


def _line(found: Round) -> str:
    return (
        f"{found.alone.p50_s * 1e3:.2f} ms alone (behind it {found.alone_behind.p50_s * 1e3:.2f});"
        f" at 16 {found.at_16.requests_per_s:.0f}/s, p99 {found.at_16.p99_s * 1e3:.1f} ms,"
        f" {found.at_16.cpu_s_per_request * 1e6:.0f} us of CPU; at 32 {found.at_32.requests_per_s:.0f}/s;"
        f" {found.streamed.tokens_per_s:.0f} tokens/s, {found.streamed.cpu_s_per_token * 1e6:.1f} us each"
    )


async def bench(wanted: Sequence[str], size: Size, folder: Path, say: Progress, profile: Path | None) -> None:
    machine = report.machine()
    say(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before'][0]}")
    async with AsyncExitStack() as stack:
        platform: Platform | None = None
        if {*OURS, PRICE} & set(wanted):
            reservations = PortReservations()
            stack.callback(reservations.release)
            broker = brokers.prepare(folder / "kafka", reservations)
            say("starting the broker, auth, logging and inference")
            stack.callback(brokers.stop_blocking, broker)
            broker.start()
            await broker.wait_ready()
            platform = Platform(MeshHarness(folder / "mesh", broker, reservations), reservations, folder)
            stack.push_async_callback(platform.stop)
            await platform.start()
        found = await measure(wanted, size, folder, platform, say, profile=profile)
    made = found.aims()
    content = {
        "machine": machine,
        "gateways": versions(),
        "size": asdict(size),
        "rounds": {name: [asdict(each) for each in rounds] for name, rounds in found.rounds.items()},
        "memory": {name: asdict(each) for name, each in found.memory.items()},
        "price_cpu_s": found.prices,
        "aims": [aim.line() for aim in made],
    }
    say(f"raw rounds: {report.write('gateway', content).relative_to(ROOT)}")
    tables = figures.tables(found.rounds) if found.rounds else []
    tables += [figures.memory_table(found.memory)] if found.memory else []
    tables += [figures.price_table(found.prices, KEY)] if found.prices else []
    report.show(tables, made, spread=figures.SPREAD)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gateway", description=__doc__)
    parser.add_argument("--rounds", type=rounds_from, default=15)
    parser.add_argument(
        "--short", action="store_true", help="each part half as long, and less for the memory"
    )
    every = (*SUBJECTS, MEMORY, PRICE)
    parser.add_argument("--subjects", default=",".join(every), help="with commas; not given: all of them")
    parser.add_argument("--profile", type=Path, help="where the profile of the gateway's process goes")
    given = parser.parse_args(argv)
    wanted = given.subjects.split(",")
    if unknown := set(wanted) - set(every):
        parser.error(f"no subject {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    size = Size.short(given.rounds) if given.short else Size(given.rounds)
    try:
        with tempfile.TemporaryDirectory(prefix="llmos-bench-gateway-") as folder:
            asyncio.run(
                bench(wanted, size, Path(folder), Progress(), given.profile and given.profile.absolute())
            )
    except (CannotMeasure, CannotStart) as error:
        print(f"Could not measure: {error}", file=sys.stderr)
        return EXIT_COULD_NOT
    return EXIT_MEASURED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
