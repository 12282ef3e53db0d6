"""What may be said of each kind of resource: which fields there are, and which of them may change."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NoReturn

from services.auth.store import (
    ApiKey,
    Client,
    IdentityProvider,
    Kind,
    Resource,
    Tenant,
)
from services.auth.stores import shapes
from services.mesh.errors import NotFound, RequestInvalid, Violation
from services.mesh.policy import BUILT_IN_PLANS, BUILT_IN_ROLES, AddressRule, Plan, Role

KINDS: Mapping[type[Resource], Kind] = MappingProxyType(
    {
        Plan: Kind.PLAN,
        Tenant: Kind.TENANT,
        Role: Kind.ROLE,
        AddressRule: Kind.ADDRESS_RULE,
        IdentityProvider: Kind.IDENTITY_PROVIDER,
        Client: Kind.CLIENT,
        ApiKey: Kind.API_KEY,
    }
)
ORDER: Mapping[Kind, int] = MappingProxyType({kind: place for place, kind in enumerate(Kind)})
"""In which they can be made."""

CHANGEABLE: Mapping[Kind, Mapping[str, str]] = MappingProxyType(
    {
        Kind.PLAN: {"description": "description", "limits": "limits"},
        Kind.TENANT: {
            "parent_id": "parent_id",
            "display_name": "display_name",
            "plan_id": "plan_id",
            "disabled": "disabled",
        },
        Kind.ROLE: {"description": "description", "scopes": "scopes", "rules": "rules"},
        Kind.ADDRESS_RULE: {"effect": "effect", "cidr": "network", "description": "description"},
        Kind.IDENTITY_PROVIDER: {
            "issuer": "issuer",
            "audience": "audience",
            "default_roles": "default_roles",
            "claim_rules": "claim_rules",
            "disabled": "disabled",
        },
        Kind.CLIENT: {
            "kind": "is_user",
            "display_name": "display_name",
            "scopes": "scopes",
            "roles": "roles",
            "jwks_json": "jwks_json",
            "disabled": "disabled",
        },
        Kind.API_KEY: {
            "display_name": "display_name",
            "scopes": "scopes",
            "models": "models",
            "addresses": "addresses",
            "expire_time": "expires_at",
            "disabled": "disabled",
        },
    }
)
"""By the name of the field in the proto, the attribute here."""
FIXED: Mapping[Kind, Mapping[str, str]] = MappingProxyType(
    {
        Kind.PLAN: {},
        Kind.TENANT: {},
        Kind.ROLE: {"tenant_id": "tenant_id"},
        Kind.ADDRESS_RULE: {"tenant_id": "tenant_id"},
        Kind.IDENTITY_PROVIDER: {"tenant_id": "tenant_id"},
        Kind.CLIENT: {"tenant_id": "tenant_id"},
        Kind.API_KEY: {"client_id": "client_id"},
    }
)
"""Those that never change after it was made."""
_MADE: Mapping[Kind, frozenset[str]] = MappingProxyType(
    {
        Kind.CLIENT: frozenset({"secret_sha256", "external_subject"}),
        Kind.API_KEY: frozenset({"prefix", "last_use_time", "secret_sha256"}),
    }
)
"""Those that no update sets."""


@dataclass(frozen=True, slots=True)
class Given:
    """A resource as an administrator gives it."""

    resource: Resource
    """What is made here (a key's id, prefix and digest) may be empty."""
    expected_version: int | None = None
    """Of what it shall replace, as its etag says."""

    @property
    def key(self) -> shapes.Key:
        return shapes.key_of(self.resource)


def built_in(kind: Kind) -> Mapping[str, Resource]:
    """What comes with llmos, by id."""
    if kind is Kind.ROLE:
        return {role.role_id: role for role in BUILT_IN_ROLES}
    if kind is Kind.PLAN:
        return {plan.plan_id: plan for plan in BUILT_IN_PLANS}
    return {}


def merged(before: Resource, given: Resource, paths: Collection[str]) -> Resource:
    """`before` with the fields that `paths` names taken from `given`; without paths all that may change.

    Raises RequestInvalid, which names each path that does not exist or cannot change, and where no paths are
    given each fixed field that differs.
    """
    kind = shapes.key_of(before)[0]
    changeable, fixed = CHANGEABLE[kind], FIXED[kind]
    violations = [
        Violation(f"update_mask.paths[{index}]", _why_not(kind, path))
        for index, path in enumerate(paths)
        if path not in changeable
    ]
    if not paths:
        violations += [
            Violation(f"resource.{kind.value}.{name}", "never changes; make another one")
            for name, attribute in fixed.items()
            if getattr(given, attribute) != getattr(before, attribute)
        ]
    if violations:
        raise RequestInvalid(
            f"The {shapes.NAMES[kind]} cannot be changed so: {violations[0].field} "
            f"{violations[0].description}.",
            violations=violations,
        )
    attributes = [changeable[path] for path in paths] or list(changeable.values())
    changes: dict[str, Any] = {attribute: getattr(given, attribute) for attribute in attributes}
    return replace(before, **changes)


def _why_not(kind: Kind, path: str) -> str:
    shown = path[:64]
    if path in FIXED[kind] or path == "id":
        return f"`{shown}` never changes"
    if path in _MADE.get(kind, ()):
        return f"`{shown}` is not set by an update"
    return f"`{shown}` is not a field of a {shapes.NAMES[kind]}; those that change are " + ", ".join(
        f"`{name}`" for name in CHANGEABLE[kind]
    )


def there_is_no(key: shapes.Key) -> NoReturn:
    """Raises NotFound: one and the same for what does not exist and for what is another's."""
    raise NotFound(f"There is no {shapes.named(key)}.")
