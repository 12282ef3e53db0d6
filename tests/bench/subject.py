"""What is measured."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Mapping
from typing import Protocol

import psutil

from tests.bench.work import Batch, Stream, Work


class Subject(Protocol):
    """Something that answers prompts."""

    name: str

    async def start(self) -> None:
        """Returns when it can answer. Raises CannotMeasure."""

    async def answer(self, work: Work) -> list[Stream]:
        """Answers all prompts at once. Raises CannotMeasure."""

    def processes(self) -> Mapping[str, psutil.Process]:
        """Those that work for it, by name; this one too, where it does."""

    def rest(self) -> None:
        """Takes no CPU until `wake`."""

    def wake(self) -> None:
        """Works again."""

    async def stop(self) -> None:
        """Leaves nothing behind. Safe to call twice."""


def send(processes: Mapping[str, psutil.Process], number: signal.Signals) -> None:
    """A signal to all that are still there."""
    for process in processes.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def cpu_s(processes: Mapping[str, psutil.Process]) -> dict[str, float]:
    """What each has used so far."""
    used: dict[str, float] = {}
    for name, process in processes.items():
        times = process.cpu_times()
        used[name] = times.user + times.system
    return used


async def run(subject: Subject, work: Work) -> Batch:
    """One measured batch of a subject that is awake."""
    processes = subject.processes()
    before = cpu_s(processes)
    streams = await subject.answer(work)
    after = cpu_s(processes)
    return Batch(streams, {name: after[name] - before[name] for name in processes})
