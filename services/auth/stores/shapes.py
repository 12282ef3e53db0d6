"""What the kinds of resources are made of: names, references, owners."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace

from services.auth.store import ApiKey, Client, Filter, IdentityProvider, Kind, Resource, Tenant
from services.mesh.policy import BUILT_IN_PLANS, BUILT_IN_ROLES, AddressRule, Plan, Role

Key = tuple[Kind, str]
"""Names a resource."""

BUILT_IN: frozenset[Key] = frozenset(
    [(Kind.ROLE, role.role_id) for role in BUILT_IN_ROLES]
    + [(Kind.PLAN, plan.plan_id) for plan in BUILT_IN_PLANS]
)
OF_POLICY = frozenset({Kind.ROLE, Kind.ADDRESS_RULE, Kind.PLAN, Kind.TENANT})
"""A change of one of these changes the policy document."""
NAMES = {
    Kind.PLAN: "plan",
    Kind.TENANT: "tenant",
    Kind.ROLE: "role",
    Kind.ADDRESS_RULE: "address rule",
    Kind.IDENTITY_PROVIDER: "identity provider",
    Kind.CLIENT: "client",
    Kind.API_KEY: "API key",
}


def key_of(resource: Resource) -> Key:
    """Its kind and its id."""
    match resource:
        case Tenant():
            return Kind.TENANT, resource.tenant_id
        case Client():
            return Kind.CLIENT, resource.client_id
        case ApiKey():
            return Kind.API_KEY, resource.key_id
        case Role():
            return Kind.ROLE, resource.role_id
        case Plan():
            return Kind.PLAN, resource.plan_id
        case AddressRule():
            return Kind.ADDRESS_RULE, resource.rule_id
        case IdentityProvider():
            return Kind.IDENTITY_PROVIDER, resource.provider_id


def references(resource: Resource) -> Iterator[Key]:
    """What must exist for it to exist, what is built in included."""
    match resource:
        case Tenant():
            yield Kind.PLAN, resource.plan_id
            if resource.parent_id:
                yield Kind.TENANT, resource.parent_id
        case Client():
            yield Kind.TENANT, resource.tenant_id
            yield from ((Kind.ROLE, role_id) for role_id in sorted(resource.roles))
        case ApiKey():
            yield Kind.CLIENT, resource.client_id
        case Role() | AddressRule():
            if resource.tenant_id:
                yield Kind.TENANT, resource.tenant_id
        case IdentityProvider():
            yield Kind.TENANT, resource.tenant_id
            given = {rule.role_id for rule in resource.claim_rules} | resource.default_roles
            yield from ((Kind.ROLE, role_id) for role_id in sorted(given))
        case Plan():
            return


def lookup(resource: Resource) -> str | None:
    """A second name that is unique among its kind."""
    match resource:
        case ApiKey():
            return resource.prefix
        case IdentityProvider():
            return resource.issuer
        case _:
            return None


def without_digests(resource: Resource) -> Resource:
    """As a change shows it."""
    match resource:
        case Client():
            return replace(resource, secret_digest=b"", old_secret_digest=b"")
        case ApiKey():
            return replace(resource, digest=b"")
        case _:
            return resource


def is_text(text: str) -> bool:
    """Whether a store can hold it: Unicode characters, and no NUL, which PostgreSQL does not take."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def texts(value: object) -> Iterator[str]:
    """All texts in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from texts(name)
            yield from texts(entry)
    elif isinstance(value, tuple | list | frozenset):
        for entry in value:
            yield from texts(entry)
    elif is_dataclass(value):
        for one in fields(value):
            yield from texts(getattr(value, one.name))


def tenant_of(resource: Resource, client: Resource | None = None) -> str:
    """The tenant that it belongs to; of a key, that of its client. Empty: it belongs to the deployment."""
    match resource:
        case Plan():
            return ""
        case ApiKey():
            return client.tenant_id if isinstance(client, Client) else ""
        case _:
            return resource.tenant_id


def client_of(resource: Resource) -> str:
    """The client that it is, or is of; empty: neither."""
    return resource.client_id if isinstance(resource, Client | ApiKey) else ""


def passes(filter_: Filter, resource: Resource, client: Resource | None = None) -> bool:
    """Whether a list shows it; `client` is that of a key."""
    if filter_.tenant_ids is not None and tenant_of(resource, client) not in filter_.tenant_ids - {""}:
        return False
    if filter_.client_id and client_of(resource) != filter_.client_id:
        return False
    return not filter_.prefix or (isinstance(resource, ApiKey) and resource.prefix == filter_.prefix)


def named(key: Key) -> str:
    """In a message."""
    shown = key[1] if len(key[1]) <= 64 else f"{key[1][:64]}…"
    return f"{NAMES[key[0]]} {shown!r}"


def lookup_name(kind: Kind) -> str:
    """What `lookup` is called."""
    return "prefix" if kind is Kind.API_KEY else "issuer"
