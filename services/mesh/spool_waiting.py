"""Futures of those who wait for the spool's disk, bounded in time."""

from __future__ import annotations

import asyncio

from services.mesh.errors import AuditUnavailable


class Waiting:
    """Makes and settles them."""

    def __init__(self, *, refuses: bool, timeout_s: float) -> None:
        """`refuses`: what could not be written is an error for those who wait, and not merely counted."""
        self._refuses = refuses
        self._timeout_s = timeout_s

    def begin(self, *, otherwise: bool) -> asyncio.Future[None]:
        """To be settled; where a hanging disk does not tell in time, it is with `otherwise`."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[None] = loop.create_future()
        expiry = loop.call_later(self._timeout_s, self.settle, waiting, otherwise)

        def settled(future: asyncio.Future[None]) -> None:
            expiry.cancel()
            if not future.cancelled():
                future.exception()  # so that one whom nobody waits for any more does not complain

        waiting.add_done_callback(settled)
        return waiting

    def settle(self, waiting: asyncio.Future[None], written: bool) -> None:
        """Says whether the event was written. Repeating it changes nothing."""
        if waiting.done():
            return
        if written or not self._refuses:
            waiting.set_result(None)
        else:
            waiting.set_exception(AuditUnavailable("The audit log cannot take the request."))

    def turned_away(self) -> asyncio.Future[None]:
        """For what there is no room for."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.settle(waiting, written=False)
        return waiting


def failed(error: Exception) -> asyncio.Future[None]:
    """One that ended before it began."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future
