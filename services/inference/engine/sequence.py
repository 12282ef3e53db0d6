"""The state of one request inside the loop: a job, and its choices."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.inference.engine.detokenizer import Detokenizer, TokenTable
from services.inference.engine.frames import JobDelta
from services.inference.engine.logprobs import token_logprob
from services.inference.engine.port import FinishReason, GenerationRequest
from services.inference.engine.row_step import Logits
from services.inference.engine.sampler import Sampler
from services.inference.engine.stopping import StopMatcher


@dataclass(slots=True)
class Choice:
    """One of a job's n outputs. Its slot is open from the end of the prefill until it has a reason."""

    index: int
    slot: int
    sampler: Sampler
    detokenizer: Detokenizer
    stops: StopMatcher
    tokens: int = 0
    """Generated so far."""
    last_token: int = -1
    """Sampled, and not yet in the KV cache."""
    reason: FinishReason | None = None


@dataclass(slots=True)
class Job:
    """One request."""

    id: int
    request: GenerationRequest
    prompt: list[int]
    max_tokens: int
    deadline_s: float
    """On the child's monotonic clock; infinity where there is none."""
    slot: int | None = None
    """Of the prefill."""
    prefilled: int = 0
    """Tokens of the prompt that are in the KV cache."""
    choices: list[Choice] = field(default_factory=list)

    @property
    def decoding(self) -> list[Choice]:
        return [choice for choice in self.choices if choice.reason is None]

    @property
    def completion_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)


def take_token(
    job: Job, choice: Choice, logits: Logits, *, eos: frozenset[int], table: TokenTable
) -> JobDelta:
    """Samples the choice's next token, advances its text, and ends the choice where it is at its end."""
    token = choice.sampler.choose(logits, choice.tokens)
    choice.tokens += 1
    choice.last_token = token
    request = job.request
    if token in eos and not request.ignore_eos:
        choice.reason = FinishReason.END_OF_SEQUENCE
        text = _rest(choice)
    elif token in request.stop_token_ids:
        choice.reason = FinishReason.STOP
        text = _rest(choice)
    else:
        text = choice.stops.push(choice.detokenizer.push(token))
        if choice.stops.stopped:
            choice.reason = FinishReason.STOP
        elif choice.tokens >= job.max_tokens:
            choice.reason = FinishReason.LENGTH
            text += _rest(choice)
    logprobs = (token_logprob(logits, token, request.top_logprobs, table),) if request.logprobs else ()
    return JobDelta(job.id, choice.index, text, (token,), logprobs)


def _rest(choice: Choice) -> str:
    """What was held back, where the text ends without a stop string."""
    return choice.stops.push(choice.detokenizer.flush()) + choice.stops.flush()
