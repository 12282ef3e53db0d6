"""What may be granted to whom."""

from __future__ import annotations

import itertools

import pytest

from services.auth.grants import policy
from services.mesh.access_token import Audience
from services.mesh.errors import LlmosError, PolicyDenied, RequestInvalid, ScopeMissing
from services.mesh.policy import BUILT_IN_ROLES, SCOPES, Condition, Effect, Role, Rule

ALL = frozenset(SCOPES)
USER = frozenset({"generate", "models.read"})

ALLOWED = {
    ("app", Audience.GATEWAY),
    ("admin", Audience.GATEWAY),
    ("admin", Audience.AUTH),
    ("tenant-admin", Audience.GATEWAY),
    ("tenant-admin", Audience.AUTH),
    ("service:gateway", Audience.AUTH),
    ("service:gateway", Audience.INFERENCE),
    ("service:gateway", Audience.LOGGING),
    ("service:auth", Audience.LOGGING),
    ("service:inference", Audience.AUTH),
    ("service:inference", Audience.LOGGING),
    ("service:logging", Audience.AUTH),
}
CLIENTS = {"app": USER, "admin": ALL, "tenant-admin": ALL - {"admin"}} | {
    f"service:{name}": frozenset[str]() for name in (*policy.SERVICES, "stranger")
}


@pytest.mark.parametrize(("client", "audience"), list(itertools.product(CLIENTS, Audience)))
def test_r26_the_matrix_of_client_and_audience(client: str, audience: Audience) -> None:
    if (client, audience) in ALLOWED:
        assert policy.granted(client, CLIENTS[client], audience, []) == CLIENTS[client]
    else:
        with pytest.raises(LlmosError) as caught:
            policy.granted(client, CLIENTS[client], audience, [])
        assert isinstance(caught.value, PolicyDenied | ScopeMissing)


def test_a_token_may_carry_less() -> None:
    assert policy.granted("app", USER, Audience.GATEWAY, ["generate"]) == {"generate"}
    assert policy.granted("app", USER, Audience.GATEWAY, ["generate", "generate"]) == {"generate"}


def test_but_never_more() -> None:
    with pytest.raises(ScopeMissing) as caught:
        policy.granted("app", USER, Audience.GATEWAY, ["generate", "admin"])
    assert caught.value.metadata == {"scope": "admin"}


def test_nobody_gives_up_admin_and_keeps_auth() -> None:
    with pytest.raises(ScopeMissing):
        policy.granted("admin", ALL, Audience.AUTH, ["generate"])
    assert policy.granted("admin", ALL, Audience.AUTH, ["admin"]) == {"admin"}


def test_a_scope_that_does_not_exist_is_named() -> None:
    with pytest.raises(RequestInvalid) as caught:
        policy.granted("app", USER, Audience.GATEWAY, ["generate", "root", "God"])
    assert [violation.description for violation in caught.value.violations] == [
        "`God` is not a scope",
        "`root` is not a scope",
    ]


def test_a_service_holds_no_scopes() -> None:
    with pytest.raises(ScopeMissing):
        policy.granted("service:gateway", frozenset(), Audience.AUTH, ["admin"])


def test_what_roles_can_reach() -> None:
    def role(effect: Effect, *scopes: str) -> Role:
        return Role("r", rules=(Rule("x", effect, frozenset(scopes), Condition(max_tokens=1)),))

    assert policy.reachable(frozenset(), []) == frozenset()
    assert policy.reachable(frozenset({"generate"}), [role(Effect.ALLOW, "audit.read")]) == {
        "generate",
        "audit.read",
    }
    assert policy.reachable(frozenset(), [role(Effect.ALLOW, "*")]) == ALL
    assert policy.reachable(frozenset(), [role(Effect.DENY, "*")]) == frozenset()
    assert policy.reachable(frozenset({"no.longer"}), [role(Effect.ALLOW, "nor.this")]) == frozenset()
    for built_in in BUILT_IN_ROLES:
        assert policy.reachable(frozenset(), [built_in]) == built_in.scopes
