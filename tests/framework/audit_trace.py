"""Traces of the audit protocol: what happens to gateways, broker and store, step by step.

A `World` carries steps out: the model (`audit_model`) or the real spool, relay, consumer and store over an
in-memory broker (`audit_real_world`). The `Director` draws steps from a seed, keeps to what makes sense (a
dead gateway serves nothing), knows the truth of what was committed, heals everything at the end and judges.
The same seed gives the same steps in each world.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

GATEWAYS = 3
PARTITIONS = 2
FENCE_AFTER_S = 600.0
OUTCOMES = ("SUCCEEDED", "FAILED", "CANCELLED", "REJECTED")
ABORTED = "ABORTED"


class Fate(Enum):
    """What becomes of a batch that a relay hands to the broker."""

    TAKEN = "taken"
    UNACKNOWLEDGED = "landed, but the relay never hears of it"
    TORN = "the first half landed, the relay hears of nothing"
    LOST = "nothing landed"
    DELAYED = "nothing landed yet; the relay hears of nothing; it lands later"


class Crash(Enum):
    """When the store's process dies while it takes a batch."""

    NEVER = "never"
    BEFORE_COMMIT = "before its transaction commits"
    AFTER_COMMIT = "after its transaction, before anything else"


class StoredRecord(NamedTuple):
    """What the store has of a request."""

    started: bool
    outcome: str | None
    closed_by_logging: bool


class World(Protocol):
    """Carries steps out. A gateway is known by its index, a request by its id."""

    async def open(self, gateway: int) -> None: ...
    async def crash(self, gateway: int) -> None: ...
    async def lose(self, gateway: int) -> None:
        """The spool is gone; the index gets a new one when opened again."""

    async def power_loss(self, gateway: int, share: float) -> set[str]:
        """A crash that takes the machine along: a share of what was committed in this life is gone.

        Returns the requests whose events are among that.
        """

    async def start(self, gateway: int, request_id: str) -> None: ...
    async def end(self, gateway: int, request_id: str, outcome: str) -> None: ...
    async def note(self, gateway: int, number: int) -> None:
        """An event that is no request's, such as a count of anonymous rejections."""

    async def job(self, gateway: int, number: int) -> None:
        """A job, or where the number is odd a retry: each has a topic of its own, and a store of its own."""

    async def publish(self, gateway: int, limit: int, fate: Fate) -> None: ...
    async def sync(self, gateway: int, answered: bool) -> None: ...
    async def land_delayed(self) -> None: ...
    async def duplicate(self, partition: int, back: int) -> None: ...
    async def wipe_broker(self) -> None: ...
    async def consume(self, partition: int, limit: int, crash: Crash) -> None:
        """Takes the next audit events. A process that dies takes the consumers of jobs with it."""

    async def schedule(self, partition: int, limit: int, crash: Crash) -> None:
        """Takes the next jobs and retries. Where it dies before it commits, the schedule has them, and their
        places are not noted."""

    async def restart_store(self) -> None: ...
    async def wipe_store(self) -> None: ...
    async def check(self) -> None:
        """Logging compares what it read with what Kafka has, and fences who is silent."""

    async def advance(self, duration_s: float) -> None: ...

    async def records(self) -> dict[str, StoredRecord]: ...
    async def notes(self) -> list[int]: ...
    async def jobs(self) -> list[int]:
        """What the schedule has."""

    async def held(self, gateway: int) -> int:
        """How many events the gateway's spool still has."""

    async def settled_by_logging(self) -> int:
        """How many intents were closed because their outcome was lost."""

    async def fenced(self) -> set[int]:
        """Gateways (by index) of which logging ever fenced a spool."""


@dataclass
class Truth:
    """What was committed, whatever became of it."""

    gateway: int
    life: int
    started: bool = False
    outcome: str | None = None


