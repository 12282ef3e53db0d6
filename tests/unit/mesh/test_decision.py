"""What policy allows: examples of each rule."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import ip_network
from zoneinfo import ZoneInfo

import pytest

from services.mesh.actions import ACTIONS, Action
from services.mesh.context import Identity
from services.mesh.decision import Decision, Facts, PolicyEngine
from services.mesh.policy import (
    BUILT_IN_ROLES,
    AddressRule,
    Condition,
    Effect,
    PolicyDocument,
    Role,
    Rule,
    TenantPolicy,
    TimeWindow,
)
from services.mesh.policy_codec import (
    document_message,
    document_of,
)

MONDAY = datetime(2030, 1, 7, 12, 0, tzinfo=UTC)
GENERATE = Action("/t/Generate", ("generate",), per_request=True)
MANAGE = Action("/t/Manage", ("admin", "tenant.admin"))
ANYTHING = Action("/t/Anything", ())
ALLOW, DENY = Effect.ALLOW, Effect.DENY
TENANTS = (TenantPolicy("org"), TenantPolicy("acme", parent_id="org"), TenantPolicy("evil"))


def rule(rule_id: str, effect: Effect, scope: str = "generate", **condition: object) -> Rule:
    return Rule(rule_id, effect, frozenset({scope}), Condition(**condition))  # type: ignore[arg-type]


def engine(*rules: Rule, addresses: tuple[AddressRule, ...] = (), tenant_id: str = "") -> PolicyEngine:
    role = Role("custom", tenant_id, rules=rules)
    return PolicyEngine(PolicyDocument((*BUILT_IN_ROLES, role), addresses, TENANTS), 7)


def caller(*roles: str, scopes: str = "generate", direct: str | None = "", **limits: object) -> Identity:
    return Identity(
        "acme",
        "alice",
        scopes=frozenset(scopes.split()),
        roles=frozenset(roles),
        direct_scopes=None if direct is None else frozenset(direct.split()),
        **limits,  # type: ignore[arg-type]
    )


def facts(**known: object) -> Facts:
    return Facts(**{"at": MONDAY, "address": "10.1.2.3", **known})  # type: ignore[arg-type]


def decide(policy: PolicyEngine, identity: Identity, action: Action = GENERATE, **known: object) -> Decision:
    return policy.decide(identity, action, facts(**known))


# -- who grants ------------------------------------------------------------------------------------------


def test_a_client_without_roles_may_do_what_its_scopes_say() -> None:
    decision = decide(engine(), caller(direct=None))
    assert decision == (True, "client scope generate", "The credential has the scope `generate`.", "")


def test_a_role_allows_its_scopes_up_to_those_of_the_credential() -> None:
    assert decide(engine(), caller("user")).rule == "role user"
    lacking = decide(engine(), caller("user", scopes="models.read"))
    assert (lacking.allowed, lacking.missing_scope) == (False, "generate")


def test_nothing_is_allowed_by_default() -> None:
    refused = decide(engine(), caller())
    assert (refused.allowed, refused.rule, refused.missing_scope) == (False, "default", "generate")
    assert decide(engine(), caller("nowhere")).missing_scope == "generate"


def test_one_of_several_scopes_is_enough_and_the_least_is_named_where_none_is_there() -> None:
    assert decide(engine(), caller(scopes="tenant.admin", direct=None), MANAGE).allowed
    assert decide(engine(), caller(direct=None), MANAGE).missing_scope == "tenant.admin"


def test_any_credential_will_do_for_an_action_without_scopes_unless_everything_is_denied() -> None:
    assert decide(engine(), caller(scopes=""), ANYTHING).rule == "default"
    denied = decide(engine(rule("stop", DENY, "*")), caller("custom", scopes=""), ANYTHING)
    assert (denied.allowed, denied.rule) == (False, "role custom, rule stop")


def test_an_allowing_rule_holds_under_its_condition_alone() -> None:
    policy = engine(rule("small", ALLOW, models=("small-*",)))
    allowed = decide(policy, caller("custom"), model="small-1")
    assert (allowed.allowed, allowed.rule) == (True, "role custom, rule small")
    refused = decide(policy, caller("custom"), model="big")
    assert (refused.allowed, refused.rule, refused.missing_scope) == (False, "default", "")


def test_deny_is_over_allow_whatever_allows() -> None:
    policy = engine(rule("all", ALLOW), rule("no-big", DENY, models=("big",)))
    for identity in (caller("custom"), caller("custom", "user"), caller("custom", direct="generate")):
        refused = decide(policy, identity, model="big")
        assert (refused.allowed, refused.rule) == (False, "role custom, rule no-big")
        assert "no-big" in refused.explanation
        assert decide(policy, identity, model="small").allowed


def test_a_denied_scope_denies_the_action_where_another_scope_would_do() -> None:
    policy = engine(rule("no", DENY, "tenant.admin"))
    assert not decide(policy, caller("custom", scopes="admin tenant.admin", direct="admin"), MANAGE).allowed


@pytest.mark.parametrize(("owner", "allowed"), [("", True), ("acme", True), ("org", True), ("evil", False)])
def test_another_tenants_role_gives_nothing_and_still_denies(owner: str, allowed: bool) -> None:
    assert decide(engine(rule("all", ALLOW), tenant_id=owner), caller("custom")).allowed is allowed
    denying = engine(rule("none", DENY), tenant_id=owner)
    assert not decide(denying, caller("custom", direct="generate")).allowed


def test_an_engine_is_prepared_for_what_the_one_before_was_asked() -> None:
    before, after = engine(rule("all", ALLOW)), engine(rule("none", DENY))
    assert decide(before, caller("custom")).allowed
    after.prepare_for(before)
    assert decide(before, caller("custom")).allowed
    assert not decide(after, caller("custom", direct="generate")).allowed


# -- conditions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "model", "matches"),
    [
        ("llama", "llama", True),
        ("llama", "llama-2", False),
        ("*", "", True),
        ("llama-*", "llama-", True),
        ("*-it", "gemma-it", True),
        ("a*b*c", "a-b-b-c", True),
        ("a*b*c", "acb", False),
        ("ab*ba", "aba", False),
        ("org/*", "org/model\nx", True),
        ("[a]*", "a", False),
    ],
)
def test_a_star_stands_for_any_characters(pattern: str, model: str, matches: bool) -> None:
    policy = engine(rule("m", ALLOW, models=("other", pattern)))
    assert decide(policy, caller("custom"), model=model).allowed is matches
    limited = decide(engine(), caller(direct=None, models=("other", pattern)), model=model)
    assert limited.allowed is matches
    assert limited.rule == ("client scope generate" if matches else "key models")


def test_many_stars_take_no_time() -> None:
    policy = engine(rule("m", ALLOW, models=("a*" * 60 + "b",)))
    assert not decide(policy, caller("custom"), model="a" * 127 + "c").allowed


def test_tasks_labels_and_addresses() -> None:
    policy = engine(
        rule(
            *("r", ALLOW),
            tasks=("chat", "summarize"),
            labels={"team": "blue", "env": "prod"},
            addresses=(ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")),
        )
    )
    known: dict[str, object] = {"task": "chat", "labels": {"team": "blue", "env": "prod", "more": ""}}
    assert decide(policy, caller("custom"), **known).allowed
    assert decide(policy, caller("custom"), **known, address="2001:db8::1").allowed
    assert decide(policy, caller("custom"), **known, address="::ffff:10.0.0.1").allowed
    for other in (
        {"task": "translate"},
        {"labels": {"team": "blue"}},
        {"labels": {"team": "red", "env": "prod"}},
        {"address": "11.0.0.1"},
        {"address": ""},
        {"address": "unix"},
    ):
        assert not decide(policy, caller("custom"), **{**known, **other}).allowed


def test_an_allowing_rule_holds_up_to_max_tokens_and_a_denying_one_above() -> None:
    policy = engine(rule("some", ALLOW, max_tokens=100))
    assert decide(policy, caller("custom"), max_tokens=100).allowed
    assert not decide(policy, caller("custom"), max_tokens=101).allowed
    policy = engine(rule("much", DENY, max_tokens=100))
    assert decide(policy, caller("custom", "user"), max_tokens=100).allowed
    assert not decide(policy, caller("custom", "user"), max_tokens=101).allowed


def test_what_is_not_known_yet_may_still_be_allowed_and_is_not_denied_yet() -> None:
    policy = engine(
        rule("a", ALLOW, models=("small",), tasks=("chat",), max_tokens=10, labels={"a": "b"}),
        rule("d", DENY, models=("big",)),
    )
    assert decide(policy, caller("custom")).allowed
    assert decide(policy, caller("custom"), model="small").allowed
    assert not decide(policy, caller("custom"), model="other").allowed
    late = engine(rule("d", DENY, times=(TimeWindow(start_minute=0, end_minute=600),)))
    assert decide(late, caller("custom", "user")).allowed
    assert not decide(late, caller("custom", "user"), at=MONDAY.replace(hour=9)).allowed


BERLIN = "Europe/Berlin"


@pytest.mark.parametrize(
    ("window", "local", "fold", "is_open"),
    [
        (TimeWindow(), "2030-01-07 00:00", 0, True),
        (TimeWindow((1,), 540, 1020), "2030-01-07 09:00", 0, True),
        (TimeWindow((1,), 540, 1020), "2030-01-07 17:00", 0, False),
        (TimeWindow((2,), 540, 1020), "2030-01-07 09:00", 0, False),
        # past midnight: Friday's window is open on Saturday morning, Saturday's own is not there
        (TimeWindow((5,), 1320, 360), "2030-01-11 22:00", 0, True),
        (TimeWindow((5,), 1320, 360), "2030-01-12 05:59", 0, True),
        (TimeWindow((5,), 1320, 360), "2030-01-12 06:00", 0, False),
        (TimeWindow((5,), 1320, 360), "2030-01-12 22:00", 0, False),
        (TimeWindow((7,), 1320, 360), "2030-01-14 03:00", 0, True),  # Sunday into Monday
        (TimeWindow((1,), 1320, 0), "2030-01-07 23:59", 0, True),
        (TimeWindow((1,), 1320, 0), "2030-01-08 00:00", 0, False),
        # clocks go back on 2030-10-27 at 03:00: 02:30 is there twice, and forward on 2030-03-31 at 02:00
        (TimeWindow((7,), 120, 180), "2030-10-27 02:30", 0, True),
        (TimeWindow((7,), 120, 180), "2030-10-27 02:30", 1, True),
        (TimeWindow((7,), 180, 240), "2030-10-27 02:59", 1, False),
        (TimeWindow((7,), 120, 180), "2030-03-31 01:59", 0, False),
        (TimeWindow((7,), 120, 180), "2030-03-31 03:00", 0, False),
        (TimeWindow((7,), 180, 240), "2030-03-31 03:00", 0, True),
    ],
)
def test_time_windows_follow_the_clock_on_the_wall(
    window: TimeWindow, local: str, fold: int, is_open: bool
) -> None:
    there = datetime.fromisoformat(local).replace(tzinfo=ZoneInfo(BERLIN), fold=fold)
    policy = engine(rule("t", ALLOW, times=(replace(window, time_zone=BERLIN),)))
    assert decide(policy, caller("custom"), at=there.astimezone(UTC)).allowed is is_open


def test_a_zone_that_this_machine_does_not_know_allows_nothing_and_denies() -> None:
    window = TimeWindow(time_zone="Nowhere/City")
    assert not decide(engine(rule("t", ALLOW, times=(window,))), caller("custom")).allowed
    assert not decide(engine(rule("t", DENY, times=(window,))), caller("custom", "user")).allowed
    document = engine(rule("t", DENY, times=(window,))).document
    assert document_of(document_message(document)) == document


# -- addresses -------------------------------------------------------------------------------------------


def gate(rule_id: str, effect: Effect, block: str, tenant_id: str = "") -> AddressRule:
    return AddressRule(rule_id, effect, ip_network(block), tenant_id)


def test_an_address_rule_that_denies_is_over_those_that_allow() -> None:
    policy = engine(
        addresses=(
            gate("in", ALLOW, "10.0.0.0/8"),
            gate("b", DENY, "10.1.0.0/16"),
            gate("a", DENY, "10.1.2.3"),
        )
    )
    refused = decide(policy, caller(direct=None))
    assert (refused.allowed, refused.rule) == (False, "address rule a")
    assert decide(policy, caller(direct=None), address="10.2.0.1").allowed
    outside = decide(policy, caller(direct=None), address="192.0.2.1")
    assert (outside.allowed, outside.rule, outside.missing_scope) == (False, "default", "")
    assert not decide(policy, caller(direct=None), address="").allowed


@pytest.mark.parametrize(("owner", "counts"), [("", True), ("org", True), ("acme", True), ("evil", False)])
def test_address_rules_count_for_their_tenant_and_its_projects(owner: str, counts: bool) -> None:
    policy = engine(addresses=(gate("a", DENY, "10.0.0.0/8", owner),))
    assert decide(policy, caller(direct=None)).allowed is not counts


def test_each_owners_allowing_rules_must_let_the_address_in() -> None:
    policy = engine(
        addresses=(gate("o", ALLOW, "10.0.0.0/8", "org"), gate("t", ALLOW, "10.1.0.0/16", "acme"))
    )
    assert decide(policy, caller(direct=None)).allowed
    assert not decide(policy, caller(direct=None), address="10.2.0.1").allowed
    assert not decide(policy, caller(direct=None), address="11.0.0.1").allowed


def test_a_key_is_limited_to_its_addresses_and_models() -> None:
    limited = caller(direct=None, addresses=(ip_network("10.1.2.3/32"),), models=("small",))
    assert decide(engine(), limited, model="small").allowed
    assert decide(engine(), limited).allowed
    assert decide(engine(), limited, address="::ffff:10.1.2.3").allowed
    assert decide(engine(), limited, address="10.1.2.4").rule == "key addresses"
    assert decide(engine(), limited, model="big").rule == "key models"


def test_memory_of_many_callers_is_bounded_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_CALLERS", "MAX_VIEWS", "MAX_KEY_LIMITS"):
        monkeypatch.setattr(f"services.mesh.decision.{name}", 2)
    policy = engine(rule("all", ALLOW))
    for _ in range(2):
        for number in range(5):
            network = ip_network(f"10.1.2.{number}/32")
            limited = caller("custom", f"r{number}", "user", addresses=(network,))
            assert decide(policy, limited, address=f"10.1.2.{number}").allowed
            assert not decide(policy, limited, address="10.1.2.99").allowed
            assert not decide(policy, caller(f"r{number}")).allowed


def test_actions_name_their_own_method() -> None:
    assert all(action.method == method for method, action in ACTIONS.items())
