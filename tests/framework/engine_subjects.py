"""The backends that the suite of the engine port runs on, and how a test speaks to each."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.inference.backends.echo import EchoConfig, EchoEngine
from services.inference.backends.embedded import EmbeddedEngine
from services.inference.engine.port import Engine, GenerationRequest
from services.mesh.clock import SystemClock
from services.mesh.errors import ReplicaLost
from tests.framework import engines
from tests.framework.engines import answer, text_request
from tests.framework.models import TINY_MODEL_ID, make_tiny_model

MAX_RUNNING = 2
MAX_WAITING = 2
TEXT = "one two three four five six seven eight"


class Subject(Protocol):
    """A backend, and how a test speaks to it."""

    engine: Engine
    model: str

    def short(self, text: str = TEXT, **fields: object) -> GenerationRequest:
        """Ends by itself or by max_tokens, with several tokens."""

    def long(self) -> GenerationRequest:
        """Runs for many seconds."""

    async def lose(self) -> None:
        """Takes the engine away, and does not wait until it is back."""


@dataclass
class Echo:
    engine: Engine
    model: str = "echo"

    @classmethod
    async def make(cls, folder: Path) -> Echo:
        config = EchoConfig(MAX_RUNNING, MAX_WAITING, directives=True, recovery_s=0.1)
        return cls(EchoEngine(config, SystemClock()))

    def short(self, text: str = TEXT, **fields: object) -> GenerationRequest:
        return text_request(self.model, text, **fields)

    def long(self) -> GenerationRequest:
        return self.short("[[tokens=4000]] [[delay_ms=10]] a long story")

    async def lose(self) -> None:
        with suppress(ReplicaLost):
            await answer(self.engine, self.short("[[crash]]"))


@dataclass
class Embedded:
    engine: EmbeddedEngine
    model: str = TINY_MODEL_ID

    @classmethod
    async def make(cls, folder: Path) -> Embedded:
        model = await asyncio.to_thread(make_tiny_model, folder / "model")
        engine = engines.embedded_engine(
            model, TINY_MODEL_ID, max_running=MAX_RUNNING, max_waiting=MAX_WAITING
        )
        return cls(engine)

    def short(self, text: str = TEXT, **fields: object) -> GenerationRequest:
        return text_request(self.model, text, **({"max_tokens": 12} | fields))

    def long(self) -> GenerationRequest:
        return self.short(max_tokens=4000, ignore_eos=True)

    async def lose(self) -> None:
        engines.signal_child(self.engine, signal.SIGKILL)


KINDS = {"echo": Echo, "embedded": Embedded}
