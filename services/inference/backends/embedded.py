"""The engine port over a child process that runs the loop. This process never imports torch.

The child may die, hang or be stopped; this side sees it, tells it by health, ends what ran with ReplicaLost,
and starts the next one. A job is kept until the child has said its last word about it: so a slot counts as
taken until it is free, and what is under way to the child is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from services.inference.engine import frames
from services.inference.engine.health_state import HealthState
from services.inference.engine.mailbox import Mailbox
from services.inference.engine.port import (
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
    Started,
    TokenCount,
    Usage,
)
from services.inference.engine.process import EngineProcess
from services.inference.engine.resumption import check_delivered
from services.inference.engine.watchdog import Timeouts, Watchdog
from services.mesh.clock import Clock
from services.mesh.errors import (
    BY_REASON,
    ContextLengthExceeded,
    DeadlineExceeded,
    Draining,
    EngineFault,
    LlmosError,
    ModelNotFound,
    NoReplica,
    Overloaded,
    ReplicaLost,
    Violation,
)

logger = logging.getLogger(__name__)

STEP_MEAN_WEIGHT = 0.1
"""Of the newest step in the moving mean of step times: ten steps make up most of it."""
Observer = Callable[[frames.EngineState, frames.EngineState], None]
"""Given the states before and after a step; before the first step of a process that is an empty one."""


@dataclass(frozen=True, slots=True)
class EmbeddedConfig:
    """What the engine is told; `settings.InferenceSettings` explains each."""

    model_id: str
    model_path: Path | None
    models_dir: Path
    kernels: str
    instruction_set: str
    device: str
    dtype: str
    threads: int
    max_running: int
    max_waiting: int
    max_output_tokens: int
    max_prefill_tokens: int
    step_target_ms: float
    prompt_lookup_tokens: int
    kv_cache_bytes: int
    prefix_cache: bool
    timeouts: Timeouts
    restart_backoff_min_s: float
    restart_backoff_max_s: float
    environment: Mapping[str, str]

    def configure(self) -> frames.Configure:
        """The child's first frame."""
        return frames.Configure(
            model_id=self.model_id,
            model_path=None if self.model_path is None else str(self.model_path.resolve()),
            models_dir=str(self.models_dir.resolve()),
            kernels=self.kernels,
            instruction_set=self.instruction_set,
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
            max_running=self.max_running,
            max_waiting=self.max_waiting,
            max_output_tokens=self.max_output_tokens,
            max_prefill_tokens=self.max_prefill_tokens,
            step_target_ms=self.step_target_ms,
            prompt_lookup_tokens=self.prompt_lookup_tokens,
            kv_cache_bytes=self.kv_cache_bytes,
            prefix_cache=self.prefix_cache,
        )


@dataclass(slots=True)
class _Job:
    """A request that the child has, or a count of tokens."""

    sequences: int
    mailbox: Mailbox
    counted: asyncio.Future[int] | None = None

    def fail(self, error: LlmosError) -> None:
        if self.counted is not None and not self.counted.done():
            self.counted.set_exception(error)
        self.mailbox.fail(error)


