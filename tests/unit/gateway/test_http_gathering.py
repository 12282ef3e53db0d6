"""A stream's events are written together in a burst, at once after a pause, in order and none twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from services.gateway.http_gathering import GATHER_S, MAX_GATHERED_BYTES, GatheringTransport


class Inner:
    """A transport that remembers."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def get_write_buffer_size(self) -> int:
        return 0


class Loop:
    """An event loop whose time stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now_s

    def call_at(self, at_s: float, call: Callable[[], None]) -> Timer:
        self.timers.append((at_s, call))
        return Timer(self)

    def move(self, duration_s: float) -> None:
        self.now_s += duration_s
        due = [call for at_s, call in self.timers if at_s <= self.now_s]
        self.timers = [timer for timer in self.timers if timer[0] > self.now_s]
        for call in due:
            call()


class Timer:
    """There is one at most."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def cancel(self) -> None:
        self._loop.timers.clear()


def gathering(inner: Inner, loop: Loop) -> GatheringTransport:
    return GatheringTransport(cast("asyncio.Transport", inner), cast("asyncio.AbstractEventLoop", loop))


def test_a_burst_is_written_together_and_its_first_at_once() -> None:
    inner, loop = Inner(), Loop()
    transport = gathering(inner, loop)
    transport.on = True
    for number in range(5):
        transport.write(b"%d" % number)
    assert inner.written == [b"0"]
    assert transport.get_write_buffer_size() == 4
    loop.move(GATHER_S)
    assert inner.written == [b"0", b"1234"]
    loop.move(GATHER_S)
    transport.write(b"5")
    assert inner.written[-1] == b"5"


def test_what_is_not_gathered_goes_behind_what_was() -> None:
    inner, loop = Inner(), Loop()
    transport = gathering(inner, loop)
    transport.on = True
    transport.write(b"a")
    transport.write(b"b")
    transport.on = False
    transport.write(b"c")
    assert b"".join(inner.written) == b"abc"
    transport.write(b"d")
    assert inner.written[-1] == b"d"


def test_closing_writes_what_waits_and_aborting_does_not() -> None:
    for close in (True, False):
        inner, loop = Inner(), Loop()
        transport = gathering(inner, loop)
        transport.on = True
        transport.write(b"a")
        transport.write(b"b")
        if close:
            transport.close()
        else:
            transport.abort()
        assert inner.closed
        assert b"".join(inner.written) == (b"ab" if close else b"a")


def test_no_more_waits_than_may() -> None:
    inner, loop = Inner(), Loop()
    transport = gathering(inner, loop)
    transport.on = True
    transport.write(b"a")
    transport.write(b"x" * MAX_GATHERED_BYTES)
    transport.write(b"y")
    assert b"".join(inner.written) == b"a" + b"x" * MAX_GATHERED_BYTES + b"y"


def test_a_head_that_is_held_goes_with_its_body_and_holds_nothing_else() -> None:
    inner, loop = Inner(), Loop()
    transport = gathering(inner, loop)
    transport.holds = True
    transport.write(b"head")
    assert (inner.written, transport.get_write_buffer_size()) == ([], 4)
    transport.write(b"body")
    transport.write(b"next")
    assert inner.written == [b"headbody", b"next"]


def test_a_head_that_is_held_is_not_lost_where_no_body_follows() -> None:
    for end in ("write", "close"):
        inner, loop = Inner(), Loop()
        transport = gathering(inner, loop)
        transport.holds = True
        transport.write(b"head")
        transport.write(b"") if end == "write" else transport.close()
        assert inner.written == [b"head"]
