"""The state of one request inside the loop: a job, and its choices. A choice is the sequence that runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.inference.engine.detokenizer import Detokenizer
from services.inference.engine.kv_cache import SequencePages
from services.inference.engine.lookup import PromptLookup
from services.inference.engine.port import FinishReason, GenerationRequest
from services.inference.engine.sampler import Sampler
from services.inference.engine.stopping import StopMatcher


@dataclass(slots=True, eq=False)
class Choice:
    """One of a job's n outputs."""

    job: Job
    index: int
    tokens: list[int]
    """The prompt and all that was generated; the last may not be in the KV cache yet."""
    sampler: Sampler
    detokenizer: Detokenizer
    stops: StopMatcher
    computed: int = 0
    """How many of `tokens` are in the KV cache."""
    pages: SequencePages | None = None
    """Held while it runs."""
    reason: FinishReason | None = None
    lookup: PromptLookup = field(default_factory=PromptLookup)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.job.prompt_tokens

    @property
    def left(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 while it decodes."""
        return len(self.tokens) - self.computed

    @property
    def order(self) -> tuple[int, int]:
        """First come, first served; a job's choices in their order."""
        return self.job.id, self.index


@dataclass(slots=True, eq=False)
class Job:
    """One request. Ids grow in the order of arrival."""

    id: int
    request: GenerationRequest
    prompt: list[int]
    max_tokens: int
    deadline_s: float
    """On the child's monotonic clock; infinity where there is none."""
    choices: list[Choice] = field(default_factory=list)
    followers: list[Choice] = field(default_factory=list)
    """Choices that wait until the first has computed the prompt."""
    cached_tokens: int | None = None
    """Of the prompt, found in the prefix cache; None until the first choice has begun."""

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.generated for choice in self.choices)

    @property
    def unfinished(self) -> list[Choice]:
        return [choice for choice in self.choices if choice.reason is None]


def accept(choice: Choice, token: int, *, eos: frozenset[int]) -> str:
    """Appends a token, sampled now or delivered before, and returns the text that became ready.

    Gives the choice its reason where this token ends it.
    """
    job, request = choice.job, choice.job.request
    choice.tokens.append(token)
    if token in eos and not request.ignore_eos:
        choice.reason = FinishReason.END_OF_SEQUENCE
        return _rest(choice)
    if token in request.stop_token_ids:
        choice.reason = FinishReason.STOP
        return _rest(choice)
    text = choice.stops.push(choice.detokenizer.push(token))
    if choice.stops.stopped:
        choice.reason = FinishReason.STOP
    elif choice.generated >= job.max_tokens:
        choice.reason = FinishReason.LENGTH
        text += _rest(choice)
    return text


def _rest(choice: Choice) -> str:
    """What was held back, now that nothing more comes."""
    return choice.stops.push(choice.detokenizer.flush()) + choice.stops.flush()
