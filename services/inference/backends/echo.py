"""A deterministic engine without a model: it says the prompt's words again, each a token.

For tests of everything around an engine. It keeps the whole port: queue, slots, stop strings, cancellation,
health. Where `directives` are allowed, a prompt may hold some, which are not echoed:

    [[tokens=200]]      says its words again and again, 200 in all
    [[delay_ms=5]]      waits before each token
    [[first_ms=500]]    waits before the first token (a long prefill)
    [[hang_after=3]]    stops saying anything after 3 tokens; [[hang]] is [[hang_after=0]]
    [[fail_after=3]]    EngineFault after 3 tokens; [[fail]] is [[fail_after=0]]
    [[fail_percent=30]] EngineFault at the start, of so many of a hundred requests, by their ids
    [[crash_after=3]]   the engine is lost after 3 tokens, with all that runs, and comes back by itself;
                        [[crash]] is [[crash_after=0]]

A directive whose tokens were delivered by another replica has had its turn, and does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import zlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace

from services.inference.engine.health_state import HealthState
from services.inference.engine.mailbox import Mailbox
from services.inference.engine.port import (
    Alternative,
    Capability,
    Delta,
    Direct,
    EngineEvent,
    Finished,
    FinishReason,
    GenerationRequest,
    Health,
    Load,
    ModelInfo,
    Prompt,
    Role,
    Started,
    TokenCount,
    TokenLogprob,
    Usage,
)
from services.inference.engine.resumption import check_delivered
from services.inference.engine.stopping import StopMatcher
from services.mesh.clock import Clock
from services.mesh.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    Draining,
    EngineFault,
    LlmosError,
    ModelNotFound,
    NoReplica,
    Overloaded,
    ReplicaLost,
    RequestInvalid,
    Violation,
)

MODEL_ID = "echo"
LOST = "The engine was lost while the request ran."
LATE = "The deadline passed before the answer was complete."
VOCAB_TOKENS = 1 << 31
PAGE_TOKENS = 16
"""Echo has no KV cache; its load tells of one as it would be."""
_WORD = re.compile(r"\s*\S+")
_DIRECTIVE = re.compile(r"\s*\[\[([a-z_]+)(?:=(\d{1,9}))?\]\]")
_NAMES = frozenset({"tokens", "delay_ms", "first_ms", "hang", "fail", "fail_percent", "crash"})


@dataclass(frozen=True, slots=True)
class EchoConfig:
    """What the engine is told; `settings.InferenceSettings` explains each."""

    max_running: int = 8
    max_waiting: int = 32
    max_output_tokens: int = 4096
    context_tokens: int = 8192
    delay_s: float = 0.0
    """Before each token, where no directive says otherwise."""
    directives: bool = False
    recovery_s: float = 1.0
    """How long a crash lasts."""


@dataclass(frozen=True, slots=True)
class Script:
    """What one request is to do. Thresholds count tokens; None never happens."""

    words: tuple[str, ...]
    tokens: int
    delay_s: float
    first_s: float
    hang_after: int | None
    fail_after: int | None
    crash_after: int | None
    fail_percent: int


def token_id(word: str) -> int:
    """A word's id: the same everywhere, always."""
    return zlib.crc32(word.encode()) % VOCAB_TOKENS


def read_script(prompt: Prompt, config: EchoConfig) -> Script:
    """The last message of the user, or the text, with what its directives ask for."""
    said = [message.content for message in prompt.messages if message.role is Role.USER]
    text = (said[-1] if said else prompt.messages[-1].content) if prompt.messages else prompt.text
    asked: dict[str, int] = {}
    if config.directives:
        for name, value in _DIRECTIVE.findall(text):
            asked[name.removesuffix("_after")] = int(value or 0)
        unknown = asked.keys() - _NAMES
        if unknown:
            what = f"there is no directive {sorted(unknown)}"
            raise RequestInvalid(f"`spec.prompt`: {what}.", violations=[Violation("spec.prompt", what)])
        text = _DIRECTIVE.sub("", text)
    words = tuple(_WORD.findall(text.strip())) or ("...",)
    return Script(
        words=words,
        tokens=asked.get("tokens", len(words)),
        delay_s=asked["delay_ms"] / 1000 if "delay_ms" in asked else config.delay_s,
        first_s=asked.get("first_ms", 0) / 1000,
        hang_after=asked.get("hang"),
        fail_after=asked.get("fail"),
        crash_after=asked.get("crash"),
        fail_percent=asked.get("fail_percent", 0),
    )


def count_words(prompt: Prompt) -> int:
    texts = [message.content for message in prompt.messages] or [prompt.text]
    return sum(len(_WORD.findall(text)) for text in texts)


