"""Our own registry of running handlers.

grpc.aio's `stop(grace)` does not wait for the `finally` of handlers that it aborts (grpc #37239), and its
own concurrency limit may queue instead of refusing (grpc #30424). Both are done here.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from services.mesh.errors import ConcurrencyLimit, Draining


class RunningCalls:
    """The calls being served by this process, over all its edges."""

    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self._tasks: set[asyncio.Task[object]] = set()
        self._watches: set[asyncio.Task[object]] = set()
        self._cut: set[asyncio.Task[object]] = set()
        self._aside = 0
        self._draining = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._tasks)

    def enter(self, task: asyncio.Task[object], *, watch: bool = False) -> Entered:
        """Registers a task, for as long as the block lasts. Raises ConcurrencyLimit at once where all places
        are taken.

        A `watch` lasts as long as its client likes, so the drain does not wait for it: it ends at once, with
        Draining. Its client goes on elsewhere.
        """
        if watch and self._draining.is_set():
            raise Draining("The server is shutting down.")
        self._check_places()
        self._tasks.add(task)
        if watch:
            self._watches.add(task)
        self._empty.clear()
        return Entered(self, task)

    def step_aside(self) -> None:
        """The present call gives its place up while it waits for its client, and stays registered for the
        drain. It must `come_back`, also where it fails."""
        self._aside += 1

    def come_back(self, *, to_work: bool) -> None:
        """Takes a place again. Raises ConcurrencyLimit where all are taken, unless the call only ends."""
        try:
            if to_work:
                self._check_places()
        finally:
            self._aside -= 1

    def _check_places(self) -> None:
        if len(self._tasks) - self._aside >= self._max_calls:
            raise ConcurrencyLimit(f"The server runs {self._max_calls} calls, which is its limit.")

    def leave(self, task: asyncio.Task[object]) -> bool:
        """The task has ended; whether it was cut off."""
        was_cut = task in self._cut
        self._cut.discard(task)
        self._watches.discard(task)
        self._tasks.discard(task)
        if not self._tasks:
            self._empty.set()
        return was_cut

    def is_cut(self) -> bool:
        """Whether the present task is being cut off by the drain."""
        return asyncio.current_task() in self._cut

    async def drain_begins(self) -> None:
        """Returns when no more is to be begun."""
        await self._draining.wait()

    async def drain(self, grace_s: float, abort_s: float = 5.0) -> int:
        """Cuts the watches, and waits for all other calls to end, at most `grace_s`; then cuts the rest and
        awaits their `finally`, at most `abort_s`. What is cut ends with Draining. Returns how many calls
        besides watches were cut.
        """
        self._draining.set()
        self._cut_off(self._watches)
        try:
            await asyncio.wait_for(self._empty.wait(), grace_s)
        except TimeoutError:
            pass
        else:
            return 0
        rest = set(self._tasks)
        self._cut_off(rest)
        if rest:
            await asyncio.wait(rest, timeout=abort_s)
        return len(rest)

    def _cut_off(self, tasks: set[asyncio.Task[object]]) -> None:
        for task in tasks - self._cut:
            task.cancel()
        self._cut |= tasks


class Entered:
    """One call that runs, as a block."""

    __slots__ = ("_running", "_task")

    def __init__(self, running: RunningCalls, task: asyncio.Task[object]) -> None:
        self._running = running
        self._task = task

    def __enter__(self) -> None:
        """It is registered already."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running.leave(self._task) and isinstance(error, asyncio.CancelledError):
            # A handler that ends as cancelled without its client's doing would leave the client waiting.
            self._task.uncancel()
            raise Draining("The server shut down before the answer was complete.") from None
