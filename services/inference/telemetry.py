"""Measures an engine: from outside, as an `Engine` around an `Engine`; and its steps, one by one.

Names are those of OpenTelemetry's conventions for generative AI (1.41) where they have one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing

from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.trace import StatusCode

from services.inference.engine.frames import EngineState
from services.inference.engine.port import (
    Delta,
    Direct,
    Engine,
    EngineEvent,
    Finished,
    GenerationRequest,
    Health,
    Load,
    ModelInfo,
    Prompt,
    Started,
    TokenCount,
)
from services.mesh.clock import Clock
from services.mesh.errors import LlmosError
from services.mesh.histograms import HISTOGRAMS, Histograms

_LABELS = ("gen_ai.request.model",)
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_QUEUE_S = (0.001, 0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60)
_STEP_S = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1, 2, 5, 10, 30)
_STEP_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_GAUGES = {
    "llmos.engine.sequences_running": ("running", "Sequences that run."),
    "llmos.engine.sequences_waiting": ("waiting", "Sequences that wait for a slot."),
    "llmos.engine.prompt_tokens_waiting": ("waiting_tokens", "Prompt tokens that have yet to be computed."),
    "llmos.engine.kv_pages_used": ("kv_pages_used", "Pages of the KV cache that running sequences hold."),
    "llmos.engine.kv_pages": ("kv_pages", "All pages of the KV cache."),
}
"""What `Engine.load` tells, each with its field there."""


_COUNTERS = {
    "prefix_tokens": ("{token}", "Prompt tokens of admitted requests."),
    "prefix_hit_tokens": ("{token}", "Of them, found in the prefix cache."),
    "preemptions": ("", "Sequences that gave up their pages and were computed again."),
    "guessed_tokens": ("{token}", "Tokens guessed by prompt lookup."),
    "guessed_right_tokens": ("{token}", "Of them, those that were drawn."),
}
"""What an EngineState counts, by the name of its field: unit and description."""


class StepInstruments:
    """Records each step of an engine that runs in steps."""

    def __init__(self, histograms: Histograms = HISTOGRAMS) -> None:
        self._time = histograms.make(
            "llmos.engine.step_time",
            unit="s",
            description="What a step took.",
            bounds=_STEP_S,
            labels=(),
        )
        self._sequences = histograms.make(
            "llmos.engine.step_sequences",
            unit="",
            description="Sequences computed in a step: the batch.",
            bounds=_STEP_SEQUENCES,
            labels=(),
        )
        self._tokens = histograms.make(
            "llmos.engine.step_tokens",
            unit="{token}",
            description="Tokens computed in a step, of prompts and of answers.",
            bounds=_STEP_TOKENS,
            labels=(),
        )
        # Counted here, read when somebody asks, as the histograms are.
        self._counted = dict.fromkeys(_COUNTERS, 0)
        for name, (unit, description) in _COUNTERS.items():
            _meter().create_observable_counter(
                f"llmos.engine.{name}", [self._observed(name)], unit=unit, description=description
            )

    def _observed(self, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        return lambda options: [Observation(self._counted[name])]

    def record(self, before: EngineState, now: EngineState) -> None:
        """The states before and after a step of one process; its counters begin at 0."""
        if now.step_s:
            self._time.record(now.step_s, ())
            self._sequences.record(now.step_sequences, ())
            self._tokens.record(now.step_tokens, ())
        for name in _COUNTERS:
            more = getattr(now, name) - getattr(before, name)
            if more > 0:
                self._counted[name] += more


class MeasuredEngine:
    """Passes everything through; records a span and metrics for each generation."""

    def __init__(self, engine: Engine, clock: Clock, histograms: Histograms = HISTOGRAMS) -> None:
        self._engine = engine
        self._clock = clock
        self._tracer = trace.get_tracer("llmos.inference")
        meter = _meter()
        self._first_token = histograms.make(
            "gen_ai.server.time_to_first_token",
            unit="s",
            description="From the request's arrival to its first token.",
            bounds=_FIRST_TOKEN_S,
            labels=_LABELS,
        )
        self._per_token = histograms.make(
            "gen_ai.server.time_per_output_token",
            unit="s",
            description="Between tokens after the first, for one choice.",
            bounds=_PER_TOKEN_S,
            labels=_LABELS,
        )
        self._queue = histograms.make(
            "llmos.engine.queue_time",
            unit="s",
            description="From the request's arrival until it got its slot.",
            bounds=_QUEUE_S,
            labels=_LABELS,
        )
        self._tokens = meter.create_counter(
            "llmos.engine.output_tokens", unit="{token}", description="Tokens that readers were given."
        )
        for name, (field, description) in _GAUGES.items():
            meter.create_observable_gauge(name, [self._observed(field)], description=description)
        meter.create_observable_counter(
            "llmos.engine.restarts",
            [self._observed("restarts")],
            description="Restarts of the engine's process.",
        )

    def _observed(self, field: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        return lambda options: [Observation(getattr(self._engine.load(), field))]

    async def start(self) -> None:
        await self._engine.start()

    async def stop(self) -> None:
        await self._engine.stop()

    async def generate(
        self, request: GenerationRequest, direct: Direct | None = None
    ) -> AsyncGenerator[EngineEvent, None]:
        labels = (request.model,)
        begun_s = self._clock.monotonic()
        first_s = last_s = 0.0
        tokens = 0

        def count(delta: Delta) -> None:
            nonlocal first_s, last_s, tokens
            last_s = self._clock.monotonic() - begun_s
            if not tokens:
                first_s = last_s
                self._first_token.record(first_s, labels)
                span.add_event("first_token")
            tokens += len(delta.token_ids)

        def counted(delta: Delta) -> bool:
            if direct is None or not direct(delta):
                return False
            count(delta)
            return True

        # Not the current span: a generator may be closed in another context than it began in.
        span = self._tracer.start_span(
            f"engine {request.model}",
            attributes={
                "gen_ai.operation.name": "chat" if request.prompt.messages else "text_completion",
                "gen_ai.request.model": request.model,
                "gen_ai.request.choice.count": request.n,
                "llmos.request_id": request.request_id,
            },
        )
        try:
            async with aclosing(self._engine.generate(request, direct and counted)) as events:
                async for event in events:
                    match event:
                        case Started():
                            self._queue.record(self._clock.monotonic() - begun_s, labels)
                            span.add_event("started")
                            span.set_attribute("gen_ai.usage.input_tokens", event.prompt_tokens)
                            span.set_attribute("llmos.cached_prompt_tokens", event.cached_prompt_tokens)
                        case Delta():
                            count(event)
                        case Finished():
                            reasons = [reason.value for reason in event.reasons]
                            span.set_attribute("gen_ai.response.finish_reasons", reasons)
                    yield event
        except LlmosError as error:
            span.set_attribute("error.type", error.reason)
            span.set_status(StatusCode.ERROR, error.reason)
            raise
        finally:
            # A reader that went away closes the generator: what was done until then counts as well.
            if tokens > request.n:
                self._per_token.record((last_s - first_s) / (tokens / request.n - 1), labels)
            self._tokens.add(tokens, {"gen_ai.request.model": request.model})
            span.set_attribute("gen_ai.usage.output_tokens", tokens)
            span.end()

    async def count_tokens(self, model: str, prompt: Prompt) -> TokenCount:
        return await self._engine.count_tokens(model, prompt)

    def models(self) -> tuple[ModelInfo, ...]:
        return self._engine.models()

    def health(self) -> Health:
        return self._engine.health()

    def health_changes(self) -> AsyncIterator[Health]:
        return self._engine.health_changes()

    async def wait_healthy(self, timeout_s: float) -> None:
        await self._engine.wait_healthy(timeout_s)

    def load(self) -> Load:
        return self._engine.load()


def _meter() -> Meter:
    return metrics.get_meter("llmos.inference")
