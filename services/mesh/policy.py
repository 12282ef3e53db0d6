"""What a policy is made of, in our own types: roles with rules, address rules, plans.

`llmos.auth.v1` (policy.proto) describes the same as messages; `policy_codec` turns one into the other.
`decision` decides by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from ipaddress import IPv4Network, IPv6Network

Network = IPv4Network | IPv6Network
EVERY_SCOPE = "*"


class Effect(IntEnum):
    """Whether what matches is let through. The numbers are those of the proto."""

    ALLOW = 1
    DENY = 2


@dataclass(frozen=True, slots=True)
class TimeWindow:
    """Hours of some days of the week."""

    days: tuple[int, ...] = ()
    """1 is Monday, 7 is Sunday; none: every day."""
    start_minute: int = 0
    """Of the day, included."""
    end_minute: int = 1440
    """Of the day, excluded; not after `start_minute`: it is on the next day."""
    time_zone: str = ""
    """IANA; empty: UTC."""


@dataclass(frozen=True, slots=True)
class Condition:
    """When a rule applies: all that is set must hold; of a tuple, one entry is enough."""

    models: tuple[str, ...] = ()
    """Ids; `*` stands for any characters."""
    tasks: tuple[str, ...] = ()
    addresses: tuple[Network, ...] = ()
    times: tuple[TimeWindow, ...] = ()
    max_tokens: int = 0
    """0: any number. An allowing rule holds up to it, a denying one above it."""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a role."""

    rule_id: str
    effect: Effect
    scopes: frozenset[str]
    """`*`: everything."""
    condition: Condition = Condition()


@dataclass(frozen=True, slots=True)
class Role:
    """A named set of scopes and rules."""

    role_id: str
    tenant_id: str = ""
    """Empty: every tenant may use it."""
    description: str = ""
    scopes: frozenset[str] = frozenset()
    """What it allows without condition."""
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True, slots=True)
class AddressRule:
    """Lets addresses in, or keeps them out."""

    rule_id: str
    effect: Effect
    network: Network
    tenant_id: str = ""
    """Empty: for everybody."""
    description: str = ""


class LimitUnit(IntEnum):
    """What a limit counts; the numbers are those of `llmos.gateway.v1.LimitUnit`."""

    REQUESTS_PER_MINUTE = 1
    TOKENS_PER_MINUTE = 2
    CONCURRENT_REQUESTS = 3
    BUDGET_TOKENS = 4
    BUDGET_MONEY = 5


BUDGETS = frozenset({LimitUnit.BUDGET_TOKENS, LimitUnit.BUDGET_MONEY})
"""Units that have a period."""


class LimitScope(IntEnum):
    """Who shares a limit."""

    KEY = 1
    CLIENT = 2
    TENANT = 3


class BudgetPeriod(IntEnum):
    """When a budget is whole again, UTC."""

    NONE = 0
    DAY = 1
    MONTH = 2


@dataclass(frozen=True, slots=True)
class PlanLimit:
    """One limit of a plan."""

    unit: LimitUnit
    scope: LimitScope
    limit: int
    model: str = ""
    """Empty: all models together."""
    period: BudgetPeriod = BudgetPeriod.NONE


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """What tokens of a model cost, in millionths of the plan's currency for a million tokens."""

    model: str = ""
    """Empty: every model that has no price of its own."""
    prompt: int = 0
    cached_prompt: int | None = None
    """None: as `prompt`."""
    completion: int = 0

    def cost(self, prompt_tokens: int, completion_tokens: int, cached_prompt_tokens: int = 0) -> int:
        """In millionths of the currency, rounded up."""
        cached = self.prompt if self.cached_prompt is None else self.cached_prompt
        exact = (
            (prompt_tokens - cached_prompt_tokens) * self.prompt
            + cached_prompt_tokens * cached
            + completion_tokens * self.completion
        )
        return -(-exact // 1_000_000)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much a tenant's callers may use."""

    plan_id: str
    description: str = ""
    limits: tuple[PlanLimit, ...] = ()
    currency: str = ""
    prices: tuple[ModelPrice, ...] = ()


@dataclass(frozen=True, slots=True)
class TenantPolicy:
    """What policy needs to know of a tenant."""

    tenant_id: str
    parent_id: str = ""
    plan_id: str = "free"


@dataclass(frozen=True, slots=True)
class PolicyDocument:
    """All that a decision depends on, besides the request and the credential."""

    roles: tuple[Role, ...] = ()
    address_rules: tuple[AddressRule, ...] = ()
    tenants: tuple[TenantPolicy, ...] = ()
    """Those that are not disabled."""
    plans: tuple[Plan, ...] = ()


class RevocationKind(Enum):
    """What is revoked; the values are the numbers of the proto."""

    TOKEN = 1
    API_KEY = 2
    CLIENT = 3
    TENANT = 4


# -- what comes with llmos: roles and the default plan ---------------------------------------------------

SCOPES: Mapping[str, str] = {
    "generate": "generate text, and count tokens",
    "models.read": "list models",
    "audit.read": "read the audit log of one's tenant",
    "tenant.admin": "manage clients, keys, roles and address rules of one's tenant and its projects",
    "admin": "manage tenants, clients and keys, and read across tenants",
}
"""All scopes that exist, and what they allow."""

ADMIN = "admin"
TENANT_ADMIN = "tenant.admin"
FREE_PLAN = "free"
UNLIMITED_PLAN = "unlimited"
BUILT_IN_ROLES: tuple[Role, ...] = (
    Role("admin", description="Everything, in every tenant.", scopes=frozenset(SCOPES)),
    Role(
        "tenant-admin",
        description="Manages its own tenant and its projects, and uses them.",
        scopes=frozenset(SCOPES) - {ADMIN},
    ),
    Role("user", description="Generates, and lists models.", scopes=frozenset({"generate", "models.read"})),
    Role("auditor", description="Reads the audit log of its tenant.", scopes=frozenset({"audit.read"})),
)
BUILT_IN_PLANS: tuple[Plan, ...] = (
    Plan(
        FREE_PLAN,
        "The default.",
        (
            PlanLimit(LimitUnit.REQUESTS_PER_MINUTE, LimitScope.TENANT, 600),
            PlanLimit(LimitUnit.TOKENS_PER_MINUTE, LimitScope.TENANT, 600_000),
            PlanLimit(LimitUnit.CONCURRENT_REQUESTS, LimitScope.TENANT, 64),
        ),
    ),
    Plan(UNLIMITED_PLAN, "No limits: what the operator's own tenant begins with."),
)
