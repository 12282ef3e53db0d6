"""How a stream that does not end by itself is followed across breaks. Pure; the same for both clients."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from llmos.logging.v1 import audit_service_pb2

from llmos_client.audit_types import AuditFilter, AuditRecord
from llmos_client.errors import DeadlineExceeded, LlmosError, Unavailable
from llmos_client.retry import Attempts, RetryPolicy, RetryThrottle

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
ItemT = TypeVar("ItemT")

CALL_TIMEOUT_S = 3600.0
"""A tail is a chain of calls; this is the longest that we ask for, and the server may allow less."""
GIVE_UP_AFTER_S = 60.0
"""How long a break may last in all, where nothing else is said."""
LIFE_S = 30.0
"""A call that lasted longer had reached its server: connecting is given up sooner."""


class Followed(Generic[RequestT, ResponseT, ItemT]):
    """What is followed: with which request it goes on after a break, and what comes of its responses."""

    ended = False
    """Whether there is nothing more to come."""

    def request(self) -> RequestT:
        """Of the call that begins now."""
        raise NotImplementedError

    def accept(self, response: ResponseT) -> ItemT | None:
        """What the caller gets; None where that was delivered before."""
        raise NotImplementedError

    def closed(self) -> None:
        """The server has ended the call without an error. Raises Unavailable where that was not the end."""
        raise Unavailable("The server ended the stream before its end.")


class TailState(Followed[audit_service_pb2.TailRequest, audit_service_pb2.TailResponse, AuditRecord]):
    """Where a tail of the audit log stands."""

    def __init__(self, wanted: AuditFilter, *, last: int, after_position: int | None) -> None:
        if not 0 <= last <= 1000:
            raise ValueError("last must be from 0 to 1000")
        self._filter = wanted.to_proto()
        self._last = last
        self.position = after_position
        """Of the last record that was delivered, or that the caller had before."""

    def request(self) -> audit_service_pb2.TailRequest:
        """After a break: all that is newer than what was delivered, so nothing is lost or doubled. Before
        the first record there is no such place, and the tail begins anew."""
        if self.position is None:
            return audit_service_pb2.TailRequest(filter=self._filter, last=self._last)
        return audit_service_pb2.TailRequest(filter=self._filter, after_position=self.position)

    def accept(self, response: audit_service_pb2.TailResponse) -> AuditRecord | None:
        """The record; None for one that was delivered before."""
        record = AuditRecord.from_proto(response.record)
        if self.position is not None and record.position <= self.position:
            return None
        self.position = record.position
        return record


class TailBreaks:
    """Whether, and when, a broken tail is taken up again.

    A server that was never there fails as fast as any other call. Once there was life (a record, or a call
    that lasted), a break may last `give_up_after_s` in all, so that a restart of the server is ridden out.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        throttle: RetryThrottle,
        *,
        timeout_s: float | None,
        give_up_after_s: float,
        monotonic: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy
        self._attempts = Attempts(policy, throttle, timeout_s, monotonic=monotonic, draw=draw)
        self._give_up_after_s = give_up_after_s
        self._monotonic = monotonic
        self._draw = draw
        self._alive = False
        self._failures = 0
        self._began_s = monotonic()
        self._broke_s: float | None = None

    def call_timeout_s(self) -> float:
        """Of the call that begins now."""
        self._began_s = self._monotonic()
        remaining_s = self._attempts.remaining_s()
        return CALL_TIMEOUT_S if remaining_s is None else min(CALL_TIMEOUT_S, remaining_s)

    def received(self) -> None:
        """A sign of life."""
        self._alive = True
        self._failures = 0
        self._broke_s = None

    def failed(self, error: LlmosError) -> float:
        """Seconds to wait before the next call. Raises `error` where the tail ends."""
        now_s = self._monotonic()
        if self._attempts.remaining_s() == 0:
            raise error
        if isinstance(error, DeadlineExceeded):
            # The server's cap on the length of calls; to the tail it is no failure.
            self.received()
        elif not isinstance(error, Unavailable):
            raise error
        elif now_s - self._began_s >= LIFE_S:
            self.received()
        if not self._alive:
            return self._attempts.failed(error)
        self._broke_s = now_s if self._broke_s is None else self._broke_s
        if now_s - self._broke_s > self._give_up_after_s:
            raise error
        self._failures += 1
        return max(self._policy.backoff_s(self._failures, self._draw()), error.retry_after_s or 0.0)
