"""What the gateway speaks of: a request that can only be valid, the events of its answer, models.

Plain types of our own: no gRPC, no JSON. They are structs, since each request makes a dozen of them, and a
frozen dataclass takes ten times as long. `request` makes the first, `clients` the second; both edges
translate from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import IntEnum

import msgspec
from msgspec import Struct


class Role(IntEnum):
    """Who speaks. The numbers are those of llmos.gateway.v1.Role."""

    SYSTEM = 1
    USER = 2
    ASSISTANT = 3


class FinishReason(IntEnum):
    """Why a choice ended. The numbers are those of llmos.common.v1.FinishReason."""

    END_OF_SEQUENCE = 1
    STOP = 2
    LENGTH = 3
    TOOL_CALLS = 4
    CONTENT_FILTER = 5
    CANCELLED = 6


class Priority(IntEnum):
    """Who goes first where not all can. The numbers are those of llmos.inference.v1.Priority."""

    INTERACTIVE = 1
    """Somebody waits for the answer."""
    BATCH = 2
    """Runs on what the others leave."""


class Capability(IntEnum):
    """What a model can do. The numbers are those of llmos.gateway.v1.ModelCapability."""

    GENERATE = 1
    CHAT = 2
    TOOLS = 3
    EMBED = 4
    SCORE = 5


CHARACTERS_PER_TOKEN = 4
"""About, in English; other scripts have fewer."""
PRIORITY_LABEL = "priority"
"""A request with the label `priority: batch` lets others go before it."""


class Message(Struct, frozen=True):
    """One message of a conversation."""

    role: Role
    parts: tuple[str, ...]
    """The texts of its content, in order."""
    name: str = ""


class Prompt(Struct, frozen=True):
    """What the model continues: either messages, or raw text."""

    messages: tuple[Message, ...] = ()
    text: str = ""

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)

    @property
    def estimated_tokens(self) -> int:
        """About how many tokens it will have, before the engine has counted them; never 0."""
        characters = len(self.text)
        for message in self.messages:
            characters += sum(map(len, message.parts))
        return characters // CHARACTERS_PER_TOKEN + 1

    @property
    def task(self) -> str:
        """What policy calls it."""
        return "chat" if self.is_chat else "text_completion"


class Sampling(Struct, frozen=True):
    """How tokens are chosen. None leaves it to the model's default."""

    seed: int
    """The seed in force: the caller's, or the one that was assigned. Unsigned, 64 bits."""
    seed_is_assigned: bool = False
    """By the gateway, since the caller gave none."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


class ValidPrompt(Struct, frozen=True):
    """A request to count a prompt's tokens."""

    model: str
    prompt: Prompt


class ValidGeneration(Struct, frozen=True):
    """A request that has passed every rule and asks for nothing that this version lacks."""

    model: str
    prompt: Prompt
    sampling: Sampling
    max_tokens: int | None = None
    """For each choice. None: what is left of the context length, up to the replica's own limit."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    ignore_eos: bool = False
    end_user: str = ""
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)
    is_job: bool = False
    """Nobody waits for it, whatever its labels say."""

    @property
    def priority(self) -> Priority:
        is_batch = self.is_job or self.labels.get(PRIORITY_LABEL) == "batch"
        return Priority.BATCH if is_batch else Priority.INTERACTIVE


class Usage(Struct, frozen=True):
    """Tokens, counted by the engine."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0


class EngineStarted(Struct, frozen=True):
    """A replica has accepted the request."""

    model_revision: str
    prompt_tokens: int
    replica: str
    first_token_s: float | None = None
    """Where the answer comes in one piece: what the replica took to its first token."""
    numerics_id: str = ""
    """What it computes with."""


class Started(Struct, frozen=True):
    """The first event of an answer."""

    request_id: str
    model: str
    model_revision: str
    seed: int


class Alternative(Struct, frozen=True):
    """A token and its natural log probability."""

    token_id: int
    token: bytes
    logprob: float


class TokenLogprob(Struct, frozen=True):
    """The chosen token, and the most probable ones, most probable first."""

    chosen: Alternative
    top: tuple[Alternative, ...] = ()


class Delta(Struct, frozen=True):
    """A piece of the answer."""

    seq: int
    """1 for the first, then one more each."""
    choice_index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob] = ()


class Moved(Struct, frozen=True):
    """The stream went on at another replica."""

    stream_id: str


class Finished(Struct, frozen=True):
    """The last event: why each choice ended, in order of index, and what was counted."""

    finish_reasons: tuple[FinishReason, ...]
    usage: Usage


class WholeAnswer(Struct, frozen=True):
    """What a replica answers in one piece."""

    started: EngineStarted
    deltas: Sequence[Delta]
    finished: Finished


EngineEvent = EngineStarted | Delta | Finished
Event = Started | Delta | Moved | Finished


class Choice(Struct, frozen=True):
    """One whole answer."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()


class Generation(Struct, frozen=True):
    """All choices, and what was counted."""

    started: Started
    choices: tuple[Choice, ...]
    usage: Usage


class TokenCount(Struct, frozen=True):
    """The length of a prompt, and of the model's context, in tokens."""

    prompt_tokens: int
    context_tokens: int


class Model(Struct, frozen=True):
    """A model, as its replicas describe it."""

    id: str
    revision: str
    capabilities: tuple[Capability, ...]
    context_tokens: int
    create_time: datetime | None = None
    ready: bool = False
    """Whether a replica serves it now."""
    numerics_id: str = ""
    """What a replica computes it with; empty until it has been loaded."""
