"""Who calls a service: another service, and the caller that the gateway asserts."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from joserfc.jwk import OKPKey
from llmos.common.v1 import identity_pb2

from services.mesh.access_token import parse_claims
from services.mesh.channel import pack_identity
from services.mesh.clock import ManualClock
from services.mesh.context import Caller, Identity
from services.mesh.errors import CredentialInvalid, CredentialMissing, PolicyDenied
from services.mesh.tokens import ServiceAuthenticator, Verifier
from tests.framework.access_tokens import AUDIENCE, ISSUER, KID, Keys, honest_claims, signed

NOW = datetime(2030, 1, 1, tzinfo=UTC)
KEY = OKPKey.generate_key("Ed25519")


def verifier() -> Verifier:
    return Verifier(Keys({KID: KEY}), issuer=ISSUER, audience=AUDIENCE, clock=ManualClock(NOW))


def service_claims(name: str) -> dict[str, object]:
    subject = f"service:{name}"
    return honest_claims(NOW, sub=subject, client_id=subject, tenant_id=None, scope=None)


class TestServiceAuthenticator:
    identity = identity_pb2.Identity(tenant_id="acme", client_id="app", scopes=["generate"])

    async def authenticate(self, claims: dict[str, object], **metadata: str | bytes) -> Caller:
        token = signed(KEY, claims)
        entries: dict[str, str | bytes] = {"authorization": f"Bearer {token}"}
        entries |= {name.replace("_", "-"): value for name, value in metadata.items()}
        subject = ServiceAuthenticator(verifier())
        return await subject("/llmos.inference.v1.InferenceService/Generate", entries, "127.0.0.1")

    async def test_the_gateway_asserts_the_caller(self) -> None:
        caller = await self.authenticate(
            service_claims("gateway"), llmos_identity_bin=self.identity.SerializeToString()
        )
        assert caller.peer_service == "service:gateway"
        assert caller.identity == Identity("acme", "app", "", frozenset({"generate"}))

    async def test_the_gateway_on_its_own_account(self) -> None:
        assert await self.authenticate(service_claims("gateway")) == Caller(None, "service:gateway")

    async def test_roles_and_the_token_come_along(self) -> None:
        asserted = Identity(
            "acme",
            "app",
            "key_abc",
            frozenset({"generate"}),
            roles=frozenset({"auditor", "user"}),
            token_id="t1",
            issued_at_s=1_900_000_000,
        )
        caller = await self.authenticate(
            service_claims("gateway"), llmos_identity_bin=pack_identity(asserted)
        )
        assert caller.identity == asserted

    async def test_nobody_else_does(self) -> None:
        caller = await self.authenticate(
            service_claims("inference"), llmos_identity_bin=self.identity.SerializeToString()
        )
        assert caller == Caller(None, "service:inference")

    @pytest.mark.parametrize(
        "value",
        [
            b"\xff\xff",
            b"",
            "text",
            identity_pb2.Identity(tenant_id="acme").SerializeToString(),
            identity_pb2.Identity(tenant_id="a" * 65, client_id="app").SerializeToString(),
            identity_pb2.Identity(
                tenant_id="a", client_id="b", roles=[f"r{n}" for n in range(33)]
            ).SerializeToString(),
            identity_pb2.Identity(tenant_id="a", client_id="b", token_id="t" * 257).SerializeToString(),
            identity_pb2.Identity(
                tenant_id="a", client_id="b", scopes=[f"s{n}" for n in range(65)]
            ).SerializeToString(),
        ],
    )
    async def test_a_malformed_assertion_is_refused(self, value: bytes | str) -> None:
        with pytest.raises(CredentialInvalid):
            await self.authenticate(service_claims("gateway"), llmos_identity_bin=value)

    async def test_a_caller_is_no_service(self) -> None:
        with pytest.raises(PolicyDenied):
            await self.authenticate(honest_claims(NOW))

    async def test_a_service_is_nobodys_caller(self) -> None:
        verified = await verifier().verify(signed(KEY, service_claims("gateway")))
        assert verified.is_service
        assert verified.tenant_id == ""
        with pytest.raises(PolicyDenied):
            verified.identity()

    async def test_without_a_credential(self) -> None:
        subject = ServiceAuthenticator(verifier())
        with pytest.raises(CredentialMissing):
            await subject("/any", {}, "")


def test_claims_of_a_service_may_name_no_tenant() -> None:
    assert parse_claims(json.dumps(service_claims("auth")).encode()).tenant_id == ""
