"""The policy stays so small that every gateway can hold it: one tenant cannot fill it for all others."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from services.auth.administration import size
from services.auth.store import Kind, Resource
from services.auth.stores import shapes
from services.mesh.errors import StateConflict
from services.mesh.policy import (
    AddressRule,
    Condition,
    Effect,
    PolicyDocument,
    Role,
    Rule,
    TenantPolicy,
)
from services.mesh.policy_codec import document_message
from services.mesh.watch_client import MAX_ANSWER_BYTES


def role(role_id: str, tenant_id: str, rules: int) -> Role:
    """Of about 35 KB for each rule, the most that a rule may have."""
    condition = Condition(models=tuple(f"{n:03d}".ljust(128, "x") for n in range(256)))
    made = (Rule(f"r{n}", Effect.ALLOW, frozenset({"generate"}), condition) for n in range(rules))
    return Role(role_id, tenant_id, rules=tuple(made))


def planned(*resources: Resource) -> dict[shapes.Key, Resource | None]:
    return {shapes.key_of(one): one for one in resources}


def test_one_tenant_cannot_fill_the_policy() -> None:
    before = PolicyDocument(roles=(role("mine", "acme", 10),), tenants=(TenantPolicy("acme"),))
    size.check(before, planned(role("more", "acme", 2)))
    size.check(before, planned(role("other", "globex", 10)))
    with pytest.raises(StateConflict, match=r"of the tenant `acme` would take \d+ KiB"):
        size.check(before, planned(role("more", "acme", 10)))


def test_what_is_too_large_already_can_only_shrink() -> None:
    before = PolicyDocument(roles=(role("mine", "acme", 40),))
    size.check(before, {(Kind.ROLE, "mine"): None})
    size.check(before, planned(role("mine", "acme", 39)))
    with pytest.raises(StateConflict):
        size.check(before, planned(role("mine", "acme", 41)))


def test_what_fits_fits_into_one_answer() -> None:
    """The measure is never less than what is sent."""
    roles = tuple(role(f"role-{n}", f"tenant-{n}", 14) for n in range(60))
    rules = tuple(
        AddressRule(f"rule-{n}", Effect.DENY, ip_network(f"10.{n // 256}.{n % 256}.0/24"))
        for n in range(5000)
    )
    document = PolicyDocument(roles=roles, address_rules=rules)
    size.check(PolicyDocument(), planned(*roles, *rules))
    sent = document_message(document).ByteSize()
    measured = sum(len(repr(one).encode()) for one in (*roles, *rules))
    assert sent <= measured <= size.MAX_POLICY_BYTES < MAX_ANSWER_BYTES
    more = tuple(role(f"more-{n}", f"tenant-{n}", 14) for n in range(100, 160))
    with pytest.raises(StateConflict, match="of the deployment"):
        size.check(document, planned(*more))


def test_what_is_no_policy_is_not_measured() -> None:
    before = PolicyDocument(roles=(role("mine", "acme", 40),))
    size.check(before, {(Kind.CLIENT, "app"): None})
