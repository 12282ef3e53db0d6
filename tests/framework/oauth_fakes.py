"""Auth's token methods in memory, for the OAuth2 edge."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from services.gateway.oauth.ports import ClientProof, Granted, Introspected, SubjectKind, TokenFacts
from services.mesh.access_token import Audience
from services.mesh.context import Identity
from services.mesh.errors import CredentialInvalid, LlmosError, RequestInvalid, Violation

APP = Identity("acme", "app", scopes=frozenset({"generate"}), token_id="t1", issued_at_s=1)
FACTS = TokenFacts(
    "https://login", "llmos-gateway", "app", "app", "acme", "", ("generate",), ("user",), "t1", 1, 301
)


class FakeTokens:
    """A `TokensPort` that knows one client, `app` with the secret `s3cret:+ %` or the assertion `signed`."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.revoked: list[str] = []
        self.error: LlmosError | None = None
        self.expires_at = datetime(2100, 1, 1, tzinfo=UTC)

    def _prove(self, client: ClientProof) -> None:
        good = (ClientProof("app", "s3cret:+ %"), ClientProof("app", assertion="e30.eyJzdWIiOiJhcHAifQ.e30"))
        if client not in good:
            raise CredentialInvalid("The client id or its secret is wrong.")

    async def issue(self, client: ClientProof, audience: Audience, scopes: Sequence[str]) -> Granted:
        self._prove(client)
        self.asked.append(("issue", audience, tuple(scopes)))
        if self.error is not None:
            raise self.error
        return Granted("the-token", self.expires_at, ("generate", "models.read"), APP)

    async def exchange(
        self, subject_token: str, kind: SubjectKind, audience: Audience, scopes: Sequence[str]
    ) -> Granted:
        if subject_token == "wrong":
            raise CredentialInvalid("The subject token is wrong.")
        self.asked.append(("exchange", subject_token, kind, audience, tuple(scopes)))
        if self.error is not None:
            raise self.error
        return Granted("the-token", self.expires_at, ("generate",), APP)

    async def introspect(self, client: ClientProof, token: str) -> Introspected:
        self._prove(client)
        return Introspected(FACTS if token == "the-token" else None, APP)

    async def revoke(self, client: ClientProof, token: str) -> Identity | None:
        self._prove(client)
        if self.error is not None:
            raise self.error
        if token.startswith("llmos_"):
            raise RequestInvalid("An API key.", violations=[Violation("token", "must be an access token")])
        self.revoked.append(token)
        return APP

    async def jwks_json(self) -> str:
        return '{"keys":[]}'
