"""A limit that is reached, as an error: which one it is, how much there is and when there is more."""

from __future__ import annotations

from services.gateway.limits.headers import duration
from services.gateway.limits.limiter import Amounts, Limit, Refused
from services.mesh.errors import BudgetExhausted, ConcurrencyLimit, LlmosError, QuotaViolation, RateLimit
from services.mesh.policy import BudgetPeriod, LimitScope, LimitUnit

_WHO = {
    LimitScope.KEY: "This API key",
    LimitScope.CLIENT: "This client",
    LimitScope.TENANT: "This tenant",
}
_EACH = {BudgetPeriod.NONE: "a minute", BudgetPeriod.DAY: "a day", BudgetPeriod.MONTH: "a month"}
_ONE_SMALLER = "Ask for less: set `max_tokens`, or a smaller one."


def refusal(refused: Refused, amounts: Amounts, currency: str) -> LlmosError:
    """For the caller to read."""
    limit, wait_s = refused.limit, refused.wait_s
    who = f"{_WHO[limit.scope]} may" + (f", for the model `{limit.model}`," if limit.model else "")
    name = f"{limit.unit.name} of {limit.subject}" + (f", model {limit.model}" if limit.model else "")
    if limit.unit is LimitUnit.CONCURRENT_REQUESTS:
        text = f"{who} run {_count(limit.limit, 'request')} at the same time, and does."
        quota = QuotaViolation(limit.subject, f"{name}: {text}")
        return ConcurrencyLimit(text, quota=[quota], retry_after_s=wait_s, retryable=wait_s is not None)
    needed = _amount(limit, amounts[limit.index], currency)
    text = (
        f"{who} use {_amount(limit, limit.limit, currency)} {_EACH[limit.period]};"
        f" {_amount(limit, refused.remaining, currency)} left, and this request may take {needed}."
    )
    if wait_s is None:
        text += " That is more than there ever is."
    elif limit.is_rate:
        text += f" There will be enough in {duration(wait_s)}."
    else:
        text += f" The budget is renewed in {duration(round(wait_s))}."
    quota = QuotaViolation(limit.subject, f"{name}: {text}")
    hint = _ONE_SMALLER if limit.unit is not LimitUnit.REQUESTS_PER_MINUTE else None
    if not limit.is_rate:
        return BudgetExhausted(text, quota=[quota], hint=None if refused.remaining <= 0 else hint)
    return RateLimit(
        text,
        quota=[quota],
        retry_after_s=wait_s,
        retryable=wait_s is not None,
        hint=hint if wait_s is None else None,
    )


def _amount(limit: Limit, amount: int, currency: str) -> str:
    match limit.unit:
        case LimitUnit.BUDGET_MONEY:
            return f"{amount / 1e6:.6f} {currency}".strip()
        case LimitUnit.REQUESTS_PER_MINUTE:
            return _count(amount, "request")
        case _:
            return _count(amount, "token")


def _count(amount: int, noun: str) -> str:
    return f"{amount} {noun}{'' if amount == 1 else 's'}"
