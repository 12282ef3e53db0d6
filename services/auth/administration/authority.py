"""What an administrator may do. Pure: everything that it depends on is given.

`admin` may do everything. `tenant.admin` manages clients, keys, roles and address rules of its own tenant and
of its projects; it gives nobody more than it has itself without condition, and what it may not see is to it
as if it did not exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.auth.administration.resources import there_is_no
from services.auth.grants import policy
from services.auth.store import Client, Kind, Resource, Tenant
from services.auth.stores import shapes
from services.mesh.context import Identity
from services.mesh.errors import PolicyDenied, ScopeMissing
from services.mesh.policy import ADMIN, EVERY_SCOPE, SCOPES, TENANT_ADMIN, Effect, Role

OF_TENANTS = frozenset({Kind.CLIENT, Kind.API_KEY, Kind.ROLE, Kind.ADDRESS_RULE})
"""What the administrator of a tenant manages."""


def usable(role: Role, tenant: Tenant) -> bool:
    """Whether a client of the tenant can have the role: another's gives nothing."""
    return role.tenant_id in ("", tenant.tenant_id, tenant.parent_id)


def roles_of(client: Client, tenant: Tenant, roles: Mapping[str, Role]) -> tuple[Role, ...]:
    """The client's roles that exist and can be its."""
    found = (roles.get(role_id) for role_id in sorted(client.roles))
    return tuple(role for role in found if role is not None and usable(role, tenant))


def reach(client: Client, tenant: Tenant, roles: Mapping[str, Role]) -> frozenset[str]:
    """The scopes that the client could use, if only under conditions."""
    return policy.reachable(client.scopes, roles_of(client, tenant, roles))


def unconditional(direct: frozenset[str], roles: Iterable[Role]) -> frozenset[str]:
    """The scopes that are held whatever the request is: allowed without condition, and named by no rule that
    denies."""
    held, denied = set(direct), set[str]()
    for role in roles:
        held |= role.scopes
        for rule in role.rules:
            if rule.effect is Effect.DENY:
                denied |= SCOPES.keys() if EVERY_SCOPE in rule.scopes else rule.scopes
    return frozenset((held & SCOPES.keys()) - denied)


@dataclass(frozen=True, slots=True)
class Administrator:
    """Who asks, as the store knows it now."""

    identity: Identity
    tenants: frozenset[str] | None
    """Whose things it manages; None: everybody's."""
    grants: frozenset[str] = frozenset()
    """The most that it may give to others."""
    roles: frozenset[str] = frozenset()
    """Its own."""

    @classmethod
    def of(
        cls,
        identity: Identity,
        client: Client,
        tenant: Tenant,
        roles: Mapping[str, Role],
        *,
        projects: Iterable[str] = (),
        is_limited_to_models: bool = False,
    ) -> Administrator:
        """Raises ScopeMissing where the credential, or by now the client, is no administrator's."""
        held = identity.scopes & reach(client, tenant, roles)
        if ADMIN in held:
            return cls(identity, None, frozenset(SCOPES), client.roles)
        if TENANT_ADMIN not in held:
            raise ScopeMissing(
                f"Administration needs the scope `{ADMIN}` or `{TENANT_ADMIN}`.", metadata={"scope": ADMIN}
            )
        grants = identity.scopes & unconditional(client.scopes, roles_of(client, tenant, roles))
        if is_limited_to_models:
            grants -= {"generate"}
        return cls(identity, frozenset({tenant.tenant_id, *projects}), grants - {ADMIN}, client.roles)

    @property
    def is_admin(self) -> bool:
        """Whether it may do everything."""
        return self.tenants is None

    @property
    def actor(self) -> str:
        """As changes name it."""
        return f"{self.identity.tenant_id}/{self.identity.client_id}"

    # -- what it sees ------------------------------------------------------------------------------------

    def sees(self, resource: Resource, tenant_id: str) -> bool:
        """Whether the resource exists for it; `tenant_id` is the owner's, of a key that of its client."""
        if self.tenants is None:
            return True
        match shapes.key_of(resource)[0]:
            case Kind.PLAN:
                return True
            case Kind.ROLE if tenant_id == "":
                return True
            case Kind.IDENTITY_PROVIDER:
                return False
            case _:
                return tenant_id in self.tenants

    def require_sees(self, resource: Resource, tenant_id: str) -> None:
        """Raises NotFound, as for what does not exist."""
        if not self.sees(resource, tenant_id):
            there_is_no(shapes.key_of(resource))

    def require_everything(self, what: str) -> None:
        """Raises ScopeMissing for all but `admin`."""
        if not self.is_admin:
            raise ScopeMissing(
                f"{what} needs the scope `{ADMIN}`.",
                hint="Ask an administrator of the deployment.",
                metadata={"scope": ADMIN},
            )

    # -- what it changes ---------------------------------------------------------------------------------

    def require_manages(self, resource: Resource, tenant_id: str) -> None:
        """Whether it may make, change or delete such a thing at all. Raises NotFound where it may not know of
        it, else ScopeMissing."""
        if self.tenants is None:
            return
        kind = shapes.key_of(resource)[0]
        if kind in OF_TENANTS and tenant_id in self.tenants:
            return
        if kind in OF_TENANTS and tenant_id:
            there_is_no((Kind.TENANT, tenant_id))
        self.require_everything(f"To change {shapes.named(shapes.key_of(resource))}")

    def require_may_give(self, scopes: frozenset[str], what: str) -> None:
        """Raises PolicyDenied where somebody would get more than it has itself without condition."""
        if self.tenants is None:
            return
        more = sorted(scopes - self.grants)
        if more:
            raise PolicyDenied(
                f"{what} would reach the scope `{more[0]}`, which you do not hold without condition.",
                hint="An administrator of a tenant gives no more than it has.",
                metadata={"scope": more[0]},
            )

    def require_not_above(self, reached: frozenset[str], what: str) -> None:
        """Raises PolicyDenied where the administrator of a tenant lays hands on one of the deployment."""
        if self.tenants is not None and ADMIN in reached:
            raise PolicyDenied(
                f"{what} reaches the scope `{ADMIN}`: only an administrator of the deployment changes it.",
                hint="Ask an administrator of the deployment.",
            )

    def require_not_own(self, is_own: bool, what: str) -> None:
        """Raises PolicyDenied where the administrator of a tenant would change what it may do itself."""
        if self.tenants is not None and is_own:
            raise PolicyDenied(
                f"You cannot change {what}: it says what you may do yourself.",
                hint="Ask another administrator.",
            )
