"""What the use case calls: takes what a request needs of all limits that it meets, and settles it at its
end."""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.auditing import RequestRecord
from services.gateway.generation import Usage, ValidGeneration
from services.gateway.limits.headers import rate_limit_headers
from services.gateway.limits.limiter import NOTHING, Hold, Limit, Limiter, Refused, Standing, asked, used
from services.gateway.limits.plans import Plans
from services.gateway.limits.refusal import refusal
from services.mesh.clock import Clock
from services.mesh.context import Identity
from services.mesh.policy import ModelPrice

HOLD_SPARE_S = 5.0
"""A reservation outlives the request's deadline by so much: it expires only where nobody settles it."""
MAX_HOLD_S = 3600.0


class Ticket:
    """What one request has reserved."""

    __slots__ = ("_completion_tokens", "_hold", "_is_settled", "_limiter", "_price", "_prompt_tokens")

    def __init__(
        self, limiter: Limiter, hold: Hold, price: ModelPrice, prompt_tokens: int, completion_tokens: int
    ) -> None:
        self._limiter = limiter
        self._hold = hold
        self._price = price
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = completion_tokens
        self._is_settled = not hold.limits

    def correct(self, prompt_tokens: int) -> None:
        """The engine has counted the prompt."""
        if prompt_tokens != self._prompt_tokens and self._hold.limits:
            self._prompt_tokens = prompt_tokens
            tokens, money = _most(self._price, prompt_tokens, self._completion_tokens)
            self._limiter.correct(self._hold, asked(tokens, money))

    def settle(self, usage: Usage | None) -> None:
        """The request has used this; None: no work was begun for it. Only the first time counts."""
        if self._is_settled:
            return
        self._is_settled = True
        if usage is None:
            self._limiter.settle(self._hold, NOTHING)
            return
        cost = self._price.cost(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens)
        self._limiter.settle(self._hold, used(usage.prompt_tokens + usage.completion_tokens, cost))


@dataclass(frozen=True, slots=True)
class Left:
    """One limit of a caller, and how it stands."""

    limit: Limit
    standing: Standing


class Limits:
    """Keeps callers within their plans."""

    def __init__(
        self,
        plans: Plans,
        limiter: Limiter,
        clock: Clock,
        *,
        max_tokens_limit: int,
        assumed_completion_tokens: int = 1024,
    ) -> None:
        """`assumed_completion_tokens` is reserved for each choice of a request that names no number."""
        self._plans = plans
        self._limiter = limiter
        self._clock = clock
        self._assumed_tokens = min(assumed_completion_tokens, max_tokens_limit)

    async def reserve(self, record: RequestRecord, request: ValidGeneration) -> Ticket:
        """Tells the caller, with the answer, what is left. Raises RateLimit, ConcurrencyLimit or
        BudgetExhausted, and then nothing was taken."""
        applying = self._plans.applying(record.identity, request.model)
        limits = applying.limits
        if not limits:
            return Ticket(self._limiter, _NO_HOLD, applying.price, 0, 0)
        prompt_tokens = request.prompt.estimated_tokens
        completion_tokens = request.n * (request.max_tokens or self._assumed_tokens)
        amounts = asked(*_most(applying.price, prompt_tokens, completion_tokens))
        hold_s = min(record.deadline_s - self._clock.monotonic() + HOLD_SPARE_S, MAX_HOLD_S)
        try:
            hold = await self._limiter.reserve(limits, amounts, hold_s)
        except Refused as refused:
            record.response_metadata.update(rate_limit_headers(limits, refused.standings))
            raise refusal(refused, amounts, applying.currency) from None
        record.response_metadata.update(rate_limit_headers(limits, hold.standings))
        return Ticket(self._limiter, hold, applying.price, prompt_tokens, completion_tokens)

    async def left(self, identity: Identity) -> tuple[Left, ...]:
        """All limits of the caller, sorted by unit, scope and model."""
        limits = self._plans.applying(identity, None).limits
        found = await self._limiter.remaining(limits)
        return tuple(Left(*each) for each in zip(limits, found, strict=True))


_NO_HOLD = Hold(0, (), NOTHING, ())


def _most(price: ModelPrice, prompt_tokens: int, completion_tokens: int) -> tuple[int, int]:
    """Tokens and money that a request may use."""
    return prompt_tokens + completion_tokens, price.cost(prompt_tokens, completion_tokens)
