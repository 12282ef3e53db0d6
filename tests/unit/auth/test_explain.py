"""ExplainDecision: it speaks of the identity that a token would carry, and decides as the gateway does."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from msgspec import structs

from services.auth.administration.callers import By
from services.auth.administration.explain import Explanation, identity_of
from services.auth.credentials import keys
from services.auth.store import Kind
from services.mesh.context import Identity
from services.mesh.decision import Decision, Facts
from services.mesh.errors import NotFound, RequestInvalid
from services.mesh.policy import AddressRule, Condition, Effect, Role, Rule
from services.mesh.policy_codec import network_of
from tests.framework.administration import ALL

if TYPE_CHECKING:
    from conftest import Auth

GENERATE = "/llmos.gateway.v1.GenerationService/Generate"
SMALL = Rule("small", Effect.ALLOW, frozenset({"generate"}), Condition(models=("small-*",)))
OFFICE = network_of("10.0.0.0/8", "cidr")


@pytest.fixture
async def office(auth: Auth) -> Auth:
    await auth.tenant("default")
    await auth.client("root", "default", scopes=ALL)
    await auth.tenant("acme")
    await auth.tenant("other")
    await auth.put(
        Role("small-models", "acme", rules=(SMALL,)),
        Role("theirs", "other", scopes=frozenset({"audit.read"})),
        AddressRule("office", Effect.ALLOW, OFFICE, "acme"),
    )
    return auth


async def explain(auth: Auth, kind: Kind, resource_id: str, method: str = GENERATE, **facts: Any) -> Decision:
    asked = Facts(**({"at": auth.clock.now(), "address": "10.1.1.1"} | facts))
    root = By(Identity("default", "root", scopes=ALL))
    return await Explanation(auth.store, auth.clock).explain(root, (kind, resource_id), method, asked)


@pytest.mark.parametrize("roles", [(), ("user",), ("small-models", "theirs"), ("theirs",)])
@pytest.mark.parametrize("limits", [{}, {"scopes": frozenset({"generate"}), "models": ("a*",)}])
async def test_it_is_the_identity_of_a_token(
    office: Auth, roles: tuple[str, ...], limits: dict[str, Any]
) -> None:
    scopes = frozenset({"generate", "models.read"})
    await office.client("app", "acme", scopes=scopes, roles=frozenset(roles))
    text = await office.key("app", addresses=(OFFICE,), **limits)
    signed = await office.exchange.by_api_key(text)
    token = (await office.verify(signed.token)).identity()
    found = await office.store.find_api_key(keys.parse_api_key(text).prefix)
    assert found is not None
    _, document = await office.store.policy()
    by_id = {role.role_id: role for role in document.roles}
    said = identity_of(found[1], found[0], by_id)
    assert structs.replace(token, token_id="", issued_at_s=0) == said


async def test_says_which_rule_decides(office: Auth) -> None:
    await office.client("app", "acme", scopes=frozenset(), roles=frozenset({"small-models"}))
    await office.key("app", models=("small-1",))
    allowed = await explain(office, Kind.CLIENT, "app", model="small-2")
    assert (allowed.allowed, allowed.rule) == (True, "role small-models, rule small")
    assert not (await explain(office, Kind.CLIENT, "app", model="large")).allowed
    assert (await explain(office, Kind.API_KEY, "key_0", model="small-2")).rule == "key models"
    refused = await explain(office, Kind.CLIENT, "app", model="small-2", address="192.0.2.1")
    assert not refused.allowed
    assert not (await explain(office, Kind.CLIENT, "app", "/no.such/Method")).allowed
    assert (await explain(office, Kind.CLIENT, "app", "/llmos.auth.v1.TokenService/GetJwks")).allowed


async def test_says_where_there_would_be_no_token(office: Auth) -> None:
    await office.client("app", "acme")
    await office.key("app", expires_at=office.clock.now() + timedelta(days=1))
    later = office.clock.now() + timedelta(days=2)
    assert (await explain(office, Kind.API_KEY, "key_0")).allowed
    assert (await explain(office, Kind.API_KEY, "key_0", at=later)).rule == "expired"
    await office.change(Kind.TENANT, "acme", disabled=True)
    said = await explain(office, Kind.API_KEY, "key_0")
    assert (said.rule, "'acme'" in said.explanation) == ("disabled", True)


async def test_asks_for_somebody_who_exists(office: Auth) -> None:
    with pytest.raises(NotFound):
        await explain(office, Kind.CLIENT, "nobody")
    with pytest.raises(RequestInvalid):
        await explain(office, Kind.TENANT, "acme")
