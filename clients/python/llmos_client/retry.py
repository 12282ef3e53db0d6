"""How often a call is tried, when, and for how long in all. Pure: the clients do the waiting."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from llmos_client.errors import LlmosError, Unavailable


@dataclass(frozen=True)
class RetryPolicy:
    """When a call that found the server unavailable is tried again.

    Only `Unavailable` is: nothing was begun then, or the server undid it. A stream is never tried again
    once its first event has arrived.
    """

    max_attempts: int = 4
    """How often in all, the first time included. 1 switches retries off."""
    initial_backoff_s: float = 0.2
    """The wait before the second attempt is about this; it doubles with each further one."""
    max_backoff_s: float = 5.0
    """A wait that the server did not ask for is no longer than this."""
    max_retry_after_s: float = 30.0
    """Where the server asks for a longer wait, the error is raised at once."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_attempts <= 20:
            raise ValueError("max_attempts must be from 1 to 20")
        if not 0 < self.initial_backoff_s <= self.max_backoff_s:
            raise ValueError("initial_backoff_s must be above 0 and at most max_backoff_s")

    def backoff_s(self, failures: int, draw: float) -> float:
        """The wait after so many failures in a row; `draw` in [0, 1) spreads clients apart."""
        full = min(self.max_backoff_s, self.initial_backoff_s * 2.0 ** min(failures - 1, 32))
        return full * (0.5 + draw / 2)


class RetryThrottle:
    """Keeps a client from adding load to a server that is down: a retry needs earlier successes.

    As gRPC's retry throttling: each failure costs a token, each success earns a tenth of one, and there
    are retries only while more than half of the tokens are left. Safe for threads.
    """

    def __init__(self, max_tokens: float = 10.0, earned_per_success: float = 0.1) -> None:
        self._max_tokens = max_tokens
        self._earned = earned_per_success
        self._tokens = max_tokens
        self._lock = threading.Lock()

    def success(self) -> None:
        with self._lock:
            self._tokens = min(self._max_tokens, self._tokens + self._earned)

    def failure(self) -> bool:
        """Whether a retry is allowed."""
        with self._lock:
            self._tokens = max(0.0, self._tokens - 1.0)
            return self._tokens > self._max_tokens / 2


class Attempts:
    """The attempts of one call, under one deadline."""

    def __init__(
        self,
        policy: RetryPolicy,
        throttle: RetryThrottle,
        timeout_s: float | None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`timeout_s` is for all attempts and the waits between them; None is no deadline."""
        self._policy = policy
        self._throttle = throttle
        self._monotonic = monotonic
        self._draw = draw
        self._end_s = None if timeout_s is None else monotonic() + timeout_s
        self._failures = 0

    def remaining_s(self) -> float | None:
        """What is left for the attempt that begins now; never negative."""
        return None if self._end_s is None else max(0.0, self._end_s - self._monotonic())

    def succeeded(self) -> None:
        """The server answered: what fails from now on is a new matter."""
        self._failures = 0
        self._throttle.success()

    def failed(self, error: LlmosError) -> float:
        """How long to wait in seconds before the next attempt. Raises `error` where there is none."""
        if not isinstance(error, Unavailable):
            raise error
        self._failures += 1
        if not self._throttle.failure() or self._failures >= self._policy.max_attempts:
            raise error
        wait_s = self._policy.backoff_s(self._failures, self._draw())
        if error.retry_after_s is not None:
            if error.retry_after_s > self._policy.max_retry_after_s:
                raise error
            wait_s = max(wait_s, error.retry_after_s)
        remaining_s = self.remaining_s()
        if remaining_s is not None and wait_s >= remaining_s:
            raise error
        return wait_s
