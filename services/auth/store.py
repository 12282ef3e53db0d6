"""What auth keeps, and the port to where it is kept. `tests/contract/test_auth_store.py` holds every
implementation to it.

Secrets are not stored: a record holds a digest. A text may hold any Unicode character; the store attaches
no meaning to any of them. What a method has returned from is durable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Tenant:
    """Owns clients; data of two tenants never mix."""

    tenant_id: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Client:
    """A program or a person of a tenant."""

    client_id: str
    """Unique in the deployment."""
    tenant_id: str
    secret_digest: bytes = field(repr=False)
    scopes: frozenset[str]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key of a client."""

    key_id: str
    client_id: str
    prefix: str
    """Finds it; unique."""
    digest: bytes = field(repr=False)
    scopes: frozenset[str]
    created_at: datetime
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key that tokens are signed with."""

    kid: str
    private: bytes = field(repr=False)
    """The 32 bytes of an Ed25519 private key; encrypted where `sealed`."""
    sealed: bool
    signs_from: datetime
    """It signs from here until the next key does."""


class Store(Protocol):
    """Every method may raise DependencyUnavailable (try again later), DataCorrupt and Overloaded."""

    async def is_empty(self) -> bool:
        """Whether no tenant was ever made."""

    async def create_first(self, tenant: Tenant, client: Client, key: ApiKey) -> None:
        """All three or none. Raises AlreadyExists unless the store is empty."""

    async def create_tenant(self, tenant: Tenant) -> None:
        """Raises AlreadyExists."""

    async def create_client(self, client: Client) -> None:
        """Raises AlreadyExists, and NotFound where its tenant does not exist."""

    async def find_client(self, client_id: str) -> Client | None: ...

    async def create_api_key(self, key: ApiKey) -> None:
        """Raises AlreadyExists (id or prefix), and NotFound where its client does not exist."""

    async def find_api_key(self, prefix: str) -> tuple[ApiKey, Client] | None:
        """The key of this prefix, with its client."""

    async def signing_keys(self) -> Sequence[SigningKey]:
        """All, in the order in which they sign."""

    async def put_signing_key(self, key: SigningKey) -> None:
        """Adds it, or replaces the one of the same id."""

    async def delete_signing_key(self, kid: str) -> None:
        """Does nothing where it does not exist."""