class EmbeddedEngine:
    """An `Engine`."""

    def __init__(
        self, config: EmbeddedConfig, clock: Clock, observe: Observer = lambda before, now: None
    ) -> None:
        self._config = config
        self._clock = clock
        self._observe = observe
        self._health = HealthState("not started")
        self._jobs: dict[int, _Job] = {}
        self._next_job = 0
        self._process: EngineProcess | None = None
        self._ready: frames.Ready | None = None
        self._model = ModelInfo(config.model_id)
        self._state = frames.EngineState()
        self._running = self._waiting = 0
        self._step_s = 0.0
        """A moving mean."""
        self._restarts = 0
        self._supervisor: asyncio.Task[None] | None = None
        self._watchdog: Watchdog | None = None

    # The port.

    async def start(self) -> None:
        if self._supervisor is None:
            self._health.set(serving=False, detail="the model is being loaded")
            self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def stop(self) -> None:
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await supervisor
        self._health.set(serving=False, detail="stopped")
        self._end_all(Draining, "The engine is shutting down.")

    async def generate(
        self, request: GenerationRequest, direct: Direct | None = None
    ) -> AsyncGenerator[EngineEvent, None]:
        check_delivered(request)
        process = self._admit(request.model, request.prompt, request.n)
        job_id, job = self._new_job(request.n, Mailbox(self._clock, gather_s=request.gather_s, direct=direct))
        deadline = asyncio.create_task(self._expire(job, request.timeout_s), name="engine-deadline")
        try:
            process.post(frames.Submit(job_id, request))
            while True:
                event = await job.mailbox.get()
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            deadline.cancel()
            # Without waiting: this also runs where the reader's task is being cancelled.
            if job_id in self._jobs and process is self._process:
                process.post(frames.Cancel(job_id))

    async def count_tokens(self, model: str, prompt: Prompt) -> TokenCount:
        process = self._admit(model, prompt, 1)
        job_id, job = self._new_job(1, Mailbox(self._clock))
        job.counted = asyncio.get_running_loop().create_future()
        process.post(frames.Count(job_id, prompt))
        return TokenCount(await job.counted, self._model.context_tokens)

    def models(self) -> tuple[ModelInfo, ...]:
        return (replace(self._model, ready=self._health.value.serving),)

    def health(self) -> Health:
        return self._health.value

    def health_changes(self) -> AsyncIterator[Health]:
        return self._health.changes()

    async def wait_healthy(self, timeout_s: float) -> None:
        await self._health.wait_serving(timeout_s, self._clock)

    def load(self) -> Load:
        state = self._state
        return Load(
            running=self._running,
            waiting=self._waiting,
            restarts=self._restarts,
            waiting_tokens=state.waiting_tokens,
            kv_pages_used=state.kv_pages_used,
            kv_pages=state.kv_pages,
            step_s=self._step_s,
            max_running=self._config.max_running,
            max_waiting=self._config.max_waiting,
        )

    @property
    def child_pid(self) -> int | None:
        """The engine's process, for tests that harm it."""
        return None if self._process is None else self._process.pid

    # Jobs.

    def _admit(self, model: str, prompt: Prompt, sequences: int) -> EngineProcess:
        """The process that takes the request. Raises what the port says of `generate`, at once."""
        if model != self._config.model_id:
            raise ModelNotFound(f"There is no model `{model}` here.")
        process, ready = self._process, self._ready
        if process is None or ready is None:
            raise NoReplica("The model is not loaded at present.")
        places = self._config.max_running + self._config.max_waiting
        taken = sum(job.sequences for job in self._jobs.values())
        if taken + min(sequences, self._config.max_running) > places:
            raise Overloaded(f"The engine has {taken} sequences running and waiting, and takes {places}.")
        size = len(prompt.text.encode()) + sum(len(message.content.encode()) for message in prompt.messages)
        if size > ready.longest_token_bytes * self._model.context_tokens:
            # No tokenizer could make this fit, so the engine need not try.
            raise ContextLengthExceeded(
                f"A prompt of {size} bytes is longer than the model's context of"
                f" {self._model.context_tokens} tokens."
            )
        return process

    def _new_job(self, sequences: int, mailbox: Mailbox) -> tuple[int, _Job]:
        self._next_job += 1
        job = self._jobs[self._next_job] = _Job(sequences, mailbox)
        return self._next_job, job

    async def _expire(self, job: _Job, timeout_s: float | None) -> None:
        """The child keeps deadlines as well; this one holds where the child is stopped or hangs."""
        if timeout_s is not None:
            await self._clock.sleep(timeout_s)
            job.fail(DeadlineExceeded("The deadline passed before the answer was complete."))

    def _end_all(self, error: type[LlmosError], message: str) -> None:
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            job.fail(error(message))

    # The child.

    async def _supervise(self) -> None:
        """One life of the child after the other."""
        backoff_s = self._config.restart_backoff_min_s
        while True:
            begun_s = self._clock.monotonic()
            reason = await self._live()
            self._end_all(ReplicaLost, "The engine was lost while the request ran.")
            if self._clock.monotonic() - begun_s > 2 * self._config.restart_backoff_max_s:
                backoff_s = self._config.restart_backoff_min_s
            logger.error("the engine is gone (%s); it is started again in %.1f s", reason, backoff_s)
            await self._clock.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, self._config.restart_backoff_max_s)
            self._restarts += 1

    async def _live(self) -> str:
        """From start to end; returns what ended it. Jobs are left for the caller to end."""
        reason = ""
        process: EngineProcess | None = None
        try:
            process = self._process = await EngineProcess.spawn(self._config.environment)
            process.post(self._config.configure())
            watchdog = self._watchdog = Watchdog(
                process, self._config.timeouts, self._clock, self._health, busy=lambda: bool(self._jobs)
            )
            async with watchdog:
                while (report := await process.receive()) is not None:
                    watchdog.heard(report)
                    reason = self._take(report) or reason
            reason = watchdog.verdict or reason
        except (OSError, frames.FrameError) as error:
            reason = str(error)
        finally:
            # First of all the truth: nothing is served from here on.
            self._ready = None
            self._process = self._watchdog = None
            self._running, self._waiting, self._step_s = 0, 0, 0.0
            self._state = frames.EngineState()
            self._health.set(serving=False, detail=reason or "the engine is gone")
            if process is not None:
                ended = await process.close()
                reason = reason or ended
        return reason

    def _take(self, report: frames.Report) -> str:
        """One report; returns why the child will end, where it says so."""
        match report:
            case frames.StepReport(events):
                self._measure(report)
                for event in events:
                    self._dispatch(event)
            case frames.Ready(model):
                self._ready, self._model = report, model
                self._health.set(serving=True, detail="serving")
                logger.info("the engine serves %s, revision %s", model.id, model.revision)
            case frames.Progress(text):
                logger.info("engine: %s", text)
                self._health.set(serving=False, detail=text)
            case frames.LoadFailed(text):
                return f"the model cannot be loaded: {text}"
        return ""

    def _measure(self, report: frames.StepReport) -> None:
        before, now = self._state, report.state
        if now.step_s:
            mean_s = self._step_s or now.step_s
            self._step_s = mean_s + STEP_MEAN_WEIGHT * (now.step_s - mean_s)
        self._running, self._waiting, self._state = report.running, report.waiting, now
        self._observe(before, now)

    def _dispatch(self, event: frames.JobEvent) -> None:
        job = self._jobs.get(event.job)
        if job is None:
            raise frames.FrameError(f"the engine speaks of job {event.job}, which it does not have")
        match event:
            case frames.JobStarted(_, prompt_tokens, cached_tokens):
                model = self._model
                job.mailbox.put(
                    Started(
                        model.revision, model.numerics_id, model.exact_replay, prompt_tokens, cached_tokens
                    )
                )
            case frames.JobDelta(_, choice, text, token_ids, logprobs):
                job.mailbox.put(Delta(choice, text, token_ids, logprobs))
            case frames.JobFinished(job_id, reasons, prompt_tokens, completion_tokens, cached_tokens):
                usage = Usage(prompt_tokens, completion_tokens, cached_tokens)
                job.mailbox.put(Finished(tuple(map(FinishReason, reasons)), usage))
                del self._jobs[job_id]
            case frames.JobFailed(job_id, reason, message, violations):
                found = BY_REASON.get(reason, EngineFault)
                job.fail(found(message, violations=[Violation(*violation) for violation in violations]))
                del self._jobs[job_id]
            case frames.JobCancelled(job_id):
                del self._jobs[job_id]
            case frames.JobCounted(job_id, prompt_tokens):
                if job.counted is not None and not job.counted.done():
                    job.counted.set_result(prompt_tokens)
                del self._jobs[job_id]
