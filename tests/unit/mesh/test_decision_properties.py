"""What holds of any policy, and the engine against a reference that asks one rule after the other."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from ipaddress import ip_address, ip_network
from zoneinfo import ZoneInfo

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from services.mesh.actions import Action
from services.mesh.context import Identity
from services.mesh.decision import Facts, PolicyEngine
from services.mesh.policy import (
    BUILT_IN_PLANS,
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

GENERATE = Action("/t/Generate", ("generate",), per_request=True)
MANAGE = Action("/t/Manage", ("admin", "tenant.admin"))
ANYTHING = Action("/t/Anything", ())
ALLOW, DENY = Effect.ALLOW, Effect.DENY
TENANTS = (TenantPolicy("org"), TenantPolicy("acme", parent_id="org"), TenantPolicy("evil"))
BERLIN = "Europe/Berlin"
PATIENT = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
SCOPES = ("generate", "models.read", "tenant.admin")
MODELS = ("a", "ab", "abc", "b")
LABELS = st.dictionaries(st.sampled_from("xy"), st.sampled_from("12"), max_size=2)
BLOCKS = st.sampled_from(
    [*map(ip_network, ("0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3", "::/0", "2001:db8::/32"))]
)
WINDOWS = st.builds(
    TimeWindow,
    days=st.lists(st.integers(1, 7), unique=True, max_size=3).map(tuple),
    start_minute=st.integers(0, 1439),
    end_minute=st.integers(0, 1440),
    time_zone=st.sampled_from(["", "UTC", BERLIN, "America/St_Johns", "Pacific/Apia"]),
).filter(lambda window: window.start_minute != window.end_minute)
CONDITIONS = st.builds(
    Condition,
    models=st.lists(st.sampled_from([*MODELS, "*", "a*", "*b", "a*c", "*b*"]), max_size=2).map(tuple),
    tasks=st.lists(st.sampled_from(["chat", "translate"]), max_size=1).map(tuple),
    addresses=st.lists(BLOCKS, max_size=2).map(tuple),
    times=st.lists(WINDOWS, max_size=2).map(tuple),
    max_tokens=st.sampled_from([0, 0, 10, 20]),
    labels=LABELS,
)
EFFECTS = st.sampled_from(Effect)
RULES = st.builds(
    Rule,
    rule_id=st.just("r"),
    effect=EFFECTS,
    scopes=st.frozensets(st.sampled_from([*SCOPES, "*"]), min_size=1, max_size=2),
    condition=CONDITIONS | st.just(Condition()),
)


def _named(rules: list[Rule]) -> tuple[Rule, ...]:
    return tuple(replace(each, rule_id=f"r{index}") for index, each in enumerate(rules))


@st.composite
def documents(draw: st.DrawFn) -> PolicyDocument:
    owners = st.sampled_from(["", "acme", "org", "evil"])
    roles = [
        Role(name, draw(owners), "", draw(st.frozensets(st.sampled_from(SCOPES), max_size=1)), _named(rules))
        for name in ("one", "two")
        for rules in [draw(st.lists(RULES, max_size=5))]
    ]
    gates = draw(st.lists(st.builds(AddressRule, st.just("g"), EFFECTS, BLOCKS, owners), max_size=3))
    named = (replace(each, rule_id=f"g{index}") for index, each in enumerate(gates))
    return PolicyDocument(tuple(roles), tuple(named), TENANTS, BUILT_IN_PLANS)


IDENTITIES = st.builds(
    Identity,
    tenant_id=st.sampled_from(["acme", "org", "evil"]),
    client_id=st.just("alice"),
    scopes=st.frozensets(st.sampled_from(SCOPES)),
    roles=st.frozensets(st.sampled_from(["one", "two", "nowhere"])),
    direct_scopes=st.none() | st.frozensets(st.sampled_from(SCOPES), max_size=1),
    models=st.lists(st.sampled_from(["a", "a*"]), max_size=1).map(tuple),
    addresses=st.lists(BLOCKS, max_size=1).map(tuple),
)
TIMES = st.integers(0, 2 * 366 * 86_400).map(
    lambda later_s: datetime(2029, 1, 1, tzinfo=UTC) + timedelta(seconds=later_s)
)
ADDRESSES = st.sampled_from(["10.1.2.3", "10.1.9.9", "10.9.9.9", "192.0.2.1", "2001:db8::1", "::1", ""])
KNOWN = st.builds(
    Facts,
    at=TIMES,
    address=ADDRESSES,
    model=st.sampled_from(MODELS),
    task=st.sampled_from(["chat", "translate", ""]),
    max_tokens=st.integers(0, 25),
    labels=LABELS,
)
ANY_ACTION = st.sampled_from([GENERATE, MANAGE, ANYTHING, Action("/t/List", ("models.read",))])


@st.composite
def partly_known(draw: st.DrawFn) -> tuple[Facts, Facts]:
    """Facts, and the same with some not known."""
    whole = draw(KNOWN)
    hidden = draw(st.sets(st.sampled_from(["model", "task", "max_tokens", "labels"])))
    return whole, structs.replace(whole, **dict.fromkeys(hidden))


def reference(document: PolicyDocument, identity: Identity, action: Action, known: Facts) -> bool:
    """As ARCHITECTURE says it, one rule after the other."""
    parent = {tenant.tenant_id: tenant.parent_id for tenant in document.tenants}.get(identity.tenant_id, "")
    owners = {"", identity.tenant_id, parent}

    def inside(block: object) -> bool:
        return known.address != "" and ip_address(known.address) in block  # type: ignore[operator]

    for owner in owners:
        gates = [each for each in document.address_rules if each.tenant_id == owner]
        allowing = [each for each in gates if each.effect is ALLOW]
        if any(inside(each.network) for each in gates if each.effect is DENY):
            return False
        if allowing and not any(inside(each.network) for each in allowing):
            return False
    if identity.addresses and not any(map(inside, identity.addresses)):
        return False
    model = known.model
    if (
        identity.models
        and model is not None
        and not any(fnmatchcase(model, text) for text in identity.models)
    ):
        return False
    roles = [role for role in document.roles if role.role_id in identity.roles]
    for each in (each for role in roles for each in role.rules if each.effect is DENY):
        if each.scopes & {*action.scopes, "*"} and holds(each, known, inside):
            return False
    if not action.scopes:
        return True
    direct = identity.scopes if identity.direct_scopes is None else identity.direct_scopes
    return any(
        scope in direct
        or any(
            scope in role.scopes
            or any(
                each.effect is ALLOW and each.scopes & {scope, "*"} and holds(each, known, inside)
                for each in role.rules
            )
            for role in roles
            if role.tenant_id in owners
        )
        for scope in identity.scopes.intersection(action.scopes)
    )


def holds(each: Rule, known: Facts, inside: object) -> bool:
    condition, unknown = each.condition, each.effect is ALLOW
    parts = []
    if condition.models:
        parts.append(
            unknown
            if known.model is None
            else any(fnmatchcase(known.model, pattern) for pattern in condition.models)
        )
    if condition.tasks:
        parts.append(unknown if known.task is None else known.task in condition.tasks)
    if condition.max_tokens:
        tokens = known.max_tokens
        over = tokens is not None and tokens > condition.max_tokens
        parts.append(unknown if tokens is None else over == (each.effect is DENY))
    if condition.labels:
        labels = known.labels
        parts.append(unknown if labels is None else {**labels, **condition.labels} == labels)
    if condition.addresses:
        parts.append(any(map(inside, condition.addresses)))  # type: ignore[call-overload]
    if condition.times:
        parts.append(any(in_window(window, known.at) for window in condition.times))
    return all(parts)


def in_window(window: TimeWindow, at: datetime) -> bool:
    """Walks over the minutes of a day from the window's beginning, yesterday's and today's."""
    there = at.astimezone(ZoneInfo(window.time_zone or "UTC")).replace(tzinfo=None)
    for days_ago in (0, 1):
        begin_day = (there - timedelta(days=days_ago)).replace(hour=0, minute=0, second=0, microsecond=0)
        if window.days and begin_day.isoweekday() not in window.days:
            continue
        length = window.end_minute - window.start_minute
        length += 1440 if length <= 0 else 0
        begin = begin_day + timedelta(minutes=window.start_minute)
        if begin <= there < begin + timedelta(minutes=length):
            return True
    return False


