"""What runs in the next step.

Rules, in the order in which they bind:

- Interactive requests go before batch ones, in the queue and for places.
- Between tenants the one that was served least goes next (tokens computed for it; Sheng et al., "Fairness in
  serving large language models", OSDI 2024); within a tenant, first come, first served.
- What runs decodes in every step. What remains of the step's time goes to prompts, in the order in which they
  were admitted: so many tokens as the measured cost of steps allows, at least a few, so that none waits for
  ever.
- Where pages run out, the latest of the lowest priority loses its own (preemption) and is computed again
  later, from what the prefix cache still has. The earliest of the highest priority is never touched, and one
  sequence always fits: so something always gets on.
- Nothing begins that cannot have its first token before its deadline.
- While very few run and none has a prompt left, what comes next is guessed (`lookup`), and the guess computed
  beside the token that is due. Nobody gives up a page for a guess.

All of a job's choices but the first wait until the first has computed the prompt, and then find it in the
prefix cache.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from services.inference.engine.kv_cache import KvCache, pages_for
from services.inference.engine.sequence import Choice, Job
from services.inference.engine.step_cost import StepCost

_MAX_TENANTS_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class ScheduleLimits:
    """What bounds a step."""

    max_running: int
    """Sequences."""
    max_prefill_tokens: int
    """Of prompts, in one step."""
    min_prefill_tokens: int = 16
    """Computed in any step that has a prompt, however long its decoding takes."""
    step_target_s: float = 0.2
    """Aimed at for a step in which some decode and others prefill: the time between two tokens."""
    lookup_tokens: int = 0
    """Guessed for a sequence in one step, at most."""
    lookup_sequences: int = 2
    """Where more than these run, tokens of guesses cost as much as others."""


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's part in a step: its next `count` tokens, then those that are guessed to follow."""

    choice: Choice
    count: int
    guess: tuple[int, ...] = ()


