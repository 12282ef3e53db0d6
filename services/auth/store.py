"""What auth keeps, and the port to where it is kept. `tests/contract/test_auth_store.py` holds every
implementation to it.

Everything that an administrator manages is a resource, and every change of resources goes through
`commit`: all of a batch or nothing, in one order that all auth processes on one database see, with what
was before and after written beside it. Secrets are not stored: a record holds a digest. A text may hold
any Unicode character but NUL; the store attaches no meaning to any of them. What a method has returned
from is durable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from services.mesh.policy import (
    AddressRule,
    Network,
    Plan,
    PolicyDocument,
    RevocationKind,
    Role,
)


class Kind(StrEnum):
    """The kinds of resources, in the order in which they can be made."""

    PLAN = "plan"
    TENANT = "tenant"
    ROLE = "role"
    ADDRESS_RULE = "address_rule"
    IDENTITY_PROVIDER = "identity_provider"
    CLIENT = "client"
    API_KEY = "api_key"


@dataclass(frozen=True, slots=True)
class Tenant:
    """Owns clients; data of two tenants never mix."""

    tenant_id: str
    parent_id: str = ""
    """The organisation that it is a project of; empty: it is one itself."""
    display_name: str = ""
    plan_id: str = "free"
    disabled: bool = False


@dataclass(frozen=True, slots=True)
class Client:
    """A program or a person of a tenant."""

    client_id: str
    """Unique in the deployment."""
    tenant_id: str
    is_user: bool = False
    display_name: str = ""
    scopes: frozenset[str] = frozenset()
    """What it may do without condition, besides its roles."""
    roles: frozenset[str] = frozenset()
    jwks_json: str = ""
    """Its public keys for private_key_jwt; empty: none."""
    disabled: bool = False
    external_subject: str = ""
    """`PROVIDER SUBJECT` where it comes from an identity provider."""
    secret_digest: bytes = field(default=b"", repr=False)
    """Empty: it has no secret."""
    old_secret_digest: bytes = field(default=b"", repr=False)
    """The secret before, which works until `old_secret_until`."""
    old_secret_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key of a client."""

    key_id: str
    client_id: str
    prefix: str
    """Finds it; unique."""
    digest: bytes = field(repr=False)
    display_name: str = ""
    scopes: frozenset[str] = frozenset()
    """Empty: all of the client's."""
    models: tuple[str, ...] = ()
    """Empty: all that the client may use."""
    addresses: tuple[Network, ...] = ()
    """Empty: any."""
    expires_at: datetime | None = None
    disabled: bool = False


@dataclass(frozen=True, slots=True)
class ClaimRule:
    """Gives a role to those of whom an identity provider says something."""

    claim: str
    value: str
    role_id: str


@dataclass(frozen=True, slots=True)
class IdentityProvider:
    """A corporate OpenID Connect provider whose tokens are exchanged for ours."""

    provider_id: str
    issuer: str
    """Unique."""
    audience: str
    tenant_id: str
    default_roles: frozenset[str] = frozenset()
    claim_rules: tuple[ClaimRule, ...] = ()
    disabled: bool = False


Resource = Tenant | Client | ApiKey | Role | Plan | AddressRule | IdentityProvider


@dataclass(frozen=True, slots=True)
class Stored:
    """A resource as it is kept."""

    resource: Resource
    version: int
    """Of the commit that last changed it; its etag."""
    created_at: datetime
    updated_at: datetime
    last_used_at: datetime | None = None
    """Of an API key; no change of the resource."""


@dataclass(frozen=True, slots=True)
class Owned:
    """A client with its tenant, and the organisation above a project."""

    client: Client
    tenant: Tenant
    organisation: Tenant | None = None

    @property
    def disabled(self) -> bool:
        """Whether none of its credentials is accepted."""
        above = self.organisation is not None and self.organisation.disabled
        return self.client.disabled or self.tenant.disabled or above


@dataclass(frozen=True, slots=True)
class Put:
    """Makes a resource, or replaces it."""

    resource: Resource
    create: bool
    """True: it must not exist. False: it must."""
    expected_version: int | None = None
    """Of what is replaced; None: whatever it is."""
    note: str = ""
    """What else this does, such as `secret rotated`."""


@dataclass(frozen=True, slots=True)
class Delete:
    """Deletes a resource; of a client, its keys too."""

    kind: Kind
    resource_id: str
    expected_version: int | None = None


