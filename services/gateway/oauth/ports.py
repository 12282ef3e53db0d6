"""What the OAuth2 edge needs of auth, in its own types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, auto
from typing import Protocol

from services.mesh.access_token import Audience
from services.mesh.context import Identity


@dataclass(frozen=True, slots=True)
class ClientProof:
    """How a client proves itself: by one of the two."""

    client_id: str
    secret: str = field(default="", repr=False)
    assertion: str = field(default="", repr=False)
    """A JWT that it has signed (RFC 7523, section 3)."""


class SubjectKind(Enum):
    """What is exchanged for a token."""

    API_KEY = auto()
    ACCESS_TOKEN = auto()
    """One of ours, for the gateway."""
    JWT = auto()
    """An ID token, or another JWT, of a corporate identity provider."""


@dataclass(frozen=True, slots=True)
class Granted:
    """A token that auth gave."""

    token: str = field(repr=False)
    expires_at: datetime
    scopes: Sequence[str]
    """Sorted."""
    identity: Identity | None
    """Whose it is; None: a service's own."""


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """What an active token says."""

    issuer: str
    audience: str
    subject: str
    client_id: str
    tenant_id: str
    key_id: str
    scopes: Sequence[str]
    roles: Sequence[str]
    token_id: str
    issued_at_s: int
    expires_at_s: int


@dataclass(frozen=True, slots=True)
class Introspected:
    """What auth says of a token."""

    facts: TokenFacts | None
    """None: it is not active, or none of the asker's business."""
    asked_by: Identity | None
    """None: a service."""


class TokensPort(Protocol):
    """The token methods of auth. All raise what auth raises, and DependencyUnavailable."""

    async def issue(self, client: ClientProof, audience: Audience, scopes: Sequence[str]) -> Granted:
        """A token by client credentials. `scopes` empty: all that the client can reach."""

    async def exchange(
        self, subject_token: str, kind: SubjectKind, audience: Audience, scopes: Sequence[str]
    ) -> Granted:
        """A token for another credential (RFC 8693)."""

    async def introspect(self, client: ClientProof, token: str) -> Introspected: ...

    async def revoke(self, client: ClientProof, token: str) -> Identity | None:
        """Refuses the token from now on; returns who asked."""

    async def jwks_json(self) -> str:
        """The public keys, a JWK Set."""
