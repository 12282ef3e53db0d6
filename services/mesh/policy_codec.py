"""Policy as messages: our own types (`policy`) to those of llmos/auth/v1/policy.proto, and back.

What `validate` checks by the rules in the proto is not checked again, save where the types could not hold it:
here are the rules that a pattern cannot express. Each function that reads a message takes the path of the
field that it stands in, and raises RequestInvalid with a Violation of that path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import IntEnum
from ipaddress import ip_network
from typing import NoReturn, TypeVar
from zoneinfo import ZoneInfo

from llmos.auth.v1 import policy_pb2
from llmos.gateway.v1 import policy_service_pb2

from services.mesh.addresses import unmapped
from services.mesh.errors import RequestInvalid, Violation
from services.mesh.policy import (
    BUDGETS,
    FREE_PLAN,
    AddressRule,
    BudgetPeriod,
    Condition,
    Effect,
    LimitScope,
    LimitUnit,
    ModelPrice,
    Network,
    Plan,
    PlanLimit,
    PolicyDocument,
    Role,
    Rule,
    TenantPolicy,
    TimeWindow,
)

_BLOCK = re.compile(r"[0-9A-Fa-f:.]{2,45}(/[0-9]{1,3})?")
_TIME_OF_DAY = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])|24:00")

_E = TypeVar("_E", bound=IntEnum)


def network_of(text: str, field: str) -> Network:
    """A CIDR block of RFC 4632 and RFC 4291, section 2.3; a single address is a block of one.

    A block of IPv4-mapped IPv6 addresses (RFC 4291, section 2.5.5.2) is the IPv4 block, since such an
    address is an IPv4 address to us. Raises RequestInvalid: for what is no block, and for a block with bits
    set beyond its prefix, since whoever wrote it meant another one.
    """
    if _BLOCK.fullmatch(text) is None:
        _refuse(field, "must be a CIDR block, such as `10.0.0.0/8` or `2001:db8::/32`")
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        _refuse(field, "must be a CIDR block, such as `10.0.0.0/8` or `2001:db8::/32`")
    if "/" in text and network.network_address != type(network.network_address)(text.split("/")[0]):
        _refuse(field, f"has bits set beyond its prefix; the block is `{unmapped(network)}`")
    return unmapped(network)


def networks_of(texts: Iterable[str], field: str) -> tuple[Network, ...]:
    """As `network_of`, of a list's field."""
    return tuple(network_of(text, f"{field}[{index}]") for index, text in enumerate(texts))


# -- roles -----------------------------------------------------------------------------------------------


def role_message(role: Role) -> policy_pb2.Role:
    return policy_pb2.Role(
        id=role.role_id,
        tenant_id=role.tenant_id,
        description=role.description,
        scopes=sorted(role.scopes),
        rules=[_rule_message(rule) for rule in role.rules],
    )


def role_of(message: policy_pb2.Role, field: str = "role", *, check_zones: bool = True) -> Role:
    """Raises RequestInvalid, also where two rules have one id: decisions name a rule by it.

    `check_zones=False` takes time zones that this machine does not know.
    """
    rules = tuple(
        _rule_of(rule, f"{field}.rules[{index}]", check_zones) for index, rule in enumerate(message.rules)
    )
    seen: set[str] = set()
    for index, rule in enumerate(rules):
        if rule.rule_id in seen:
            _refuse(f"{field}.rules[{index}].id", "must be unique in its role")
        seen.add(rule.rule_id)
    return Role(
        role_id=message.id,
        tenant_id=message.tenant_id,
        description=message.description,
        scopes=frozenset(message.scopes),
        rules=rules,
    )


def _rule_message(rule: Rule) -> policy_pb2.Rule:
    return policy_pb2.Rule(
        id=rule.rule_id,
        effect=policy_pb2.Effect.ValueType(rule.effect),
        scopes=sorted(rule.scopes),
        condition=None if rule.condition == Condition() else _condition_message(rule.condition),
    )