@dataclass(frozen=True, slots=True)
class NewRevocation:
    """Refuses tokens that were issued up to a moment."""

    kind: RevocationKind
    subject_id: str
    revoked_at: datetime
    expires_at: datetime
    cut_streams: bool = False


@dataclass(frozen=True, slots=True)
class Revocation:
    """As it is kept."""

    version: int
    revoked: NewRevocation


@dataclass(frozen=True, slots=True)
class Batch:
    """One commit."""

    at: datetime
    actor: str
    """`TENANT/CLIENT`, or `service:auth`."""
    request_id: str = ""
    writes: Sequence[Put | Delete] = ()
    """Done in this order."""
    revocations: Sequence[NewRevocation] = ()
    only_if_empty: bool = False
    """Refuses with AlreadyExists where there is a tenant already."""


@dataclass(frozen=True, slots=True)
class Change:
    """One write of a batch, as it was recorded. Digests are left out of both states."""

    version: int
    index: int
    """Its place in its batch."""
    at: datetime
    actor: str
    request_id: str
    kind: Kind
    resource_id: str
    tenant_id: str
    """Empty: it belongs to the deployment."""
    before: Resource | None
    after: Resource | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Filter:
    """What `list` returns; empty fields do not filter."""

    tenant_ids: frozenset[str] | None = None
    """Tenants, and what belongs to them (a key by its client; a role or address rule of the deployment
    belongs to none, and is not among it)."""
    client_id: str = ""
    prefix: str = ""


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
        """Whether there is no tenant."""

    async def commit(self, batch: Batch) -> int:
        """All of it or nothing; returns its version, 1 more than the commit's before. What has no effect (a
        Put of what is there already) leaves version and record as they are.

        Raises AlreadyExists, NotFound (what is replaced or deleted, or what a reference names: a client's
        tenant and roles, a key's client, a tenant's parent and plan, a provider's tenant and roles, a role's
        and an address rule's tenant), StateConflict (a delete of what something refers to; a project of a
        project; a change of a client's tenant or a key's client) and Conflict (`expected_version`). Built-in
        roles and plans (`services.mesh.policy`) can be referred to without being stored, and not be put or
        deleted (StateConflict).
        """

    async def get(self, kind: Kind, resource_id: str) -> Stored | None: ...

    async def list(self, kind: Kind, filter_: Filter, *, limit: int, after_id: str = "") -> Sequence[Stored]:
        """Sorted by id (by code points), from the one after `after_id`. Without what is built in."""

    async def find_client(self, client_id: str) -> Owned | None: ...

    async def find_api_key(self, prefix: str) -> tuple[ApiKey, Owned] | None:
        """The key of this prefix, with its client."""

    async def find_provider(self, issuer: str) -> IdentityProvider | None: ...

    async def used(self, last_used: Mapping[str, datetime]) -> None:
        """Remembers when keys, by id, were last used. Ids that do not exist are passed over."""

    async def version(self) -> int:
        """Of the last commit; 0: there was none."""

    async def policy(self) -> tuple[int, PolicyDocument]:
        """The policy in force, what is built in included, and its version: that of the last commit which
        changed a role, an address rule, a plan or a tenant."""

    async def revocations(self, *, after_version: int, now: datetime) -> Sequence[Revocation]:
        """Those that have not expired, in their order, from the one after `after_version`."""

    async def changes(
        self,
        *,
        kind: Kind | None = None,
        resource_id: str = "",
        tenant_ids: frozenset[str] | None = None,
        before: tuple[int, int] | None = None,
        limit: int,
    ) -> Sequence[Change]:
        """Newest first, from the one before (version, index)."""

    async def use_once(self, token_id: str, *, until: datetime, now: datetime) -> bool:
        """Whether this id, of a client's signed assertion, was not used before. It is kept until `until`."""

    async def prune(self, now: datetime) -> None:
        """Forgets revocations and used ids that have expired."""

    async def signing_keys(self) -> Sequence[SigningKey]:
        """All, in the order in which they sign."""

    async def add_signing_key(self, key: SigningKey, *, after_kid: str) -> bool:
        """Adds it as the last one. False, and nothing is done, where the last one is not `after_kid` (empty:
        there is none): another process was faster."""

    async def replace_signing_key(self, key: SigningKey) -> None:
        """Replaces the one of the same id."""

    async def delete_signing_key(self, kid: str) -> None:
        """Does nothing where it does not exist."""
