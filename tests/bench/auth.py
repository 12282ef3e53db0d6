"""`make bench-auth`: what a credential and a decision cost, and whether many tenants and keys slow anything.

All subjects of a comparison are measured in each round, in turns, so that what slows the machine down slows
all of them. A figure of a round is the mean of some calls one after the other, the least of several such
means: what others do on the machine meanwhile can only add to it.

The small deployment has 10 keys of 1 tenant, the large one 10,000 keys of 1,000 tenants, both on SQLite. On
both sides ten credentials, spread over all, are used in turn: this asks what it costs that the others are
there. Two more subjects use all 10,000, which the memory just holds: in turn, which is held to the same aim,
and in random order, which is not. There the memory's table and what it finds are no longer in the processor's
cache, and the lookup of a digest alone costs a tenth. Texts are copied before each part, on both sides, for
in use they have just come off the wire.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from deploy.dev.environment import ROOT
from services.gateway.authentication import GatewayAuthenticator
from services.gateway.keys import KeyRing
from services.mesh.actions import ACTIONS
from services.mesh.errors import LlmosError
from services.mesh.slowdown import Slowdown
from tests.bench import report
from tests.bench.auth_subjects import Deployment, Policy, deployment, shapes
from tests.bench.figures import Aim, Spread, ratio, rounds_from
from tests.bench.progress import Progress
from tests.framework.gateway_fakes import FakeAudit

EXIT_MEASURED, EXIT_COULD_NOT = 0, 2
SPEEDUP_AIM, CACHED_US_AIM, DECISION_US_AIM, SCALE_AIM = 20.0, 20.0, 10.0, 1.10
ACTION = ACTIONS["/llmos.gateway.v1.GenerationService/Generate"]
SMALL, LARGE = "small", "large"
TOKEN, UNCACHED, KEY, EDGE = "token, cached", "token, uncached", "API key, cached", "whole authenticator"
EXCHANGE, DECISION = "key exchange", "decision"
ALL_TOKENS, ANY_TOKEN = "tokens, all in turn", "tokens, at random"
SCALED = (TOKEN, ALL_TOKENS, UNCACHED, KEY, DECISION, EXCHANGE)

PARTS = 10
SEED = 6

Chunk = Callable[[], Awaitable[float]]
"""Does some calls, and returns the seconds of one."""
Figures = dict[str, list[float]]
"""Seconds of one call in each round, by subject."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    rounds: int = 25
    calls: int = 2000
    rules: int = 1000
    tenants: int = 1000
    keys: int = 10_000


class _Exchanged:
    """An `AuthPort` that has exchanged all keys before."""

    def __init__(self, tokens: Mapping[str, str]) -> None:
        self._tokens = tokens

    async def exchange(self, api_key: str) -> str:
        return self._tokens[api_key]


def each(call: Callable[[str], Awaitable[object]], texts: Sequence[str], calls: int) -> Chunk:
    """Awaits the call with copies of the texts in turn."""
    turns = itertools.cycle([text.encode() for text in texts])

    async def part(count: int) -> float:
        mine = [text.decode() for text in itertools.islice(turns, count)]
        began_s = time.perf_counter()
        for text in mine:
            await call(text)
        return (time.perf_counter() - began_s) / count

    return least(part, calls)


def decisions(policy: Policy, calls: int) -> Chunk:
    turns, decide = itertools.cycle(policy.requests), policy.engine.decide

    async def part(count: int) -> float:
        mine = list(itertools.islice(turns, count))
        began_s = time.perf_counter()
        for identity, facts in mine:
            decide(identity, ACTION, facts)
        return (time.perf_counter() - began_s) / count

    return least(part, calls)