def _rule_of(message: policy_pb2.Rule, field: str, check_zones: bool) -> Rule:
    return Rule(
        rule_id=message.id,
        effect=_member(Effect, message.effect, f"{field}.effect"),
        scopes=frozenset(message.scopes),
        condition=_condition_of(message.condition, f"{field}.condition", check_zones),
    )


def _condition_message(condition: Condition) -> policy_pb2.Condition:
    return policy_pb2.Condition(
        models=condition.models,
        tasks=condition.tasks,
        addresses=[str(network) for network in condition.addresses],
        times=[_window_message(window) for window in condition.times],
        max_tokens=condition.max_tokens,
        labels=condition.labels,
    )


def _condition_of(message: policy_pb2.Condition, field: str, check_zones: bool) -> Condition:
    times = (
        _window_of(window, f"{field}.times[{index}]", check_zones)
        for index, window in enumerate(message.times)
    )
    return Condition(
        models=tuple(message.models),
        tasks=tuple(message.tasks),
        addresses=networks_of(message.addresses, f"{field}.addresses"),
        times=tuple(times),
        max_tokens=message.max_tokens,
        labels=dict(message.labels),
    )


def _window_message(window: TimeWindow) -> policy_pb2.TimeWindow:
    return policy_pb2.TimeWindow(
        days=window.days,
        start=_time_text(window.start_minute),
        end=_time_text(window.end_minute),
        time_zone=window.time_zone,
    )


def _window_of(message: policy_pb2.TimeWindow, field: str, check_zones: bool) -> TimeWindow:
    start = _minute(message.start, f"{field}.start")
    end = _minute(message.end, f"{field}.end")
    if start == 1440:
        _refuse(f"{field}.start", "must be before 24:00")
    if start == end:
        # no time at all, or a whole day? Either would surprise somebody
        _refuse(f"{field}.end", "must not be the same as `start`; a whole day is `00:00` to `24:00`")
    if any(not 1 <= day <= 7 for day in message.days) or len(set(message.days)) != len(message.days):
        _refuse(f"{field}.days", "must be different numbers from 1, Monday, to 7, Sunday")
    if message.time_zone and check_zones:
        _check_zone(message.time_zone, f"{field}.time_zone")
    return TimeWindow(tuple(message.days), start, end, message.time_zone)


