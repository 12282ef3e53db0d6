"""What the rounds of `make bench-gateway` say: figures of a round, tables, aims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from tests.bench.figures import Aim, Spread

OURS, ALL_ON, OFF = "http", "grpc-all", "grpc-off"
BARE, LITELLM, SMG = "bare", "litellm", "smg"
SPREAD = "quartiles"
"""Beside a median: of many short rounds a single one says little."""


@dataclass(frozen=True, slots=True)
class Unary:
    """A closed loop of calls."""

    requests_per_s: float
    p50_s: float
    p99_s: float
    cpu_s_per_request: float
    """Of the subject's processes; 0 where it is the upstream that was asked."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """A closed loop of streams."""

    tokens_per_s: float
    cpu_s_per_token: float


@dataclass(frozen=True, slots=True)
class Round:
    """One subject in one round. What is behind it was asked the same way, directly, at once before."""

    alone: Unary
    alone_behind: Unary
    at_16: Unary
    at_16_behind: Unary
    at_32: Unary
    streamed: Streamed


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes of a subject's processes."""

    idle: int
    loaded: int
    later: int
    """Some seconds after the load."""
    requests: int


Rounds = Mapping[str, Sequence[Round]]
Figure = Callable[[Round], float]


def added_p50_s(each: Round) -> float:
    return each.alone.p50_s - each.alone_behind.p50_s


def added_p99_s(each: Round) -> float:
    return each.at_16.p99_s - each.at_16_behind.p99_s


def aims(rounds: Rounds, memory: Mapping[str, Memory]) -> list[Aim]:
    """Those that the measured subjects can speak about."""
    made: list[Aim] = []

    def compare(
        name: str,
        ours: str,
        other: str,
        figure: Figure,
        target: float,
        *,
        at_most: bool,
        inverse: bool = False,
    ) -> None:
        if ours in rounds and other in rounds:
            mine, theirs = ([figure(each) for each in rounds[subject]] for subject in (ours, other))
            above, below = (theirs, mine) if inverse else (mine, theirs)
            ratios = [each / other for each, other in zip(above, below, strict=True)]
            made.append(Aim(name, Spread.quartiles(ratios), target, at_most=at_most))

    compare("added_p50_alone_vs_litellm", OURS, LITELLM, added_p50_s, 0.1, at_most=True)
    compare("added_p99_at_16_vs_litellm", OURS, LITELLM, added_p99_s, 0.05, at_most=True)
    cpu: Figure = lambda each: each.at_16.cpu_s_per_request  # noqa: E731
    stream_cpu: Figure = lambda each: each.streamed.cpu_s_per_token  # noqa: E731
    compare("requests_per_cpu_s_vs_litellm", OURS, LITELLM, cpu, 15, at_most=False, inverse=True)
    compare("tokens_per_cpu_s_vs_litellm", OURS, LITELLM, stream_cpu, 10, at_most=False, inverse=True)
    compare("cpu_per_request_vs_smg", OURS, SMG, cpu, 3, at_most=True)
    for ours, target in ((OFF, 0.8), (ALL_ON, 0.5)):
        name = ours.replace("-", "_")
        compare(f"{name}_vs_bare", ours, BARE, lambda each: each.at_32.requests_per_s, target, at_most=False)
        compare(
            f"{name}_vs_bare_per_cpu_s",
            ours,
            BARE,
            lambda each: each.at_32.cpu_s_per_request,
            target,
            at_most=False,
            inverse=True,
        )
    if OURS in memory:
        mine = memory[OURS]
        made.append(Aim("memory_mb", Spread.of([mine.loaded / 1e6]), 150, at_most=True))
        made.append(Aim("memory_back_to_idle", Spread.of([mine.later / mine.idle]), 1.1, at_most=True))
    return made


_LATENCY: Mapping[str, Figure] = {
    "p50 alone, ms": lambda each: each.alone.p50_s * 1e3,
    "added by it": lambda each: added_p50_s(each) * 1e3,
    "p50 at 16, ms": lambda each: each.at_16.p50_s * 1e3,
    "p99 at 16": lambda each: each.at_16.p99_s * 1e3,
    "added by it at 16": lambda each: added_p99_s(each) * 1e3,
}
_WORK: Mapping[str, Figure] = {
    "requests/s at 16": lambda each: each.at_16.requests_per_s,
    "CPU-s per 1,000": lambda each: each.at_16.cpu_s_per_request * 1e3,
    "requests/s at 32": lambda each: each.at_32.requests_per_s,
    "tokens/s": lambda each: each.streamed.tokens_per_s,
    "CPU-s per 100,000": lambda each: each.streamed.cpu_s_per_token * 1e5,
}


def tables(rounds: Rounds) -> list[Table]:
    """Of latency and of work."""
    made = []
    for title, columns in (("Latency", _LATENCY), ("Work", _WORK)):
        found = Table(title=f"{title}: medians of the rounds ({SPREAD})", title_justify="left")
        found.add_column("subject")
        for column in columns:
            found.add_column(column, justify="right")
        for name, measured in rounds.items():
            spreads = (Spread.quartiles([figure(each) for each in measured]) for figure in columns.values())
            found.add_row(name, *map(str, spreads))
        made.append(found)
    return made


def memory_table(memory: Mapping[str, Memory]) -> Table:
    found = Table(title="Resident memory, MB", title_justify="left")
    for column in ("subject", "idle", "after the load", "of requests", "later", "later / idle"):
        found.add_column(column, justify="left" if column == "subject" else "right")
    for name, each in memory.items():
        sizes = (f"{each.idle / 1e6:.0f}", f"{each.loaded / 1e6:.0f}", f"{each.requests:,}")
        found.add_row(name, *sizes, f"{each.later / 1e6:.0f}", f"{each.later / each.idle:.2f}")
    return found


def price_table(prices: Mapping[str, Sequence[float]], aside: str = "") -> Table:
    """CPU seconds of a request by what is switched on, in the order in which it was. What comes after the row
    `aside` does not stand on it."""
    title = "The price of each policy: CPU of the gateway for one unary request over gRPC, us"
    found = Table(title=title, title_justify="left")
    for column in ("switched on, one after the other", "in all", "more"):
        found.add_column(column, justify="left" if column.startswith("switched") else "right")
    before: Sequence[float] | None = None
    for name, each in prices.items():
        more = ""
        if before is not None:
            more = str(Spread.quartiles([(now - then) * 1e6 for now, then in zip(each, before, strict=True)]))
        found.add_row(name, str(Spread.quartiles([value * 1e6 for value in each])), more)
        if name != aside:
            before = each
    return found