@dataclass
class Director:
    """Draws and carries out the steps of one run."""

    seed: int
    world: World
    with_store_wipes: bool = False
    with_power_loss: bool = False
    steps: int = 70
    rng: random.Random = field(init=False)
    alive: set[int] = field(default_factory=set)
    running: dict[int, list[str]] = field(default_factory=dict)
    truth: dict[str, Truth] = field(default_factory=dict)
    life: list[int] = field(default_factory=lambda: [0] * GATEWAYS)
    lost_lives: set[tuple[int, int]] = field(default_factory=set)
    noted: dict[int, tuple[int, int]] = field(default_factory=dict)
    submitted: dict[int, tuple[int, int]] = field(default_factory=dict)
    uncertain: set[str] = field(default_factory=set)
    """Requests whose events a power loss took from a spool."""
    cut: set[str] = field(default_factory=set)
    store_wiped: bool = False
    wiped_at: int = 0
    """Requests before this one began before the store was wiped for the last time."""
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    async def run(self) -> None:
        for gateway in range(GATEWAYS):
            await self._open(gateway)
        kinds, weights = zip(*self._weights().items(), strict=True)
        for _ in range(self.steps):
            await self.step(self.rng.choices(kinds, weights)[0])
        await self.heal()
        await self.judge()

    def _weights(self) -> dict[str, int]:
        weights = {
            "start": 22, "end": 16, "reject": 3, "note": 3, "publish": 24, "sync": 14, "consume": 24,
            "job": 8, "schedule": 10,
            "crash": 3, "open": 8, "lose": 1, "land_delayed": 3, "duplicate": 3, "wipe_broker": 1,
            "restart_store": 2, "check": 3, "advance": 4, "cut": 2, "mend": 3,
        }  # fmt: skip
        if self.with_store_wipes:
            weights["wipe_store"] = 1
        if self.with_power_loss:
            weights["power_loss"] = 3
        return weights

    async def step(self, kind: str) -> None:
        rng = self.rng
        gateway = rng.randrange(GATEWAYS)
        # Always drawn, so that a step does not depend on the state that it finds.
        dice = [rng.random() for _ in range(4)]
        arguments = await getattr(self, f"_{kind}")(gateway, *dice)
        self.log.append(f"{kind} {gateway} {arguments or ''}")

    async def _open(self, gateway: int, *_: float) -> None:
        if gateway not in self.alive:
            await self.world.open(gateway)
            self.alive.add(gateway)
            self.running[gateway] = []

    async def _crash(self, gateway: int, *_: float) -> None:
        if gateway in self.alive:
            await self.world.crash(gateway)
            self.alive.discard(gateway)
            self.running[gateway] = []

    async def _lose(self, gateway: int, *_: float) -> None:
        await self._crash(gateway)
        await self.world.lose(gateway)
        self.lost_lives.add((gateway, self.life[gateway]))
        self.life[gateway] += 1

    async def _power_loss(self, gateway: int, share: float, *_: float) -> str | None:
        if gateway not in self.alive:
            return None
        gone = await self.world.power_loss(gateway, share)
        self.uncertain |= gone
        self.alive.discard(gateway)
        self.running[gateway] = []
        return " ".join(sorted(gone))

    async def _start(self, gateway: int, *_: float) -> str | None:
        if gateway not in self.alive:
            return None
        request_id = f"r{len(self.truth)}"
        await self.world.start(gateway, request_id)
        self.truth[request_id] = Truth(gateway, self.life[gateway], started=True)
        self.running[gateway].append(request_id)
        return request_id

    async def _end(self, gateway: int, which: float, how: float, *_: float) -> str | None:
        if gateway not in self.alive or not self.running[gateway]:
            return None
        request_id = self.running[gateway].pop(int(which * len(self.running[gateway])))
        outcome = OUTCOMES[int(how * 3)]
        await self.world.end(gateway, request_id, outcome)
        self.truth[request_id].outcome = outcome
        return f"{request_id} {outcome}"

    async def _reject(self, gateway: int, *_: float) -> str | None:
        if gateway not in self.alive:
            return None
        request_id = f"r{len(self.truth)}"
        await self.world.end(gateway, request_id, "REJECTED")
        self.truth[request_id] = Truth(gateway, self.life[gateway], outcome="REJECTED")
        return request_id

    async def _note(self, gateway: int, *_: float) -> None:
        if gateway in self.alive:
            number = len(self.noted)
            await self.world.note(gateway, number)
            self.noted[number] = (gateway, self.life[gateway])

    async def _job(self, gateway: int, *_: float) -> None:
        if gateway in self.alive:
            number = len(self.submitted)
            await self.world.job(gateway, number)
            self.submitted[number] = (gateway, self.life[gateway])

    async def _schedule(self, gateway: int, size: float, luck: float, *_: float) -> str | None:
        if "store-broker" in self.cut:
            return None
        crash = Crash.NEVER if luck < 0.8 else Crash.BEFORE_COMMIT if luck < 0.95 else Crash.AFTER_COMMIT
        await self.world.schedule(gateway % PARTITIONS, 1 + int(size * 6), crash)
        return crash.name

    async def _publish(self, gateway: int, size: float, luck: float, which: float, *_: float) -> str | None:
        if gateway not in self.alive:
            return None
        fate = Fate.TAKEN if luck < 0.75 else list(Fate)[1 + int(which * 4)]
        if f"{gateway}-broker" in self.cut:
            fate = Fate.LOST
        limit = 1 + int(size * 8)
        await self.world.publish(gateway, limit, fate)
        return f"{limit} {fate.name}"

    async def _sync(self, gateway: int, luck: float, *_: float) -> str | None:
        if gateway not in self.alive or f"{gateway}-store" in self.cut:
            return None
        await self.world.sync(gateway, answered=luck < 0.85)
        return f"answered={luck < 0.85}"

    async def _consume(self, gateway: int, size: float, luck: float, *_: float) -> str | None:
        if "store-broker" in self.cut:
            return None
        crash = Crash.NEVER if luck < 0.9 else Crash.BEFORE_COMMIT if luck < 0.95 else Crash.AFTER_COMMIT
        await self.world.consume(gateway % PARTITIONS, 1 + int(size * 12), crash)
        return crash.name

    async def _land_delayed(self, *_: float) -> None:
        await self.world.land_delayed()

    async def _duplicate(self, gateway: int, back: float, *_: float) -> None:
        await self.world.duplicate(gateway % PARTITIONS, 1 + int(back * 10))

    async def _wipe_broker(self, *_: float) -> None:
        await self.world.wipe_broker()

    async def _restart_store(self, *_: float) -> None:
        await self.world.restart_store()

    async def _wipe_store(self, *_: float) -> None:
        self.store_wiped = True
        self.wiped_at = len(self.truth)
        await self.world.wipe_store()

    async def _check(self, *_: float) -> None:
        if "store-broker" not in self.cut:
            await self.world.check()

    async def _advance(self, gateway: int, much: float, luck: float, *_: float) -> str:
        duration_s = much * 20 if luck < 0.8 else 25.0
        rounds = 1 if luck < 0.95 else 30  # the last fences who is cut off
        for _ in range(rounds):
            await self.world.advance(duration_s)
            await self._check()
        return f"{rounds} x {duration_s:.1f} s"

    async def _cut(self, gateway: int, which: float, *_: float) -> str:
        link = (f"{gateway}-broker", f"{gateway}-store", "store-broker")[int(which * 3)]
        self.cut.add(link)
        return link

    async def _mend(self, gateway: int, which: float, *_: float) -> str | None:
        if not self.cut:
            return None
        link = sorted(self.cut)[int(which * len(self.cut))]
        self.cut.discard(link)
        return link

    async def heal(self) -> None:
        """Everything works again; running requests end; spools that were not lost come back."""
        self.cut.clear()
        await self.world.land_delayed()
        for gateway in range(GATEWAYS):
            await self._open(gateway)
            for request_id in list(self.running[gateway]):
                await self.world.end(gateway, request_id, "SUCCEEDED")
                self.truth[request_id].outcome = "SUCCEEDED"
            self.running[gateway] = []
        # Long enough for the longest wait before a repetition, and for a fence after it.
        for _ in range(100):
            for gateway in range(GATEWAYS):
                await self.world.publish(gateway, 1000, Fate.TAKEN)
            for partition in range(PARTITIONS):
                await self.world.consume(partition, 1000, Crash.NEVER)
                await self.world.schedule(partition, 1000, Crash.NEVER)
            for gateway in range(GATEWAYS):
                await self.world.sync(gateway, answered=True)
            await self.world.check()
            await self.world.advance(20.0)
            if self.seed % 10 and await self._quiet():
                return

    async def _quiet(self) -> bool:
        """Nothing is left to do. Some runs go on nevertheless, to see that nothing happens then."""
        records = await self.world.records()
        held = [await self.world.held(gateway) for gateway in range(GATEWAYS)]
        return not any(held) and all(record.outcome is not None for record in records.values())

    async def judge(self) -> None:
        """What must hold after healing, whatever was done before."""
        records = await self.world.records()
        for gateway in range(GATEWAYS):
            assert await self.world.held(gateway) == 0, f"gateway {gateway} still holds events"
        for request_id, record in records.items():
            assert record.outcome is not None, f"{request_id} has no outcome"
        fenced = await self.world.fenced()
        for index, (request_id, truth) in enumerate(self.truth.items()):
            if (truth.gateway, truth.life) in self.lost_lives or index < self.wiped_at:
                continue
            if request_id in self.uncertain:
                continue
            found = records.get(request_id)
            assert found is not None, f"{request_id} is missing"
            if found.closed_by_logging:
                assert truth.gateway in fenced, f"{request_id} was closed without a fence"
            else:
                assert found.outcome == (truth.outcome or ABORTED), f"{request_id}: {found} but {truth}"
        for what, all_of_them, stored in (
            ("note", self.noted, await self.world.notes()),
            ("job", self.submitted, await self.world.jobs()),
        ):
            assert len(stored) == len(set(stored)), f"a {what} is stored twice"
            if not self.store_wiped and not self.with_power_loss:
                kept = {n for n, life in all_of_them.items() if life not in self.lost_lives}
                assert kept <= set(stored), f"{what}s are missing: {kept - set(stored)}"
        if not self.store_wiped and not self.with_power_loss:
            assert await self.world.settled_by_logging() == 0, "an outcome was taken for lost"


async def play(make: Callable[[], World], seeds: Iterable[int], **settings: bool | int) -> int:
    """Runs one trace for each seed. A failure names its seed and prints its steps."""
    count = 0
    for seed in seeds:
        director = Director(seed, make(), **settings)  # type: ignore[arg-type]
        try:
            await director.run()
        except Exception as error:
            print("\n".join(director.log))
            raise AssertionError(f"seed {seed}: {error}") from error
        count += 1
    return count