def least(part: Callable[[int], Awaitable[float]], calls: int) -> Chunk:
    """The calls in several parts, and of these the fastest."""
    size = max(1, calls // PARTS)

    async def chunk() -> float:
        return min([await part(size) for _ in range(PARTS)])

    return chunk


async def rounds(chunks: Mapping[str, Chunk], count: int) -> Figures:
    """Each chunk once to warm up, and then once in each round; every other round backwards."""
    found: Figures = {name: [] for name in chunks}
    for chunk in chunks.values():
        await chunk()
    for index in range(count):
        for name in sorted(chunks, reverse=bool(index % 2)):
            found[name].append(await chunks[name]())
    return found


async def credentials(given: Deployment, size: Size) -> dict[str, Chunk]:
    """The chunks of one deployment."""
    some, tokens = given.some_keys, given.tokens()
    used = [tokens[key] for key in some]
    cached, uncached = given.verifier(size.keys), given.verifier(0)
    keys = KeyRing(_Exchanged(tokens), cached, given.clock, max_entries=size.keys)
    edge = GatewayAuthenticator(cached, keys, FakeAudit(), Slowdown(given.clock))
    every = list(tokens.values())
    for token in every:
        await cached.verify(token)
    for key in given.keys:
        await keys.identity(key)
    headers = {token: {"authorization": f"Bearer {token}"} for token in used}
    few = max(1, size.calls // 10)
    return {
        TOKEN: each(cached.verify, used, size.calls),
        ALL_TOKENS: each(cached.verify, every, size.calls),
        ANY_TOKEN: each(cached.verify, random.Random(SEED).sample(every, len(every)), size.calls),
        UNCACHED: each(uncached.verify, used, few),
        KEY: each(keys.identity, some, size.calls),
        EDGE: each(lambda token: edge("/m", headers[token], "10.0.0.1"), used, size.calls),
        DECISION: decisions(given.policy, size.calls),
        EXCHANGE: each(given.exchange.by_api_key, some, max(1, few // 10)),
    }


def judge(by_shape: Figures, by_size: Mapping[str, Figures]) -> list[Aim]:
    """`by_shape`: decisions by shape; `by_size`: what `credentials` measures, on both deployments."""
    large = by_size[LARGE]
    made = [
        Aim("cached_token_speedup", ratio(large[UNCACHED], large[TOKEN]), SPEEDUP_AIM),
        Aim("cached_token_us", Spread.of(_us(large[TOKEN])), CACHED_US_AIM, at_most=True),
        Aim("cached_api_key_us", Spread.of(_us(large[KEY])), CACHED_US_AIM, at_most=True),
    ]
    for shape, taken_s in by_shape.items():
        name = f"decision_us_{shape.replace(' ', '_')}"
        made.append(Aim(name, Spread.of(_us(taken_s)), DECISION_US_AIM, at_most=True))
    for subject in SCALED:
        name = subject.replace(", ", "_").replace(" ", "_").lower()
        scaled = ratio(large[subject], by_size[SMALL][subject])
        made.append(Aim(f"many_{name}", scaled, SCALE_AIM, at_most=True))
    return made


def _us(taken_s: Sequence[float]) -> list[float]:
    return [each_s * 1e6 for each_s in taken_s]


async def bench(size: Size, folder: Path, say: Callable[[str], None]) -> tuple[list[Table], list[Aim]]:
    """Measures all of it, and writes the raw rounds."""
    machine = report.machine()
    say(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_before'][0]}")
    anchors = {f"{name}/10": decisions(policy, size.calls) for name, policy in shapes(10)}
    many = {name: decisions(policy, size.calls) for name, policy in shapes(size.rules)}
    say(f"decisions by {size.rules} rules, beside 10")
    found = await rounds({**many, **anchors}, size.rounds)
    by_shape = {name: found[name] for name in many}
    async with contextlib.AsyncExitStack() as stack:
        chunks: dict[str, Chunk] = {}
        for which, tenants, keys in ((SMALL, 1, 10), (LARGE, size.tenants, size.keys)):
            say(f"filling a store with {keys} keys of {tenants} tenants")
            given = await stack.enter_async_context(
                deployment(folder / f"{which}.db", tenants=tenants, api_keys=keys)
            )
            for name, chunk in (await credentials(given, size)).items():
                chunks[f"{name}/{which}"] = chunk
        say("credentials, with few and with many")
        taken = await rounds(chunks, size.rounds)
    subjects = dict.fromkeys(name.rpartition("/")[0] for name in taken)
    by_size = {which: {name: taken[f"{name}/{which}"] for name in subjects} for which in (SMALL, LARGE)}
    aims = judge(by_shape, by_size)
    path = report.write(
        "auth",
        {
            "machine": machine,
            "decision_s": found,
            "credential_s": by_size,
            "aims": [aim.line() for aim in aims],
        },
    )
    say(f"raw rounds: {path.relative_to(ROOT)}")
    title = "One call, us: medians of the rounds (least..greatest)"
    shape_table = Table("decision", f"{size.rules} rules", "10 rules", title=title)
    for name in many:
        shape_table.add_row(name, _cell(found[name]), _cell(found[f"{name}/10"]))
    many_of = f"{size.keys} keys, {size.tenants} tenants"
    size_table = Table("credential", "10 keys, 1 tenant", many_of, "ratio")
    for name in subjects:
        small, large = by_size[SMALL][name], by_size[LARGE][name]
        size_table.add_row(name, _cell(small), _cell(large), str(ratio(large, small)))
    return [shape_table, size_table], aims


def _cell(taken_s: Sequence[float]) -> str:
    return str(Spread.of(_us(taken_s)))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.auth", description=__doc__)
    parser.add_argument("--rounds", type=rounds_from, default=25)
    given = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="llmos-bench-") as folder:
            tables, aims = asyncio.run(bench(Size(rounds=given.rounds), Path(folder), Progress()))
    except LlmosError as error:
        print(f"Could not measure: {error}", file=sys.stderr)
        return EXIT_COULD_NOT
    report.show(tables, aims)
    return EXIT_MEASURED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