class Scheduler:
    """Holds every choice that has not ended. Knows nothing of models and text."""

    def __init__(self, limits: ScheduleLimits, cache: KvCache, cost: StepCost) -> None:
        self._limits = limits
        self._cache = cache
        self._cost = cost
        self._queues: dict[tuple[int, str], list[Choice]] = {}
        """By priority and tenant, each in order of arrival; none is empty."""
        self._running: list[Choice] = []
        self._served: OrderedDict[str, float] = OrderedDict()
        self.preemptions = 0

    @property
    def running(self) -> int:
        """Sequences that run."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that wait."""
        return sum(map(len, self._queues.values()))

    @property
    def waiting_tokens(self) -> int:
        """Tokens of prompts that have yet to be computed."""
        prefilling = sum(choice.left for choice in self._running if choice.left > 1)
        return prefilling + sum(choice.left for choice in self._waiting())

    @property
    def idle(self) -> bool:
        return not (self._running or self._queues)

    def add(self, choices: Iterable[Choice]) -> None:
        """Queues them."""
        for choice in choices:
            self._lift(choice.job.request.tenant)
            queue = self._queues.setdefault(_queue_key(choice), [])
            insort(queue, choice, key=lambda each: each.order)

    def remove(self, job: Job) -> None:
        """Takes all of a job's choices out; their pages are free when this returns."""
        for choice in job.choices:
            self.end(choice)

    def end(self, choice: Choice) -> None:
        """Takes the choice out, wherever it is."""
        if choice.pages is not None:
            self._release(choice)
        elif choice in self._queues.get(_queue_key(choice), ()):
            self._leave_queue(choice)

    def late(self, now_s: float) -> list[Job]:
        """Jobs whose deadline has passed."""
        choices = (*self._running, *self._waiting())
        return list({each.job.id: each.job for each in choices if each.job.deadline_s <= now_s}.values())

    def admit(self, now_s: float) -> tuple[list[Choice], list[Job]]:
        """Gives places to those who are next. Returns them, and the jobs whose deadline cannot be met.

        The latter are still queued: `remove` them.
        """
        admitted: list[Choice] = []
        while (choice := self._next()) is not None and self._make_place(choice):
            pages = self._cache.open(choice.tokens, choice.job.request.tenant)
            first_token_s = self._cost.seconds(len(choice.tokens) - pages.cached_tokens)
            if now_s + first_token_s > choice.job.deadline_s:
                self._cache.close(pages)
                return admitted, [choice.job]
            self._leave_queue(choice)
            choice.pages = pages
            choice.computed = pages.cached_tokens
            self._running.append(choice)
            admitted.append(choice)
        return admitted, []

    def schedule(self) -> list[Work]:
        """The next step's work, each with the pages that it needs."""
        decoding = sum(choice.left == 1 for choice in self._running)
        budget = self._prefill_budget(decoding)
        guesses = decoding == len(self._running) <= self._limits.lookup_sequences
        work: list[Work] = []
        for choice in sorted(self._running, key=_rank):
            if choice.pages is None:
                continue  # Preempted by one before it.
            count = 1 if choice.left == 1 else min(choice.left, budget)
            if count <= 0 or not self._grow(choice, choice.computed + count):
                continue
            if choice.left > 1:
                budget -= count
            work.append(Work(choice, count, self._guess(choice) if guesses else ()))
        return work

    def computed(self, work: Work) -> None:
        """The step has computed it."""
        self._advance(work.choice, work.count)

    def verified(self, work: Work, kept: int) -> None:
        """The first `kept` tokens of the work's guess have become the sequence's own, and are computed."""
        if work.guess:
            work.choice.lookup.learn(len(work.choice.tokens), kept)
            self._advance(work.choice, kept)

    def learn(self, tokens: int, seconds: float) -> None:
        """A step of `tokens` tokens took `seconds`."""
        self._cost.learn(tokens, seconds)

    def _advance(self, choice: Choice, tokens: int) -> None:
        if choice.pages is None:
            return
        choice.computed += tokens
        self._cache.commit(choice.pages, choice.tokens, choice.computed)
        tenant = choice.job.request.tenant
        self._served[tenant] = self._served.get(tenant, 0.0) + tokens

    def _guess(self, choice: Choice) -> tuple[int, ...]:
        """Where the sampler remembers what was said, tokens can only be drawn one after the other."""
        if choice.pages is None or choice.sampler.remembers:
            return ()
        most = min(self._limits.lookup_tokens, choice.job.max_tokens - choice.generated - 1)
        guess = choice.lookup.guess(choice.tokens, most)
        end = len(choice.tokens) + len(guess)
        if guess and self._cache.missing(choice.pages, end) <= self._cache.available:
            self._cache.grow(choice.pages, end)
            return guess
        return ()

    def _waiting(self) -> Iterator[Choice]:
        for queue in self._queues.values():
            yield from queue

    def _prefill_budget(self, decoding: int) -> int:
        limits = self._limits
        if not decoding:
            return limits.max_prefill_tokens
        affordable = self._cost.tokens_within(limits.step_target_s) - decoding
        return max(limits.min_prefill_tokens, min(affordable, limits.max_prefill_tokens))

    def _next(self) -> Choice | None:
        """Of the highest priority that waits, the first choice of the tenant that was served least."""
        if not self._queues:
            return None
        top = min(priority for priority, _ in self._queues)
        tenants = [tenant for priority, tenant in self._queues if priority == top]
        tenant = min(tenants, key=lambda each: (self._served.get(each, 0.0), each))
        return self._queues[top, tenant][0]

    def _make_place(self, choice: Choice) -> bool:
        """Whether the choice can begin, those of lower priority preempted where that helps."""
        while not self._fits(choice):
            victim = max(self._running, key=_rank, default=None)
            if victim is None or victim.job.request.priority <= choice.job.request.priority:
                return False
            self._preempt(victim)
        return True

    def _fits(self, choice: Choice) -> bool:
        if len(self._running) >= self._limits.max_running:
            return False
        # Each that runs may need a page soon; to begin and be preempted at once would help nobody.
        return (
            not self._running or pages_for(len(choice.tokens)) + len(self._running) <= self._cache.available
        )

    def _leave_queue(self, choice: Choice) -> None:
        key = _queue_key(choice)
        self._queues[key].remove(choice)
        if not self._queues[key]:
            del self._queues[key]

    def _grow(self, choice: Choice, tokens: int) -> bool:
        """Pages for `tokens` tokens; those ranked behind are preempted for it, or the choice itself."""
        if choice.pages is None:
            return False
        while self._cache.missing(choice.pages, tokens) > self._cache.available:
            victim = max(self._running, key=_rank)
            self._preempt(victim)
            if victim is choice:
                return False
        self._cache.grow(choice.pages, tokens)
        return True

    def _preempt(self, choice: Choice) -> None:
        self._release(choice)
        self.add([choice])
        self.preemptions += 1

    def _release(self, choice: Choice) -> None:
        if choice.pages is not None:
            self._cache.close(choice.pages)
            choice.pages = None
            choice.computed = 0
            self._running.remove(choice)

    def _lift(self, tenant: str) -> None:
        """One that was away begins level with the least served of those present: idleness is not saved up."""
        present = {name for _, name in self._queues} | {each.job.request.tenant for each in self._running}
        if tenant in present:
            return
        floor = min((self._served.get(each, 0.0) for each in present), default=0.0)
        self._served[tenant] = max(self._served.get(tenant, 0.0), floor)
        self._served.move_to_end(tenant)
        while len(self._served) > _MAX_TENANTS_REMEMBERED:
            self._served.popitem(last=False)


def _queue_key(choice: Choice) -> tuple[int, str]:
    return int(choice.job.request.priority), choice.job.request.tenant


def _rank(choice: Choice) -> tuple[int, int, int]:
    return int(choice.job.request.priority), *choice.order
