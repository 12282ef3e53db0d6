"""The engine's loop: admit, run, sample, report. Requests join and leave between steps.

First come, first served. In each step the first job that is not yet prefilled has a chunk of its prompt
computed, beside one token of each choice that decodes. Where the chunks of a prompt are cut depends on the
prompt alone, so that what runs beside a request moves nothing in its numbers.

What fails while a job is at work ends that job only. The loop knows nothing of processes and sockets.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from services.inference.engine import frames
from services.inference.engine.detokenizer import Detokenizer
from services.inference.engine.port import GenerationRequest, ModelInfo, Prompt
from services.inference.engine.row_step import Logits, Step, StepFault, StepRow
from services.inference.engine.sampler import Sampler, SamplingDefaults
from services.inference.engine.sequence import Choice, Job, take_token
from services.inference.engine.stopping import StopMatcher
from services.inference.engine.tokenizer import PromptTokenizer, invalid
from services.mesh.errors import ContextLengthExceeded, DeadlineExceeded, EngineFault, LlmosError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoopLimits:
    """Sequences (choices) that run at once, and tokens. What waits is bounded by the parent."""

    max_running: int
    max_output_tokens: int
    prefill_chunk_tokens: int


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """All that the loop needs of a model."""

    info: ModelInfo
    step: Step
    tokenizer: PromptTokenizer
    eos: frozenset[int]
    defaults: SamplingDefaults


class EngineLoop:
    """Runs the jobs of one model. One thread calls it."""

    def __init__(self, model: LoadedModel, limits: LoopLimits, monotonic: Callable[[], float]) -> None:
        self._model = model
        self._limits = limits
        self._monotonic = monotonic
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._events: list[frames.JobEvent] = []

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._running or self._events)

    @property
    def running(self) -> int:
        """Sequences that run."""
        return sum(job.request.n for job in self._running.values())

    @property
    def waiting(self) -> int:
        """Sequences that wait."""
        return sum(job.request.n for job in self._waiting)

    def submit(self, job_id: int, request: GenerationRequest) -> None:
        """Checks the request and queues it; a bad one fails in the next report."""
        try:
            self._waiting.append(self._job(job_id, request))
        except LlmosError as error:
            self._fail(job_id, error)
        except Exception:
            logger.exception("request %s could not be read", request.request_id)
            self._fault(job_id)

    def cancel(self, job_id: int) -> None:
        """Ends the job; its slots are free when this returns. Nothing happens where it has ended already."""
        job = self._running.pop(job_id, None)
        if job is not None:
            self._close(job)
        else:
            job = next((waiting for waiting in self._waiting if waiting.id == job_id), None)
            if job is None:
                return
            self._waiting.remove(job)
        self._events.append(frames.JobCancelled(job_id))

    def count(self, job_id: int, prompt: Prompt) -> None:
        """Answers with the prompt's length."""
        try:
            tokens = len(self._model.tokenizer.encode(prompt))
            self._events.append(frames.JobCounted(job_id, tokens))
        except LlmosError as error:
            self._fail(job_id, error)
        except Exception:
            logger.exception("a prompt could not be counted")
            self._fault(job_id)

    def step(self) -> list[frames.JobEvent]:
        """One turn of the loop; returns what it brought."""
        self._expire()
        self._admit()
        work = self._schedule()
        if work:
            results = self._model.step.run([row for _, _, row in work])
            for (job, choice, row), result in zip(work, results, strict=True):
                self._process(job, choice, row, result)
        events, self._events = self._events, []
        return events

    def _job(self, job_id: int, request: GenerationRequest) -> Job:
        """Raises RequestInvalid, ContextLengthExceeded."""
        vocab = self._model.step.vocab_tokens
        if request.n > self._limits.max_running:
            raise invalid("spec.n", f"at most {self._limits.max_running} choices fit here")
        if any(token >= vocab for token, _ in request.sampling.logit_bias):
            raise invalid("spec.sampling.logit_bias", f"token ids end at {vocab - 1}")
        if any(token >= vocab for token in request.stop_token_ids):
            raise invalid("spec.stop_token_ids", f"token ids end at {vocab - 1}")
        if (request.max_tokens or 0) > self._limits.max_output_tokens:
            raise invalid("spec.max_tokens", f"this deployment allows {self._limits.max_output_tokens}")
        prompt = self._model.tokenizer.encode(request.prompt)
        context = self._model.info.context_tokens
        room = context - len(prompt)
        if room < (request.max_tokens or 1):
            asked = f" and max_tokens {request.max_tokens}" if request.max_tokens else ""
            raise ContextLengthExceeded(
                f"The prompt has {len(prompt)} tokens{asked}; the model's context holds {context}."
            )
        max_tokens = request.max_tokens or min(room, self._limits.max_output_tokens)
        timeout_s = math.inf if request.timeout_s is None else request.timeout_s
        return Job(job_id, request, prompt, max_tokens, self._monotonic() + timeout_s)

    def _expire(self) -> None:
        now_s = self._monotonic()
        late = [job for job in (*self._waiting, *self._running.values()) if job.deadline_s <= now_s]
        for job in late:
            if self._running.pop(job.id, None) is not None:
                self._close(job)
            else:
                self._waiting.remove(job)
            self._fail(job.id, DeadlineExceeded("The deadline passed before the answer was complete."))

    def _admit(self) -> None:
        while self._waiting and self.running + self._waiting[0].request.n <= self._limits.max_running:
            job = self._waiting.popleft()
            self._running[job.id] = job
            job.slot = self._model.step.open_slot()
            self._events.append(frames.JobStarted(job.id, len(job.prompt)))

    def _schedule(self) -> list[tuple[Job, Choice | None, StepRow]]:
        work: list[tuple[Job, Choice | None, StepRow]] = []
        prefill = True
        for job in self._running.values():
            if job.slot is None:
                work.extend((job, choice, _decode_row(job, choice)) for choice in job.decoding)
            elif prefill:
                # One at a time: the first to come is the first to answer.
                prefill = False
                work.append((job, None, self._prefill_row(job, job.slot)))
        return work

    def _prefill_row(self, job: Job, slot: int) -> StepRow:
        end = min(job.prefilled + self._limits.prefill_chunk_tokens, len(job.prompt))
        return StepRow(slot, job.prompt[job.prefilled : end], job.prefilled, end == len(job.prompt))

    def _process(
        self, job: Job, choice: Choice | None, row: StepRow, result: Logits | StepFault | None
    ) -> None:
        if job.id not in self._running:
            return  # Another choice of the job has failed in this step.
        try:
            if isinstance(result, StepFault):
                raise result.cause
            if choice is None:
                job.prefilled += len(row.tokens)
                if result is None:
                    return
                self._open_choices(job)
            if result is not None:
                for each in job.choices if choice is None else [choice]:
                    self._advance(job, each, result)
        except Exception:
            logger.exception("request %s failed in the engine", job.request.request_id)
            del self._running[job.id]
            self._close(job)
            self._fault(job.id)
            return
        if not job.decoding:
            del self._running[job.id]
            reasons = tuple(each.reason.value for each in job.choices if each.reason is not None)
            self._events.append(frames.JobFinished(job.id, reasons, len(job.prompt), job.completion_tokens))

    def _open_choices(self, job: Job) -> None:
        """The prompt is computed: each choice gets a copy of it."""
        if job.slot is None:
            raise RuntimeError("the job has no prefill slot")
        samplers = [
            Sampler(
                job.request.sampling,
                self._model.defaults,
                choice=index,
                prompt=job.prompt,
                vocab_tokens=self._model.step.vocab_tokens,
            )
            for index in range(job.request.n)
        ]
        first, job.slot = job.slot, None
        for index, sampler in enumerate(samplers):
            slot = first if index == 0 else self._model.step.fork_slot(first)
            detokenizer = Detokenizer(self._model.tokenizer.table)
            job.choices.append(Choice(index, slot, sampler, detokenizer, StopMatcher(job.request.stop)))

    def _advance(self, job: Job, choice: Choice, logits: Logits) -> None:
        delta = take_token(job, choice, logits, eos=self._model.eos, table=self._model.tokenizer.table)
        self._events.append(delta)
        if choice.reason is not None:
            self._model.step.close_slot(choice.slot)

    def _close(self, job: Job) -> None:
        slots = [choice.slot for choice in job.decoding]
        for slot in slots if job.slot is None else [job.slot]:
            self._model.step.close_slot(slot)

    def _fail(self, job_id: int, error: LlmosError) -> None:
        violations = tuple((violation.field, violation.description) for violation in error.violations)
        self._events.append(frames.JobFailed(job_id, error.reason, error.message, violations))

    def _fault(self, job_id: int) -> None:
        """Of our own: what it was stands in the log, not in the answer."""
        self._fail(job_id, EngineFault("The engine failed on this request."))


def _decode_row(job: Job, choice: Choice) -> StepRow:
    position = len(job.prompt) + choice.tokens - 1
    return StepRow(choice.slot, (choice.last_token,), position, wants_logits=True)
