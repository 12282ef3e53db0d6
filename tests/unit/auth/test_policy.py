"""What may be granted to whom."""

from __future__ import annotations

import itertools

import pytest

from services.auth import policy
from services.mesh.access_token import Audience
from services.mesh.errors import LlmosError, PolicyDenied, RequestInvalid, ScopeMissing

ALL = frozenset(policy.SCOPES)
USER = frozenset({"generate", "models.read"})

ALLOWED = {
    ("app", Audience.GATEWAY),
    ("admin", Audience.GATEWAY),
    ("admin", Audience.AUTH),
    ("service:gateway", Audience.AUTH),
    ("service:gateway", Audience.INFERENCE),
    ("service:gateway", Audience.LOGGING),
    ("service:auth", Audience.LOGGING),
    ("service:inference", Audience.AUTH),
    ("service:inference", Audience.LOGGING),
    ("service:logging", Audience.AUTH),
}
CLIENTS = {"app": USER, "admin": ALL} | {
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
