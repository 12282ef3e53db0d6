"""Which replica serves a request: a healthy one that has the model, with the fewest requests running for
what it can take.

Each replica is asked for its health at a steady pace. One that was lost in the middle of a request is out
until it says again that it serves. Where nobody is healthy, all are asked once more before a request is
refused, so that a replica that has just come up is not missed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass, field

from msgspec.structs import replace

from services.gateway.generation import Model
from services.gateway.ports import InferencePort
from services.mesh.clock import Clock
from services.mesh.errors import LlmosError, ModelNotFound, NoReplica

logger = logging.getLogger(__name__)

MAX_MODELS = 1_000


@dataclass(slots=True)
class Replica:
    """One replica of inference, as this gateway sees it."""

    name: str
    port: InferencePort
    max_running: int = 0
    """The sequences that it is given at once; 0 until it has said how many it runs."""
    healthy: bool = False
    running: int = 0
    models: dict[str, Model] = field(default_factory=dict)
    """What it had when it was last asked; kept while it is away."""

    def lease(self) -> Lease:
        """Counts a request as running there, for as long as the block lasts."""
        return Lease(self)


class Lease:
    """See `Replica.lease`."""

    __slots__ = ("_replica",)

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def __enter__(self) -> None:
        self._replica.running += 1

    def __exit__(self, *ended: object) -> None:
        self._replica.running -= 1


class Router:
    """Knows the replicas. A component of the app: `start` begins the watching, `stop` ends it."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        clock: Clock,
        *,
        probe_interval_s: float,
        ask_again_s: float = 0.1,
        max_running: int = 0,
    ) -> None:
        """`ask_again_s`: the shortest time between two rounds of questions that requests cause.
        `max_running`: the sequences that a replica is given at once; 0: as many as it says that it runs."""
        self._max_running = max_running
        self._replicas = tuple(replicas)
        self._clock = clock
        self._probe_interval_s = probe_interval_s
        self._ask_again_s = ask_again_s
        self.found = asyncio.Event()
        """Set when a replica was found for the first time."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when a replica has come or gone, and capacity with it."""
        self._asked_s = float("-inf")
        self._round: asyncio.Task[None] | None = None
        self._watches: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._watches = [
            asyncio.create_task(self._watch(replica), name=f"watch-{replica.name}", context=Context())
            for replica in self._replicas
        ]

    async def stop(self) -> None:
        tasks = [*self._watches, *([self._round] if self._round else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def choose(self, model: str) -> Replica:
        """The replica for a request.

        Raises ModelNotFound where no replica has, or had, the model; NoReplica where those that may have it
        are away.
        """
        best = self._best(model)
        if best is None and not any(replica.healthy for replica in self._replicas):
            await self._ask_all()
            best = self._best(model)
        if best is not None:
            return best
        known = [replica for replica in self._replicas if replica.models]
        if known and not any(model in replica.models for replica in known):
            raise ModelNotFound(f"There is no model `{model}`.")
        raise NoReplica(f"No replica of the model `{model}` can serve now.")

    async def models(self) -> tuple[Model, ...]:
        """All models, sorted by id; ready where a healthy replica has them."""
        if not any(replica.healthy for replica in self._replicas):
            await self._ask_all()
        found: dict[str, Model] = {}
        # Healthy ones last, so that what they say stands.
        for replica in sorted(self._replicas, key=lambda replica: replica.healthy):
            for model in replica.models.values():
                found[model.id] = replace(model, ready=replica.healthy and model.ready)
        return tuple(found[name] for name in sorted(found)[:MAX_MODELS])

    async def model(self, name: str) -> Model:
        """One model. Raises ModelNotFound."""
        for model in await self.models():
            if model.id == name:
                return model
        raise ModelNotFound(f"There is no model `{name}`.")

    def computes(self, model: str, revision: str, numerics_id: str) -> bool:
        """Whether a replica that serves names this revision of the model and these numerics; where none
        serves, one that did. Numerics that a replica has not named are any."""
        named = [replica for replica in self._replicas if model in replica.models]
        serving = [replica for replica in named if replica.healthy]
        return any(
            found.revision == revision and (not found.numerics_id or found.numerics_id == numerics_id)
            for found in (replica.models[model] for replica in serving or named)
        )

    def names(self) -> set[str]:
        """The models that healthy replicas have."""
        return {name for replica in self._replicas if replica.healthy for name in replica.models}

    def capacity(self, model: str) -> int | None:
        """The sequences that all healthy replicas of the model together run at once; None where there is
        none."""
        places = 0
        for replica in self._replicas:
            if replica.healthy and model in replica.models:
                places += replica.max_running
        return places or None

    def lost(self, replica: Replica) -> None:
        """Takes a replica out until it says that it serves."""
        if replica.healthy:
            logger.warning("replica %s is lost", replica.name)
            replica.healthy = False
            self.on_change()

    def _best(self, model: str) -> Replica | None:
        fit = [replica for replica in self._replicas if replica.healthy and model in replica.models]
        if len(fit) == 1:
            return fit[0]
        return min(fit, key=lambda replica: replica.running / replica.max_running, default=None)

    async def _ask_all(self) -> None:
        """Asks all replicas now, together with whoever else waits for that."""
        if self._round is None or self._round.done():
            if self._clock.monotonic() - self._asked_s < self._ask_again_s:
                return
            self._asked_s = self._clock.monotonic()
            self._round = asyncio.create_task(self._ask_round(), context=Context())
        await asyncio.shield(self._round)

    async def _ask_round(self) -> None:
        await asyncio.gather(*(self._probe(replica) for replica in self._replicas))

    async def _watch(self, replica: Replica) -> None:
        while True:
            await self._probe(replica)
            await self._clock.sleep(self._probe_interval_s)

    async def _probe(self, replica: Replica) -> None:
        healthy = await replica.port.is_healthy()
        if healthy and not replica.healthy:
            try:
                replica.models = {model.id: model for model in await replica.port.list_models()}
                replica.max_running = self._max_running or await replica.port.max_running()
            except LlmosError as error:
                cause = error.__cause__ or error
                logger.warning("replica %s does not say what it serves: %s", replica.name, cause)
                healthy = False
        if healthy != replica.healthy:
            logger.info("replica %s %s", replica.name, "serves" if healthy else "does not serve")
            replica.healthy = healthy
            if healthy:
                self.found.set()
            self.on_change()