@settings(PATIENT, max_examples=300)
@given(documents(), IDENTITIES, ANY_ACTION, partly_known())
def test_the_engine_decides_as_the_reference(
    document: PolicyDocument, identity: Identity, action: Action, known: tuple[Facts, Facts]
) -> None:
    policy = PolicyEngine(document)
    for each in known:
        decision = policy.decide(identity, action, each)
        assert decision.allowed == reference(document, identity, action, each)
        assert decision.explanation.endswith(".")
        assert not (decision.allowed and decision.missing_scope)


@PATIENT
@given(documents(), IDENTITIES, ANY_ACTION, KNOWN, st.randoms(use_true_random=False))
def test_the_order_of_rules_never_matters(
    document: PolicyDocument, identity: Identity, action: Action, known: Facts, random: object
) -> None:
    def mixed(items: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(random.sample(items, len(items)))  # type: ignore[attr-defined]

    roles = [replace(role, rules=mixed(role.rules)) for role in document.roles]
    other = replace(document, roles=mixed(tuple(roles)), address_rules=mixed(document.address_rules))
    first, second = PolicyEngine(document), PolicyEngine(other)
    assert first.decide(identity, action, known) == second.decide(identity, action, known)


@PATIENT
@given(documents(), IDENTITIES, ANY_ACTION, partly_known(), RULES)
def test_one_more_deny_never_allows_more_and_one_more_allow_never_less(
    document: PolicyDocument, identity: Identity, action: Action, known: tuple[Facts, Facts], added: Rule
) -> None:
    role = document.roles[0]
    more = replace(role, rules=(*role.rules, replace(added, rule_id="added")))
    before, after = PolicyEngine(document), PolicyEngine(replace(document, roles=(more, *document.roles[1:])))
    for each in known:
        was = before.decide(identity, action, each).allowed
        now = after.decide(identity, action, each).allowed
        assert (was >= now) if added.effect is DENY else (was <= now)


@PATIENT
@given(documents(), IDENTITIES, ANY_ACTION, KNOWN)
def test_a_credential_never_gets_more_than_its_scopes(
    document: PolicyDocument, identity: Identity, action: Action, known: Facts
) -> None:
    decision = PolicyEngine(document).decide(identity, action, known)
    if action.scopes and not identity.scopes.intersection(action.scopes):
        assert not decision.allowed
    fewer = structs.replace(identity, scopes=frozenset())
    assert not action.scopes or not PolicyEngine(document).decide(fewer, action, known).allowed


@PATIENT
@given(documents(), IDENTITIES, ANY_ACTION, partly_known())
def test_what_is_allowed_in_the_end_is_allowed_before_all_is_known(
    document: PolicyDocument, identity: Identity, action: Action, known: tuple[Facts, Facts]
) -> None:
    policy = PolicyEngine(document)
    whole, part = known
    assert policy.decide(identity, action, whole).allowed <= policy.decide(identity, action, part).allowed


@PATIENT
@given(documents())
def test_a_document_comes_back_from_its_message(document: PolicyDocument) -> None:
    assert document_of(document_message(document)) == document
