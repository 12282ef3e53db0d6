"""Slows brute force on the open methods down, for those who come to auth without the gateway.

The gateway slows its callers by their addresses, which auth does not see; so calls that carry a service's own
token are let through here. The services' own clients are let through as well: their secrets have 256 random
bits and are compared in memory, and to keep a service from its token would stop the platform.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from services.auth.credentials.keys import API_KEY_PREFIX, is_api_key
from services.mesh import context as request_context
from services.mesh.access_token import SERVICE_PREFIX
from services.mesh.actions import OPEN_METHODS
from services.mesh.context import Caller
from services.mesh.errors import LlmosError
from services.mesh.interceptors import Call, Rest
from services.mesh.slowdown import Slowdown
from services.mesh.tokens import Verifier, bearer

_LOOKUP_CHARS = 8


class Guard:
    """`verifier` is for the audience of auth."""

    def __init__(self, slowdown: Slowdown, verifier: Verifier) -> None:
        self._slowdown = slowdown
        self._verifier = verifier

    async def link(self, call: Call, rest: Rest) -> None:
        """Finds out which service an open method is called by, if any; a bad token says nothing there."""
        if call.context.method in OPEN_METHODS and "authorization" in call.metadata:
            try:
                verified = await self._verifier.verify(bearer(call.metadata))
            except LlmosError:
                pass
            else:
                if verified.is_service:
                    call.context.caller = Caller(peer_service=verified.subject)
        await rest(call)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Around the proof of a credential. `name` is a client's id or an API key; of a key only the part
        that finds it counts. Raises RateLimit where the address or the name has to wait."""
        call = request_context.require_current()
        if call.caller.peer_service is not None or name.startswith(SERVICE_PREFIX):
            yield
            return
        if is_api_key(name):
            name = name[len(API_KEY_PREFIX) : len(API_KEY_PREFIX) + _LOOKUP_CHARS]
        with self._slowdown.attempt(call.source_address, name):
            yield
