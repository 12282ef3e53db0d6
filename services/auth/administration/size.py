"""How large the policy may become. Every gateway holds all of it, so nobody may fill it for all others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from services.auth.store import Resource, Tenant
from services.auth.stores import shapes
from services.mesh.errors import StateConflict
from services.mesh.policy import PolicyDocument

MAX_TENANT_BYTES = 512 * 1024
"""Of the roles and address rules of one tenant."""
MAX_POLICY_BYTES = 32 * 1024 * 1024
"""Of all that gateways are told; less than they take (`services.mesh.watch_client.MAX_ANSWER_BYTES`)."""


def check(before: PolicyDocument, planned: Mapping[shapes.Key, Resource | None]) -> None:
    """Raises StateConflict where `planned` (None: it is deleted) would make the policy too large, and larger
    than it is: what is deleted is never refused."""
    if not any(key[0] in shapes.OF_POLICY for key in planned):
        return
    held: tuple[Resource, ...] = (*before.roles, *before.address_rules, *before.plans)
    known = {shapes.key_of(one): one for one in held}
    after = dict(known)
    for key, resource in planned.items():
        if key[0] not in shapes.OF_POLICY:
            continue
        after.pop(key, None)
        if resource is not None:
            after[key] = resource
    was, will = _bytes_by_owner(known), _bytes_by_owner(after)
    for owner in sorted(will):
        if owner and will[owner] > max(MAX_TENANT_BYTES, was[owner]):
            raise _too_large(f"of the tenant `{owner}`", will[owner], MAX_TENANT_BYTES)
    # Tenants are small and of one size; the document has no more of them than that.
    tenants = sum(1 for key, one in planned.items() if isinstance(one, Tenant)) + len(before.tenants)
    total = will.total() + tenants * 256
    if total > max(MAX_POLICY_BYTES, was.total() + len(before.tenants) * 256):
        raise _too_large("of the deployment", total, MAX_POLICY_BYTES)


def _bytes_by_owner(resources: Mapping[shapes.Key, Resource]) -> Counter[str]:
    """By tenant; empty: the deployment's. A text form, which is longer than what is sent."""
    found: Counter[str] = Counter()
    for resource in resources.values():
        if not isinstance(resource, Tenant):
            found[shapes.tenant_of(resource)] += len(repr(resource).encode("utf-8", "replace"))
    return found


def _too_large(whose: str, size: int, limit: int) -> StateConflict:
    return StateConflict(
        f"The roles and address rules {whose} would take {size // 1024} KiB, and the limit is "
        f"{limit // 1024} KiB.",
        hint="Use `*` in model ids and wider CIDR blocks, or delete what is not used.",
    )
