"""The engine's loop: expire, admit, run, sample, report. Requests join and leave between steps.

What runs in a step is the scheduler's affair, which page holds what the KV cache's. What fails while a job is
at work ends that job only. The loop knows nothing of processes and sockets.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.inference.engine import frames
from services.inference.engine.detokenizer import Detokenizer
from services.inference.engine.isolation import run_isolated
from services.inference.engine.kv_cache import KvCache
from services.inference.engine.logprobs import token_logprob
from services.inference.engine.port import GenerationRequest, ModelInfo, Prompt
from services.inference.engine.sampler import Sampler, SamplingDefaults, sample
from services.inference.engine.scheduler import ScheduleLimits, Scheduler, Work
from services.inference.engine.sequence import Choice, Job, accept
from services.inference.engine.step import Logits, Step, StepRow
from services.inference.engine.step_cost import StepCost
from services.inference.engine.stopping import StopMatcher
from services.inference.engine.tokenizer import PromptTokenizer, invalid
from services.mesh.errors import ContextLengthExceeded, DeadlineExceeded, EngineFault, LlmosError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """All that the loop needs of a model."""

    info: ModelInfo
    step: Step
    tokenizer: PromptTokenizer
    eos: frozenset[int]
    defaults: SamplingDefaults


class EngineLoop:
    """Runs the jobs of one model. One thread calls it. What waits is bounded by the parent."""

    def __init__(
        self,
        model: LoadedModel,
        limits: ScheduleLimits,
        monotonic: Callable[[], float],
        *,
        max_output_tokens: int,
        keep_prefixes: bool = True,
    ) -> None:
        self._model = model
        self._monotonic = monotonic
        self._max_running = limits.max_running
        self._max_output_tokens = max_output_tokens
        self._cache = KvCache(model.step.pages, keep_prefixes=keep_prefixes)
        self._scheduler = Scheduler(limits, self._cache, StepCost())
        self._jobs: dict[int, Job] = {}
        self._events: list[frames.JobEvent] = []
        self._prefix_tokens = self._prefix_hit_tokens = 0
        self._guessed = self._guessed_right = 0
        self._last = (0, 0, 0.0)

    @property
    def idle(self) -> bool:
        return not (self._jobs or self._events)

    @property
    def running(self) -> int:
        """Sequences that run."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Sequences that wait, for a place or for the first of their job."""
        return sum(len(job.unfinished) for job in self._jobs.values()) - self._scheduler.running

    @property
    def state(self) -> frames.EngineState:
        """After a step."""
        sequences, tokens, seconds = self._last
        return frames.EngineState(
            waiting_tokens=self._scheduler.waiting_tokens,
            kv_pages_used=self._cache.held,
            kv_pages=self._cache.pages,
            step_sequences=sequences,
            step_tokens=tokens,
            step_s=seconds,
            prefix_tokens=self._prefix_tokens,
            prefix_hit_tokens=self._prefix_hit_tokens,
            preemptions=self._scheduler.preemptions,
            guessed_tokens=self._guessed,
            guessed_right_tokens=self._guessed_right,
        )

    def submit(self, job_id: int, request: GenerationRequest) -> None:
        """Checks the request and queues it; a bad one fails in the next report."""
        try:
            job = self._job(job_id, request)
        except LlmosError as error:
            self._fail(job_id, error)
        except Exception:
            logger.exception("request %s could not be read", request.request_id)
            self._fault(job_id)
        else:
            self._jobs[job_id] = job
            if not self._finish(job):
                first, *job.followers = job.unfinished
                self._scheduler.add([first])

    def cancel(self, job_id: int) -> None:
        """Ends the job; its pages are free when this returns. Nothing happens where it has ended already."""
        job = self._jobs.pop(job_id, None)
        if job is not None:
            self._scheduler.remove(job)
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
        work = self._scheduler.schedule()
        if work:
            self._sample(*self._run(work))
        else:
            self._last = (0, 0, 0.0)
        events, self._events = self._events, []
        return events

    def _job(self, job_id: int, request: GenerationRequest) -> Job:
        """Raises RequestInvalid, ContextLengthExceeded."""
        vocab = self._model.step.vocab_tokens
        if request.n > self._max_running:
            raise invalid("spec.n", f"at most {self._max_running} choices fit here")
        if any(token >= vocab for token, _ in request.sampling.logit_bias):
            raise invalid("spec.sampling.logit_bias", f"token ids end at {vocab - 1}")
        if any(token >= vocab for token in request.stop_token_ids):
            raise invalid("spec.stop_token_ids", f"token ids end at {vocab - 1}")
        if any(token >= vocab for tokens in request.delivered for token in tokens):
            raise invalid("delivered", f"token ids end at {vocab - 1}")
        if (request.max_tokens or 0) > self._max_output_tokens:
            raise invalid("spec.max_tokens", f"this deployment allows {self._max_output_tokens}")
        prompt = self._model.tokenizer.encode(request.prompt)
        context = self._model.info.context_tokens
        room = context - len(prompt)
        if room < (request.max_tokens or 1):
            asked = f" and max_tokens {request.max_tokens}" if request.max_tokens else ""
            raise ContextLengthExceeded(
                f"The prompt has {len(prompt)} tokens{asked}; the model's context holds {context}."
            )
        max_tokens = request.max_tokens or min(room, self._max_output_tokens)
        timeout_s = math.inf if request.timeout_s is None else request.timeout_s
        job = Job(job_id, request, prompt, max_tokens, self._monotonic() + timeout_s)
        job.choices = [self._choice(job, index) for index in range(request.n)]
        return job

    def _choice(self, job: Job, index: int) -> Choice:
        """A choice, after what was delivered of it already. Raises RequestInvalid."""
        sampler = Sampler(
            job.request.sampling,
            self._model.defaults,
            choice=index,
            prompt=job.prompt,
            vocab_tokens=self._model.step.vocab_tokens,
        )
        stops = StopMatcher(job.request.stop)
        detokenizer = Detokenizer(self._model.tokenizer.table, continues=bool(job.request.prompt.text))
        choice = Choice(job, index, list(job.prompt), sampler, detokenizer, stops)
        delivered = job.request.delivered[index] if job.request.delivered else ()
        for token in delivered:
            if choice.reason is not None:
                raise invalid("delivered", f"choice {index} had ended before its last token")
            # The reader has the text as well.
            accept(choice, token, eos=self._model.eos)
        sampler.replay(delivered)
        return choice

    def _expire(self) -> None:
        for job in self._scheduler.late(self._monotonic()):
            self._end(job)
            self._fail(job.id, DeadlineExceeded("The deadline passed before the answer was complete."))

    def _admit(self) -> None:
        while True:
            admitted, hopeless = self._scheduler.admit(self._monotonic())
            for choice in admitted:
                job = choice.job
                if job.cached_tokens is None:
                    self._start(job, min(choice.computed, job.prompt_tokens))
            if not hopeless:
                return
            for job in hopeless:
                self._end(job)
                self._fail(job.id, DeadlineExceeded("The deadline could not be met."))

    def _start(self, job: Job, cached_tokens: int) -> None:
        job.cached_tokens = cached_tokens
        self._prefix_tokens += job.prompt_tokens
        self._prefix_hit_tokens += cached_tokens
        self._events.append(frames.JobStarted(job.id, job.prompt_tokens, cached_tokens))

    def _run(self, work: Sequence[Work]) -> tuple[list[Work], Logits]:
        """Computes the work; returns that whose next token can be sampled, and its logits.

        They have a row for the next token, and one for each that follows a guessed one.
        """
        begun_s = self._monotonic()
        rows = [_row(each) for each in work]
        logits, failures = run_isolated(self._model.step, rows)
        seconds = self._monotonic() - begun_s
        tokens = sum(len(row.tokens) for row in rows)
        self._scheduler.learn(tokens, seconds)
        self._last = (len(work), tokens, seconds)
        for index, each in enumerate(work):
            if index in failures:
                self._break(each.choice.job, failures[index])
            else:
                self._scheduler.computed(each)
        ready = [each for index, each in enumerate(work) if rows[index].logits and index not in failures]
        return ready, logits

    def _sample(self, ready: Sequence[Work], logits: Logits) -> None:
        places = [(each.choice, place) for each in ready for place in range(1 + len(each.guess))]
        tokens = sample(
            logits,
            [choice.sampler for choice, _ in places],
            [choice.generated + place for choice, place in places],
        )
        begin = 0
        for each in ready:
            end = begin + 1 + len(each.guess)
            kept = self._take(each, logits[begin:end], tokens[begin:end])
            self._scheduler.verified(each, kept)
            self._guessed += len(each.guess)
            self._guessed_right += kept
            begin = end

    def _take(self, work: Work, logits: Logits, tokens: Sequence[int | Exception]) -> int:
        """Appends tokens up to the first that was not guessed; returns how many of the guess were right."""
        choice = work.choice
        for place, (row, token) in enumerate(zip(logits, tokens, strict=True)):
            if choice.job.id not in self._jobs:
                return place  # Another choice of the job has failed in this step.
            try:
                if isinstance(token, Exception):
                    raise token
                self._advance(choice, row, token)
            except Exception as error:
                self._break(choice.job, error)
                return place
            if place == len(work.guess) or token != work.guess[place] or choice.reason is not None:
                return place
        raise RuntimeError("a sequence was sampled without logits")

    def _advance(self, choice: Choice, row: Logits, token: int) -> None:
        job, request = choice.job, choice.job.request
        if job.followers:
            # The prompt is computed; they find it in the prefix cache.
            self._scheduler.add(job.followers)
            job.followers = []
        text = accept(choice, token, eos=self._model.eos)
        table = self._model.tokenizer.table
        logprobs = (token_logprob(row, token, request.top_logprobs, table),) if request.logprobs else ()
        self._say(frames.JobDelta(job.id, choice.index, text, (token,), logprobs))
        if choice.reason is not None:
            self._scheduler.end(choice)
            self._finish(job)

    def _say(self, delta: frames.JobDelta) -> None:
        """Tokens of a sequence in one step go together: a message costs the same however long it is."""
        last = self._events[-1] if self._events else None
        if isinstance(last, frames.JobDelta) and (last.job, last.choice) == (delta.job, delta.choice):
            delta = frames.JobDelta(
                delta.job,
                delta.choice,
                last.text + delta.text,
                last.token_ids + delta.token_ids,
                last.logprobs + delta.logprobs,
            )
            self._events.pop()
        self._events.append(delta)

    def _finish(self, job: Job) -> bool:
        """Reports the end of the job where all of its choices have ended."""
        if job.unfinished:
            return False
        del self._jobs[job.id]
        if job.cached_tokens is None:
            # All of it had been delivered already.
            self._start(job, 0)
        reasons = tuple(each.reason.value for each in job.choices if each.reason is not None)
        self._events.append(
            frames.JobFinished(
                job.id, reasons, job.prompt_tokens, job.completion_tokens, job.cached_tokens or 0
            )
        )
        return True

    def _end(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        self._scheduler.remove(job)

    def _break(self, job: Job, error: Exception) -> None:
        """The job failed in the engine; whatever it was, no other job has to do with it."""
        if job.id in self._jobs:
            logger.error("request %s failed in the engine", job.request.request_id, exc_info=error)
            self._end(job)
            self._fault(job.id)

    def _fail(self, job_id: int, error: LlmosError) -> None:
        violations = tuple((violation.field, violation.description) for violation in error.violations)
        self._events.append(frames.JobFailed(job_id, error.reason, error.message, violations))

    def _fault(self, job_id: int) -> None:
        """Of our own: what it was stands in the log, not in the answer."""
        self._fail(job_id, EngineFault("The engine failed on this request."))


def _row(work: Work) -> StepRow:
    choice = work.choice
    if choice.pages is None:
        raise RuntimeError("a sequence without pages was scheduled")
    end = choice.computed + work.count
    return StepRow(
        [*choice.tokens[choice.computed : end], *work.guess],
        choice.computed,
        choice.pages.ids,
        1 + len(work.guess) if end == len(choice.tokens) else 0,
    )
