"""Everything that touches the spool's files, in order. Most events are put by the event loop, into the window
that the spool's thread has prepared (`spool_window`); all else is done by the thread, which may wait for the
disk.

The files belong to the thread while it has work, and else to the event loop. Many who wait for the thread at
the same time share one group of appends. Results return to the event loop in one step for each group.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from services.mesh.audit_protocol import Place
from services.mesh.spool_file import SpoolFile
from services.mesh.spool_frames import Append

logger = logging.getLogger(__name__)

MAX_GROUP = 512
SPACING_S = 0.012
"""Between groups, for what nobody waits for: each waking of the thread, and each transaction, takes time from
the event loop."""
HURRIED_SPACING_S = 0.006
"""The same, for what somebody waits for who did not say so when it was appended: where many wait, they share
a group."""
WINDOW_S = 1.0
"""So long after the thread was asked for something its window is used: by then the system may have begun to
write it out, and a store into it might wait for the disk."""
NEVER_S = float("inf")

AppendDone = Callable[[Place | None, Exception | None], None]
"""Called on the event loop: (place, None), (None, None) for a second outcome, or (None, error)."""


class SpoolWriter:
    """Owns the thread. `start` and everything else is called on the event loop."""

    def __init__(self, file: SpoolFile) -> None:
        self._file = file
        self._queue: queue.SimpleQueue[list[tuple[Any, Any]]] = queue.SimpleQueue()
        self._pending: list[tuple[Any, Any]] = []
        """What has come in since the event loop's last turn: handed over at once, since each waking of the
        thread takes time from both."""
        self._handed_over_s = -NEVER_S
        self._group = 0
        """The number of the one that is pending."""
        self._due_s = NEVER_S
        """When what is pending is handed over, by the event loop's time."""
        self._gathering: asyncio.Handle | None = None
        self._with_thread = 0
        """Groups that it has been handed, and not given back."""
        self._is_held = False
        """What is pending is due, and waits for what is with the thread: it may not need it then."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended = asyncio.Event()

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._thread.start()

    def put(self, event: Append) -> Place | None:
        """Writes an audit event at once. None where that cannot be, and it is to be appended."""
        loop = self._loop
        if self._pending or self._with_thread or loop is None:
            return None
        if loop.time() > self._handed_over_s + WINDOW_S:
            return None
        return self._file.put(event)

    def append(self, event: Append, done: AppendDone, *, spacing_s: float = 0.0) -> int:
        """Writes an event with the next group, which is formed as soon as the one before it is `spacing_s`
        ago. Returns the group's number."""
        self._ask(event, done, spacing_s)
        return self._group

    def hurry(self, group: int) -> None:
        """Somebody waits for a group: if it is pending, it is formed as soon as the one before it is
        HURRIED_SPACING_S ago."""
        if group == self._group:
            self._wake(HURRIED_SPACING_S)

    async def call(self, function: Callable[[], Any], then: Callable[[Any], None] | None = None) -> Any:
        """Runs `function` in the thread, after all appends so far. Raises what it raises.

        `then` gets the result on the event loop, in order with the results of appends.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._ask(function, (future, then))
        return await future

    async def stop(self, timeout_s: float) -> bool:
        """Closes the file after all that was asked so far; False where the disk hangs for so long."""
        if self._thread is None:
            return True
        self._ask(None, None)
        try:
            await asyncio.wait_for(self._ended.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def _ask(self, what: Any, whom: Any, spacing_s: float = 0.0) -> None:
        self._pending.append((what, whom))
        self._wake(spacing_s)

    def _wake(self, spacing_s: float) -> None:
        if self._loop is None:
            return
        due_s = self._handed_over_s + spacing_s if spacing_s else -NEVER_S
        if due_s >= self._due_s:
            return
        if self._gathering is not None:
            self._gathering.cancel()
        self._due_s = due_s
        if spacing_s and due_s > self._loop.time():
            self._gathering = self._loop.call_at(due_s, self._hand_over, self._loop)
        else:
            self._gathering = self._loop.call_soon(self._hand_over, self._loop)

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        self._gathering, self._due_s = None, NEVER_S
        self._is_held = bool(self._with_thread) and self._file.has_window
        if self._is_held or not self._pending:
            return
        self._handed_over_s = loop.time()
        self._group += 1
        self._with_thread += 1
        jobs, self._pending = self._pending, []
        self._queue.put(jobs)

    def _returned(self, groups: int, loop: asyncio.AbstractEventLoop) -> None:
        """The thread has done what was in so many groups. What came meanwhile is put, up to the first that
        cannot be."""
        self._with_thread -= groups
        pending, self._pending = self._pending, []
        for at, (what, whom) in enumerate(pending):
            place = self.put(what) if isinstance(what, Append) else None
            if place is None:
                self._pending = pending[at:] + self._pending
                break
            whom(place, None)
        if self._is_held:
            self._hand_over(loop)

    def _run(self) -> None:
        going = True
        while going:
            jobs = self._queue.get()
            groups = 1
            while len(jobs) < MAX_GROUP:
                try:
                    jobs += self._queue.get_nowait()
                except queue.Empty:
                    break
                groups += 1
            results: list[Callable[[], None]] = []
            group: list[tuple[Append, AppendDone]] = []
            for what, whom in jobs:
                if isinstance(what, Append):
                    group.append((what, whom))
                    continue
                self._write(group, results)
                group = []
                if what is None:
                    going = False
                    break
                results.append(self._called(what, *whom))
            self._write(group, results)
            if going:
                self._file.renew()
            else:
                self._file.close()
                results.append(self._ended.set)
            self._deliver(results, groups)

    def _write(self, group: list[tuple[Append, AppendDone]], results: list[Callable[[], None]]) -> None:
        if not group:
            return
        try:
            places = self._file.append([event for event, _ in group])
        except Exception as error:
            logger.error("the audit spool cannot write: %s", error)  # noqa: TRY400
            failure = error
            results.extend(partial(done, None, failure) for _, done in group)
            return
        results.extend(partial(done, place, None) for (_, done), place in zip(group, places, strict=True))

    def _called(
        self, function: Callable[[], Any], future: asyncio.Future[Any], then: Callable[[Any], None] | None
    ) -> Callable[[], None]:
        try:
            result = function()
        except Exception as error:
            failure = error
            return lambda: None if future.done() else future.set_exception(failure)

        def done() -> None:
            if then is not None:
                then(result)
            if not future.done():
                future.set_result(result)

        return done

    def _deliver(self, results: list[Callable[[], None]], groups: int) -> None:
        loop = self._loop
        if loop is None or loop.is_closed():
            return

        def run() -> None:
            for result in results:
                result()
            self._returned(groups, loop)

        loop.call_soon_threadsafe(run)
