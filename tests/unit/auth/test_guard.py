"""Brute force on the open methods of auth itself: slowed; services and what comes by the gateway are not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from services.auth.credentials import keys
from services.auth.guard import Guard
from services.mesh import context as request_context
from services.mesh.context import RequestContext
from services.mesh.errors import CredentialInvalid, RateLimit
from services.mesh.interceptors import Call
from services.mesh.slowdown import Slowdown
from services.mesh.tokens import Audience, Verifier

if TYPE_CHECKING:
    from conftest import Auth

ISSUER = "https://auth.example"

METHOD = "/llmos.auth.v1.TokenService/IssueToken"
GATEWAY_SECRET = "secret-of-gateway-".ljust(40, "x")
PEER, OTHER = "10.0.0.9", "10.0.0.10"


class Guarded:
    """A guard over the auth of the tests."""

    def __init__(self, auth: Auth) -> None:
        self.auth = auth
        verifier = Verifier(auth.ring, issuer=ISSUER, audience=Audience.AUTH, clock=auth.clock)
        self.guard = Guard(Slowdown(auth.clock), verifier)

    async def tries(self, client_id: str, secret: str, address: str = PEER, token: str = "") -> str:
        """One attempt to prove a client; says how it ended."""
        audience = Audience.AUTH if client_id.startswith("service:") else Audience.GATEWAY
        metadata = {"authorization": f"Bearer {token}"} if token else {}
        call = Call(RequestContext("req", METHOD, address), metadata)
        reason = ""

        async def prove(call: Call) -> None:
            nonlocal reason
            try:
                with self.guard.attempt(client_id):
                    await self.auth.exchange.by_secret(client_id, secret, audience, ())
            except (CredentialInvalid, RateLimit) as error:
                reason = error.reason

        with _serving(call.context):
            await self.guard.link(call, prove)
        return reason


@contextmanager
def _serving(context: RequestContext) -> Iterator[None]:
    token = request_context.enter(context)
    try:
        yield
    finally:
        request_context.leave(token)


@pytest.fixture
async def guarded(auth: Auth) -> Guarded:
    await auth.tenant()
    return Guarded(auth)


async def test_r25_wrong_secrets_are_slowed_and_others_are_not(guarded: Guarded) -> None:
    secret = await guarded.auth.client("app")
    wrong = [await guarded.tries("app", keys.new_client_secret()) for _ in range(100)]
    assert wrong == ["CREDENTIAL_INVALID"] * 11 + ["RATE_LIMIT"] * 89
    assert await guarded.tries("app", secret, OTHER) == ""


async def test_r25_no_service_is_kept_from_its_token(guarded: Guarded) -> None:
    for _ in range(100):
        await guarded.tries("app", "wrong")
        await guarded.tries("service:gateway", "wrong")
    assert await guarded.tries("app", "wrong") == "RATE_LIMIT"
    assert await guarded.tries("service:gateway", GATEWAY_SECRET) == ""


async def test_what_the_gateway_forwards_is_the_gateways_to_slow(guarded: Guarded) -> None:
    secret = await guarded.auth.client("app")
    signed = await guarded.auth.exchange.by_secret("service:gateway", GATEWAY_SECRET, Audience.AUTH, ())
    for _ in range(100):
        assert await guarded.tries("app", "wrong", token=signed.token) == "CREDENTIAL_INVALID"
    assert await guarded.tries("app", secret, token=signed.token) == ""


async def test_a_token_that_is_no_services_exempts_nobody(guarded: Guarded) -> None:
    await guarded.auth.client("app", scopes=frozenset({"tenant.admin"}))
    user = await guarded.auth.exchange.by_secret("app", await guarded.auth.key(), Audience.AUTH, ())
    for token in ("nonsense", user.token):
        reasons = [await guarded.tries("app", "wrong", token=token) for _ in range(20)]
        assert reasons[-1] == "RATE_LIMIT"
