"""The engine port: what the service asks of anything that runs models. No grpc, no torch.

A backend implements `Engine`. Everything here is frozen and plain, so that it can cross a process border
as it is. `tests/contract/test_engine_port.py` is the suite that each backend passes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Protocol

import msgspec


class Role(Enum):
    """Who speaks in a chat message; the values are what chat templates call them."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


class FinishReason(Enum):
    """Why a choice ended."""

    END_OF_SEQUENCE = "end_of_sequence"
    """The model sampled an end-of-sequence token."""
    STOP = "stop"
    """A stop string or stop token of the request was met; a stop string is not part of the text."""
    LENGTH = "length"
    """max_tokens or the context length was reached."""


class Capability(Enum):
    """What a model can do."""

    GENERATE = "generate"
    CHAT = "chat"


class Priority(IntEnum):
    """Who goes first where not all can; the lower number."""

    INTERACTIVE = 0
    """Somebody waits for the answer."""
    BATCH = 1
    """Runs on what the others leave."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model continues: either messages, or raw text. Exactly one is given."""

    messages: tuple[Message, ...] = ()
    text: str = ""

    def __post_init__(self) -> None:
        if bool(self.messages) == bool(self.text):
            raise ValueError("a prompt holds either messages or text")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. None takes the model's default. The ranges are those of the proto."""

    seed: int = 0
    """Unsigned, 64 bits. A token is a function of (seed, choice, position)."""
    temperature: float | None = None
    """0 is greedy."""
    top_p: float | None = None
    top_k: int | None = None
    """0 keeps all."""
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of token id and what is added to its logit."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Everything that says what to generate."""

    request_id: str
    model: str
    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    """For each choice. None: what is left of the context length, up to the deployment's limit."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    ignore_eos: bool = False
    """Goes on past the end-of-sequence token; for measurements."""
    timeout_s: float | None = None
    """What is left of the caller's deadline when the request is handed over."""
    tenant: str = ""
    """Whose request it is: tenants get equal shares, and never each other's cached prefixes."""
    priority: Priority = Priority.INTERACTIVE
    delivered: tuple[tuple[int, ...], ...] = ()
    """To go on where another replica was lost: for each choice the tokens that its reader has already. They
    count in max_tokens and usage; only what comes after them is generated and sent. Empty: from the start."""
    gather_s: float = 0.0
    """After a delta, what comes within that time may be merged with what follows, for a reader who would
    rather have few. The first delta and the end are never delayed. `math.inf`: the rest comes with the
    end."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token and its natural log probability, before temperature, penalties and filters."""

    token_id: int
    token: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The chosen token, and the most probable ones, most probable first."""

    chosen: Alternative
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request; an end-of-sequence token that was sampled is counted."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """The first event: the request has left the queue and its prompt is known."""

    model_revision: str
    numerics_id: str
    exact_replay: bool
    prompt_tokens: int
    cached_prompt_tokens: int = 0
    """Of them, those whose keys and values were there already."""


class Delta(msgspec.Struct, frozen=True):
    """A piece of one choice. Not a dataclass, which takes ten times as long to make, for each token.

    Over a whole stream each generated token's id comes exactly once, in order, in the delta that accounts
    for it, also those of a stop string and an end-of-sequence token. The text may lag behind the ids while
    a character is incomplete or a stop string may be beginning.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    """With logprobs: one for each of token_ids."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event."""

    reasons: tuple[FinishReason, ...]
    """One for each choice."""
    usage: Usage


EngineEvent = Started | Delta | Finished
Direct = Callable[[Delta], bool]
"""Where deltas go past their reader; it says whether it has taken one, and never waits."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that the engine serves."""

    id: str
    revision: str = ""
    """A digest of the weights; empty until they have been loaded once."""
    context_tokens: int = 0
    """Prompt and output together."""
    capabilities: tuple[Capability, ...] = ()
    numerics_id: str = ""
    """Names weights, dtype, kernels and instruction set: equal ids compute equal numbers."""
    exact_replay: bool = False
    """Whether a request repeated under an equal numerics_id gives the same tokens, whatever runs beside."""
    ready: bool = False
    """Whether it can serve now."""


@dataclass(frozen=True, slots=True)
class TokenCount:
    """The length of a prompt, template included."""

    prompt_tokens: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the engine serves, and in a sentence why not."""

    serving: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine has to do, in sequences: a request with n choices counts n."""

    running: int
    waiting: int
    restarts: int = 0
    """How often the engine was restarted since the service began."""
    waiting_tokens: int = 0
    """Prompt tokens that have yet to be computed."""
    kv_pages_used: int = 0
    """Held by what runs; pages that only cache a prefix count as free."""
    kv_pages: int = 0
    """0 where the backend has none."""
    step_s: float = 0.0
    """A moving mean of what a step takes."""
    max_running: int = 0
    """The most sequences that run at once."""
    max_waiting: int = 0
    """The most sequences that wait; more are refused."""


class Engine(Protocol):
    """Runs models. One loop calls it; its methods are not meant for other threads."""

    async def start(self) -> None:
        """Begins to load and returns at once; `wait_healthy` waits for the end of it."""

    async def stop(self) -> None:
        """Ends everything. Running requests get Draining. Safe to call twice."""

    def generate(
        self, request: GenerationRequest, direct: Direct | None = None
    ) -> AsyncGenerator[EngineEvent, None]:
        """Yields Started, Deltas, Finished. Closing the generator ends the work at once (use `aclosing`).

        While the reader waits for the next event, a delta is offered to `direct` first; what that takes is
        not yielded. So none overtakes another.

        Errors, all raised before Started unless they are marked *:
        ModelNotFound; RequestInvalid and ContextLengthExceeded, which name the field; Overloaded, at once,
        where queue and slots are taken; NoReplica while the model is not loaded; DeadlineExceeded* where
        `timeout_s` has passed; EngineFault* where the engine failed on this request alone; ReplicaLost*
        where the engine was lost; Draining* at stop.
        """

    async def count_tokens(self, model: str, prompt: Prompt) -> TokenCount:
        """Counts as `generate` would.

        Raises ModelNotFound, RequestInvalid, NoReplica, Overloaded, ReplicaLost, Draining.
        """

    def models(self) -> tuple[ModelInfo, ...]:
        """The models, sorted by id."""

    def health(self) -> Health:
        """The present state."""

    def health_changes(self) -> AsyncIterator[Health]:
        """The present state, then each change (a reader that lags sees only the latest). Never ends."""

    async def wait_healthy(self, timeout_s: float) -> None:
        """Raises NoReplica where the engine does not serve in time."""

    def load(self) -> Load:
        """The present load."""
