"""Who may call inference."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from services.inference.access import GatewayOnly
from services.mesh.context import Caller, Identity
from services.mesh.errors import CredentialMissing, PolicyDenied

METHOD = "/llmos.inference.v1.InferenceService/Generate"


def authenticated(caller: Caller) -> GatewayOnly:
    """Behind an authenticator that has found this caller."""

    async def found(method: str, metadata: Mapping[str, str | bytes], source_address: str) -> Caller:
        return caller

    return GatewayOnly(found)


async def test_the_gateway_may_call_for_somebody_and_for_itself() -> None:
    for identity in (Identity("acme", "app"), None):
        caller = Caller(identity, "service:gateway")
        assert await authenticated(caller)(METHOD, {}, "") == caller


@pytest.mark.parametrize(
    "peer", ["service:logging", "service:auth", "service:inference", "gateway", "", None]
)
async def test_nobody_else_may(peer: str | None) -> None:
    with pytest.raises(PolicyDenied):
        await authenticated(Caller(Identity("acme", "app"), peer))(METHOD, {}, "")


async def test_what_the_inner_authenticator_refuses_stays_refused() -> None:
    async def refuse(method: str, metadata: Mapping[str, str | bytes], source_address: str) -> Caller:
        raise CredentialMissing("none")

    with pytest.raises(CredentialMissing):
        await GatewayOnly(refuse)(METHOD, {}, "")