def _time_text(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


def _minute(text: str, field: str) -> int:
    if _TIME_OF_DAY.fullmatch(text) is None:
        _refuse(field, "must be a time of day, `HH:MM`")
    hours, minutes = text.split(":")
    return int(hours) * 60 + int(minutes)


def _check_zone(name: str, field: str) -> None:
    try:
        ZoneInfo(name)
    # not found is a KeyError, a path out of the database a ValueError, a folder of zones an OSError
    except (KeyError, ValueError, OSError):
        _refuse(field, "must be the IANA name of a time zone, such as `Europe/Berlin`")


# -- address rules, plans, and all together --------------------------------------------------------------


def address_rule_message(rule: AddressRule) -> policy_pb2.AddressRule:
    return policy_pb2.AddressRule(
        id=rule.rule_id,
        tenant_id=rule.tenant_id,
        effect=policy_pb2.Effect.ValueType(rule.effect),
        cidr=str(rule.network),
        description=rule.description,
    )


def address_rule_of(message: policy_pb2.AddressRule, field: str = "address_rule") -> AddressRule:
    """Raises RequestInvalid."""
    return AddressRule(
        rule_id=message.id,
        effect=_member(Effect, message.effect, f"{field}.effect"),
        network=network_of(message.cidr, f"{field}.cidr"),
        tenant_id=message.tenant_id,
        description=message.description,
    )


def plan_message(plan: Plan) -> policy_pb2.Plan:
    return policy_pb2.Plan(
        id=plan.plan_id,
        description=plan.description,
        limits=[
            policy_pb2.PlanLimit(
                unit=policy_service_pb2.LimitUnit.ValueType(limit.unit),
                scope=policy_service_pb2.LimitScope.ValueType(limit.scope),
                model=limit.model,
                limit=limit.limit,
                period=policy_pb2.BudgetPeriod.ValueType(limit.period),
            )
            for limit in plan.limits
        ],
        currency=plan.currency,
        prices=[
            policy_pb2.ModelPrice(
                model=price.model,
                prompt=price.prompt,
                cached_prompt=price.cached_prompt,
                completion=price.completion,
            )
            for price in plan.prices
        ],
    )


def plan_of(message: policy_pb2.Plan, field: str = "plan") -> Plan:
    """Raises RequestInvalid: a budget has a period, and no other limit has one; a model has one price, and
    where money is limited it has one."""
    limits = tuple(_limit_of(limit, f"{field}.limits[{i}]") for i, limit in enumerate(message.limits))
    prices = tuple(
        ModelPrice(
            price.model,
            price.prompt,
            price.cached_prompt if price.HasField("cached_prompt") else None,
            price.completion,
        )
        for price in message.prices
    )
    priced: set[str] = set()
    for index, price in enumerate(prices):
        if price.model in priced:
            _refuse(f"{field}.prices[{index}].model", "must be unique in its plan")
        priced.add(price.model)
    for index, limit in enumerate(limits):
        if limit.unit is LimitUnit.BUDGET_MONEY and not priced & {"", limit.model}:
            what = f"a price of the model `{limit.model}`" if limit.model else "a price without a model"
            _refuse(f"{field}.limits[{index}].unit", f"needs {what} among `prices`")
    if (prices or any(limit.unit is LimitUnit.BUDGET_MONEY for limit in limits)) and not message.currency:
        _refuse(f"{field}.currency", "must be set where there are prices")
    return Plan(message.id, message.description, limits, message.currency, prices)


def _limit_of(message: policy_pb2.PlanLimit, field: str) -> PlanLimit:
    unit = _member(LimitUnit, message.unit, f"{field}.unit")
    period = _member(BudgetPeriod, message.period, f"{field}.period")
    if (unit in BUDGETS) != (period is not BudgetPeriod.NONE):
        _refuse(f"{field}.period", "must be set for a budget, and for nothing else")
    return PlanLimit(
        unit=unit,
        scope=_member(LimitScope, message.scope, f"{field}.scope"),
        limit=message.limit,
        model=message.model,
        period=period,
    )


def document_message(document: PolicyDocument) -> policy_pb2.PolicyDocument:
    return policy_pb2.PolicyDocument(
        roles=[role_message(role) for role in document.roles],
        address_rules=[address_rule_message(rule) for rule in document.address_rules],
        tenants=[
            policy_pb2.TenantPolicy(
                tenant_id=tenant.tenant_id, parent_id=tenant.parent_id, plan_id=tenant.plan_id
            )
            for tenant in document.tenants
        ],
        plans=[plan_message(plan) for plan in document.plans],
    )


def document_of(message: policy_pb2.PolicyDocument, field: str = "policy") -> PolicyDocument:
    """Raises RequestInvalid. Time zones are not checked: auth has done so, and a whole policy must not fail
    since two machines know different zones."""
    roles = (role_of(role, f"{field}.roles[{i}]", check_zones=False) for i, role in enumerate(message.roles))
    return PolicyDocument(
        roles=tuple(roles),
        address_rules=tuple(
            address_rule_of(rule, f"{field}.address_rules[{i}]")
            for i, rule in enumerate(message.address_rules)
        ),
        tenants=tuple(
            TenantPolicy(tenant.tenant_id, tenant.parent_id, tenant.plan_id or FREE_PLAN)
            for tenant in message.tenants
        ),
        plans=tuple(plan_of(plan, f"{field}.plans[{i}]") for i, plan in enumerate(message.plans)),
    )


def _member(kind: type[_E], number: int, field: str) -> _E:
    try:
        return kind(number)
    except ValueError:
        _refuse(field, "must be one of the values that the proto defines")


def _refuse(field: str, description: str) -> NoReturn:
    raise RequestInvalid(
        f"The request is invalid: `{field}` {description}.", violations=[Violation(field, description)]
    )
