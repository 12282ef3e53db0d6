"""What parent and child say to each other: msgpack messages, each behind its length in four bytes.

No pickle. A message is one of a closed set of types, is decoded into it or refused, and is bounded in size.
The parent sends `Configure` once, then commands; the child answers with `Progress` while it loads, `Ready`
once, then one `StepReport` for each step, and a `Pong` for each `Ping`. A job is a number that the parent
gives; each job that was submitted ends in exactly one `JobFinished`, `JobFailed` or `JobCancelled`, each
count in one `JobCounted` or `JobFailed`.
"""

from __future__ import annotations

import struct

import msgspec

from services.inference.engine.port import GenerationRequest, ModelInfo, Prompt, TokenLogprob

MAX_FRAME_BYTES = 32 * 1024 * 1024
"""Far above the largest request (4 MiB on the wire) and the largest report of a step."""
HEADER = struct.Struct(">I")


class FrameError(Exception):
    """The other side broke the protocol."""


class Frame(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A message."""


# Parent to child.


class Configure(Frame, frozen=True):
    """First: what to load and how to run. Paths are absolute."""

    model_id: str
    model_path: str | None
    """A folder of safetensors; None: the packaged model."""
    models_dir: str
    kernels: str
    """`native`, `torch` or `auto`."""
    instruction_set: str
    """One that the native library has, or `auto`."""
    device: str
    """`cpu`, `cuda` or `auto`."""
    dtype: str
    """`stored`, `float32`, `bfloat16` or `auto`."""
    threads: int
    """0 takes all cores that the process may use."""
    max_running: int
    max_waiting: int
    max_output_tokens: int
    max_prefill_tokens: int
    step_target_ms: float
    prompt_lookup_tokens: int
    kv_cache_bytes: int
    """0 takes a share of what is available."""
    prefix_cache: bool


class Submit(Frame, frozen=True):
    job: int
    request: GenerationRequest


class Cancel(Frame, frozen=True):
    job: int


class Count(Frame, frozen=True):
    job: int
    prompt: Prompt


class Ping(Frame, frozen=True):
    """Answered even while a step runs, so it tells a stopped process from a long step."""


Command = Configure | Submit | Cancel | Count | Ping


# Child to parent.


class JobStarted(Frame, frozen=True):
    """The job has left the queue."""

    job: int
    prompt_tokens: int
    cached_tokens: int = 0
    """Of the prompt, those whose keys and values were there already."""


class JobDelta(Frame, frozen=True):
    job: int
    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]


class JobFinished(Frame, frozen=True):
    job: int
    reasons: tuple[str, ...]
    """Values of port.FinishReason, one for each choice."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class JobFailed(Frame, frozen=True):
    """`reason` names a class of services.mesh.errors."""

    job: int
    reason: str
    message: str
    violations: tuple[tuple[str, str], ...] = ()


class JobCancelled(Frame, frozen=True):
    """The job's slots are free."""

    job: int


class JobCounted(Frame, frozen=True):
    job: int
    prompt_tokens: int


JobEvent = JobStarted | JobDelta | JobFinished | JobFailed | JobCancelled | JobCounted


class Progress(Frame, frozen=True):
    """How far loading is, for the log."""

    text: str


class LoadFailed(Frame, frozen=True):
    """The model cannot be loaded; the child ends."""

    text: str


class Ready(Frame, frozen=True):
    """The model is loaded."""

    model: ModelInfo
    longest_token_bytes: int


class EngineState(Frame, frozen=True):
    """The loop after a step, for metrics and routers. Counters count from the start of the process."""

    waiting_tokens: int = 0
    """Prompt tokens that have yet to be computed."""
    kv_pages_used: int = 0
    kv_pages: int = 0
    step_sequences: int = 0
    """Rows of the last step."""
    step_tokens: int = 0
    """Tokens of the last step."""
    step_s: float = 0.0
    """What the last step took; 0 where nothing was computed."""
    prefix_tokens: int = 0
    """Counter: prompt tokens of admitted requests."""
    prefix_hit_tokens: int = 0
    """Counter: of them, found in the prefix cache."""
    preemptions: int = 0
    """Counter."""
    guessed_tokens: int = 0
    """Counter: tokens guessed by prompt lookup."""
    guessed_right_tokens: int = 0
    """Counter: of them, those that were drawn."""


class StepReport(Frame, frozen=True):
    """What one step brought, for all jobs; also a sign of life."""

    events: tuple[JobEvent, ...]
    running: int
    waiting: int
    state: EngineState = EngineState()


class Pong(Frame, frozen=True):
    """The process runs."""


Report = Progress | LoadFailed | Ready | StepReport | Pong

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def encode(frame: Frame) -> bytes:
    """The frame with its length in front. Raises FrameError where it is too large."""
    body = _encoder.encode(frame)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body)) + body


def body_bytes(header: bytes) -> int:
    """The length that a header announces. Raises FrameError where it is over the limit."""
    length: int = HEADER.unpack(header)[0]
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {length} bytes was announced; the limit is {MAX_FRAME_BYTES}")
    return length


def decode_command(body: bytes) -> Command:
    """Raises FrameError."""
    try:
        return _commands.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FrameError(f"not a command: {error}") from error


def decode_report(body: bytes) -> Report:
    """Raises FrameError."""
    try:
        return _reports.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FrameError(f"not a report: {error}") from error