@dataclass(slots=True)
class _Job:
    request: GenerationRequest
    script: Script
    prompt_tokens: int
    max_tokens: int
    deadline_s: float
    said: list[int]
    """Tokens of each choice, with those that another replica delivered."""
    mailbox: Mailbox
    task: asyncio.Task[None] | None = None

    @property
    def pages(self) -> int:
        return sum(math.ceil((self.prompt_tokens + said) / PAGE_TOKENS) for said in self.said)


class EchoEngine:
    """An `Engine`."""

    def __init__(self, config: EchoConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._health = HealthState("not started")
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._restarts = 0
        self._model = ModelInfo(
            id=MODEL_ID,
            revision="echo-1",
            context_tokens=config.context_tokens,
            capabilities=(Capability.GENERATE, Capability.CHAT),
            numerics_id="echo-1",
            exact_replay=True,
        )

    async def start(self) -> None:
        self._health.set(serving=True, detail="serving")

    async def stop(self) -> None:
        self._health.set(serving=False, detail="stopped")
        self._end_all(Draining("The engine is shutting down."))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def generate(
        self, request: GenerationRequest, direct: Direct | None = None
    ) -> AsyncGenerator[EngineEvent, None]:
        job = self._admit(request, direct)
        self._waiting.append(job)
        self._start_waiting()
        timer = self._keep(asyncio.create_task(self._expire(job), name="echo-deadline"))
        try:
            while True:
                event = await job.mailbox.get()
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            timer.cancel()
            self._leave(job)

    async def count_tokens(self, model: str, prompt: Prompt) -> TokenCount:
        self._check_serving(model)
        return TokenCount(count_words(prompt), self._config.context_tokens)

    def models(self) -> tuple[ModelInfo, ...]:
        return (replace(self._model, ready=self._health.value.serving),)

    def health(self) -> Health:
        return self._health.value

    def health_changes(self) -> AsyncIterator[Health]:
        return self._health.changes()

    async def wait_healthy(self, timeout_s: float) -> None:
        await self._health.wait_serving(timeout_s, self._clock)

    def load(self) -> Load:
        config = self._config
        return Load(
            running=_sequences(self._running),
            waiting=_sequences(self._waiting),
            restarts=self._restarts,
            waiting_tokens=sum(job.prompt_tokens for job in self._waiting),
            kv_pages_used=sum(job.pages for job in self._running),
            kv_pages=config.max_running * math.ceil(config.context_tokens / PAGE_TOKENS),
            step_s=config.delay_s,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
        )

    def _check_serving(self, model: str) -> None:
        if model != MODEL_ID:
            raise ModelNotFound(f"There is no model `{model}` here.")
        if not self._health.value.serving:
            raise NoReplica("The model is not loaded at present.")

    def _admit(self, request: GenerationRequest, direct: Direct | None) -> _Job:
        check_delivered(request)
        self._check_serving(request.model)
        config, taken = self._config, _sequences(self._running) + _sequences(self._waiting)
        places = config.max_running + config.max_waiting
        if taken + min(request.n, config.max_running) > places:
            raise Overloaded(f"The engine has {taken} sequences running and waiting, and takes {places}.")
        if request.n > config.max_running:
            raise _invalid("spec.n", f"at most {config.max_running} choices fit here")
        if (request.max_tokens or 0) > config.max_output_tokens:
            raise _invalid("spec.max_tokens", f"this deployment allows {config.max_output_tokens}")
        if any(token >= VOCAB_TOKENS for tokens in request.delivered for token in tokens):
            raise _invalid("delivered", f"token ids end at {VOCAB_TOKENS - 1}")
        prompt_tokens = count_words(request.prompt)
        room = config.context_tokens - prompt_tokens
        if room < (request.max_tokens or 1):
            raise ContextLengthExceeded(
                f"The prompt has {prompt_tokens} tokens; the model's context holds {config.context_tokens}."
            )
        max_tokens = request.max_tokens or min(room, config.max_output_tokens)
        deadline_s = self._clock.monotonic() + (math.inf if request.timeout_s is None else request.timeout_s)
        mailbox = Mailbox(self._clock, gather_s=request.gather_s, direct=direct)
        script, said = read_script(request.prompt, config), [0] * request.n
        return _Job(request, script, prompt_tokens, max_tokens, deadline_s, said, mailbox)

    def _start_waiting(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            if job.deadline_s <= self._clock.monotonic():
                self._waiting.popleft()
                job.mailbox.fail(DeadlineExceeded(LATE))
                continue
            if _sequences(self._running) + job.request.n > self._config.max_running:
                return
            self._waiting.popleft()
            self._running.append(job)
            job.task = self._keep(asyncio.create_task(self._run(job), name="echo-request"))

    def _keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _leave(self, job: _Job) -> None:
        if job in self._waiting:
            self._waiting.remove(job)
        if job in self._running:
            self._running.remove(job)
            if job.task is not None:
                job.task.cancel()
        self._start_waiting()

    async def _expire(self, job: _Job) -> None:
        if job.request.timeout_s is not None:
            await self._clock.sleep(job.request.timeout_s)
            job.mailbox.fail(DeadlineExceeded(LATE))
            self._leave(job)

    async def _run(self, job: _Job) -> None:
        told = (self._model.revision, self._model.numerics_id, self._model.exact_replay)
        job.mailbox.put(Started(*told, job.prompt_tokens))
        try:
            await self._say(job)
        except LlmosError as error:
            job.mailbox.fail(error)
        if job in self._running:
            self._running.remove(job)
        self._start_waiting()

    async def _say(self, job: _Job) -> None:
        """All choices, in step. Raises EngineFault where the script asks for it."""
        request, script = job.request, job.script
        texts = [StopMatcher(request.stop) for _ in range(request.n)]
        reasons: list[FinishReason | None] = [None] * request.n
        for choice, tokens in enumerate(request.delivered):
            for _ in tokens:
                _, _, reasons[choice] = self._next(job, choice, texts[choice])
        delivered = max(job.said)
        await self._clock.sleep(script.first_s)
        while None in reasons:
            if max(job.said) > delivered or not delivered:
                await self._obey(job, max(job.said))
            await self._clock.sleep(script.delay_s)
            for choice, stops in enumerate(texts):
                if reasons[choice] is None:
                    word, text, reasons[choice] = self._next(job, choice, stops)
                    job.mailbox.put(Delta(choice, text, (token_id(word),), _logprobs(request, word)))
        usage = Usage(job.prompt_tokens, sum(job.said))
        job.mailbox.put(Finished(tuple(reason for reason in reasons if reason is not None), usage))

    async def _obey(self, job: _Job, said: int) -> None:
        script, draw = job.script, zlib.crc32(job.request.request_id.encode()) % 100
        if script.fail_after == said or draw < script.fail_percent:
            raise EngineFault("The engine failed on this request.")
        if script.crash_after == said:
            self._crash()
            raise ReplicaLost(LOST)
        if script.hang_after == said:
            await asyncio.Event().wait()

    def _next(self, job: _Job, choice: int, stops: StopMatcher) -> tuple[str, str, FinishReason | None]:
        """The choice's next word, the text that is ready with it, and why it ends, if it does."""
        words, said = job.script.words, job.said[choice]
        word = words[said % len(words)]
        if said and said % len(words) == 0:
            word = f" {word}"
        job.said[choice] += 1
        return word, *self._end_of(job, word, said + 1, stops)

    def _end_of(self, job: _Job, word: str, said: int, stops: StopMatcher) -> tuple[str, FinishReason | None]:
        request = job.request
        if token_id(word) in request.stop_token_ids:
            return stops.flush(), FinishReason.STOP
        text = stops.push(word)
        if stops.stopped:
            return text, FinishReason.STOP
        if said >= job.max_tokens:
            return text + stops.flush(), FinishReason.LENGTH
        if said >= job.script.tokens and not request.ignore_eos:
            return text + stops.flush(), FinishReason.END_OF_SEQUENCE
        return text, None

    def _crash(self) -> None:
        """What the death of a child is to the embedded engine."""
        self._health.set(serving=False, detail="the engine is gone")
        for job in self._running:
            if job.task is not None and job.task is not asyncio.current_task():
                job.task.cancel()
        self._end_all(ReplicaLost(LOST))
        self._keep(asyncio.create_task(self._recover(), name="echo-recovery"))

    async def _recover(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await self._clock.sleep(self._config.recovery_s)
            self._restarts += 1
            self._health.set(serving=True, detail="serving")

    def _end_all(self, error: LlmosError) -> None:
        for job in (*self._running, *self._waiting):
            job.mailbox.fail(type(error)(error.message))
        self._waiting.clear()
        self._running.clear()


def _invalid(field: str, what: str) -> RequestInvalid:
    return RequestInvalid(f"`{field}`: {what}.", violations=[Violation(field, what)])


def _sequences(jobs: deque[_Job] | list[_Job]) -> int:
    return sum(job.request.n for job in jobs)


def _logprobs(request: GenerationRequest, word: str) -> tuple[TokenLogprob, ...]:
    """Echo is certain of what it says."""
    if not request.logprobs:
        return ()
    chosen = Alternative(token_id(word), word.encode(), 0.0)
    return (TokenLogprob(chosen, (chosen,) if request.top_logprobs else ()),)
