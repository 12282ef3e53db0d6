"""The gateway's spans and metrics of generation: all names in one place.

They follow the OpenTelemetry semantic conventions for generative AI, 1.41, with the buckets given there.
No attribute holds text of a caller's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.trace import Span, SpanKind, StatusCode

from services.gateway.admission.permits import Reason
from services.gateway.auditing import RequestRecord
from services.gateway.cache.answers import AnswerCache
from services.gateway.generation import (
    EngineStarted,
    Finished,
    FinishReason,
    Priority,
    Usage,
    ValidGeneration,
)
from services.mesh.clock import Clock
from services.mesh.errors import LlmosError
from services.mesh.histograms import HISTOGRAMS, Histograms
from services.mesh.telemetry import NO_SPAN, is_unseen

PROVIDER = "llmos"
OPERATION_CHAT = "chat"
OPERATION_TEXT = "text_completion"

FINISH_NAMES: Mapping[FinishReason, str] = {
    FinishReason.END_OF_SEQUENCE: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TOOL_CALLS: "tool_calls",
    FinishReason.CONTENT_FILTER: "content_filter",
    FinishReason.CANCELLED: "cancelled",
}

_LABELS = ("gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model", "error.type")
_DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
_PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = tuple(4**power for power in range(14))


class Measured:
    """One generation being measured."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.usage: Usage | None = None
        self.first_token_s: float | None = None
        self.known_model = False

    def waited(self, wait_s: float) -> None:
        """In the queue, for a place."""
        if wait_s:
            self._span.set_attribute("llmos.admission.wait_s", wait_s)

    def settle(
        self,
        usage: Usage,
        finished: Finished | None,
        engine: EngineStarted | None,
        first_token_s: float | None,
    ) -> None:
        """What is known at the end. Called once."""
        self.usage, self.first_token_s, self.known_model = usage, first_token_s, engine is not None
        if not self._span.is_recording():
            return
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.cached_prompt_tokens,
            }
        )
        if finished is not None:
            reasons = [FINISH_NAMES[reason] for reason in finished.finish_reasons]
            self._span.set_attribute("gen_ai.response.finish_reasons", reasons)
        if engine is not None:
            self._span.set_attribute("llmos.replica", engine.replica)


class AdmissionInstruments:
    """Those who do not begin at once, in the metrics: an `admission.permits.Observer`."""

    def __init__(self, *, meters: metrics.MeterProvider | None = None) -> None:
        """Without a provider, that of the process."""
        meter = metrics.get_meter("llmos.gateway", meter_provider=meters)
        self._queue = meter.create_up_down_counter(
            "llmos.admission.queue", unit="{request}", description="Requests that wait for a place."
        )
        self._wait = meter.create_histogram(
            "llmos.admission.wait",
            unit="s",
            description="How long those waited that then got a place.",
            explicit_bucket_boundaries_advisory=_FIRST_TOKEN_S,
        )
        self._refused = meter.create_counter(
            "llmos.admission.refused", unit="{request}", description="Requests that got no place, by reason."
        )

    def queued(self, priority: Priority, change: int) -> None:
        self._queue.add(change, {"priority": priority.name.lower()})

    def waited(self, priority: Priority, wait_s: float) -> None:
        self._wait.record(wait_s, {"priority": priority.name.lower()})

    def refused(self, priority: Priority, reason: Reason) -> None:
        self._refused.add(1, {"priority": priority.name.lower(), "reason": reason.value})


class Instruments:
    """Makes the span of a generation, and records it in the metrics."""

    def __init__(
        self,
        clock: Clock,
        *,
        tracers: trace.TracerProvider | None = None,
        histograms: Histograms = HISTOGRAMS,
    ) -> None:
        """Without a provider, that of the process."""
        self._clock = clock
        self._tracer = trace.get_tracer("llmos.gateway", tracer_provider=tracers)
        self._duration = histograms.make(
            "gen_ai.client.operation.duration",
            unit="s",
            description="Duration of a generation, as the caller sees it.",
            bounds=_DURATION_S,
            labels=_LABELS,
        )
        self._request = histograms.make(
            "gen_ai.server.request.duration",
            unit="s",
            description="Duration of a generation, from arrival to the last token.",
            bounds=_DURATION_S,
            labels=_LABELS,
        )
        self._tokens = histograms.make(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="Tokens of a generation, by type.",
            bounds=_TOKENS,
            labels=(*_LABELS, "gen_ai.token.type"),
        )
        self._first_token = histograms.make(
            "gen_ai.server.time_to_first_token",
            unit="s",
            description="From arrival to the first token.",
            bounds=_FIRST_TOKEN_S,
            labels=_LABELS,
        )
        self._per_token = histograms.make(
            "gen_ai.server.time_per_output_token",
            unit="s",
            description="From the first token to the last, for each token after the first.",
            bounds=_PER_TOKEN_S,
            labels=_LABELS,
        )

    def generation(self, request: ValidGeneration, record: RequestRecord) -> Generating:
        """A CLIENT span around the block; what leaves the block as an error is named on it."""
        operation = OPERATION_CHAT if request.prompt.is_chat else OPERATION_TEXT
        around = None if is_unseen() else self._span(operation, request, record)
        return Generating(self, operation, request.model, around)

    def begun_s(self) -> float:
        """The present, for a generation that begins."""
        return self._clock.monotonic()

    def ended(self, operation: str, model: str, error_type: str, measured: Measured, begun_s: float) -> None:
        """A generation has ended."""
        # Whatever a caller may write there must not become a time series.
        labels = (operation, PROVIDER, model if measured.known_model else "", error_type)
        self._record(labels, measured, self._clock.monotonic() - begun_s)

    def _span(
        self, operation: str, request: ValidGeneration, record: RequestRecord
    ) -> AbstractContextManager[Span]:
        around = trace.get_current_span()
        if around.get_span_context().is_valid and not around.is_recording():
            # Not sampled, and so neither would be what is inside.
            return nullcontext(around)
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": request.model,
            "gen_ai.response.id": record.request_id,
            "gen_ai.response.model": request.model,
        }
        return self._tracer.start_as_current_span(
            f"{operation} {request.model}",
            kind=SpanKind.CLIENT,
            attributes={**attributes, **_details(request)},
            record_exception=False,
            set_status_on_exception=False,
        )

    def _record(self, labels: tuple[str, ...], measured: Measured, duration_s: float) -> None:
        self._duration.record(duration_s, labels)
        self._request.record(duration_s, labels)
        usage, first_token_s = measured.usage, measured.first_token_s
        if usage is None:
            return
        self._tokens.record(usage.prompt_tokens, (*labels, "input"))
        self._tokens.record(usage.completion_tokens, (*labels, "output"))
        if first_token_s is not None:
            self._first_token.record(first_token_s, labels)
            if usage.completion_tokens > 1:
                rest_s = max(duration_s - first_token_s, 0.0)
                self._per_token.record(rest_s / (usage.completion_tokens - 1), labels)


class Generating:
    """One generation, as a block."""

    __slots__ = ("_around", "_begun_s", "_instruments", "_measured", "_model", "_operation", "_span")

    def __init__(
        self,
        instruments: Instruments,
        operation: str,
        model: str,
        around: AbstractContextManager[Span] | None,
    ) -> None:
        """`around`: the span; None where nobody would see it."""
        self._instruments = instruments
        self._operation = operation
        self._model = model
        self._around = around

    def __enter__(self) -> Measured:
        self._begun_s = self._instruments.begun_s()
        self._span = NO_SPAN if self._around is None else self._around.__enter__()
        self._measured = Measured(self._span)
        return self._measured

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        error_type = ""
        if error is not None:
            error_type = _error_type(error)
            self._span.set_attribute("error.type", error_type)
            if isinstance(error, Exception):
                self._span.set_status(StatusCode.ERROR, error_type)
        self._instruments.ended(self._operation, self._model, error_type, self._measured, self._begun_s)
        if self._around is not None:
            self._around.__exit__(kind, error, trace)


def observe_cache(cache: AnswerCache, *, meters: metrics.MeterProvider | None = None) -> None:
    """The response cache's metrics. They are read when asked for: a request only counts."""

    def requests(options: CallbackOptions) -> Iterable[Observation]:
        counts = cache.counts
        yield Observation(counts.hits, {"llmos.cache.result": "hit"})
        yield Observation(counts.misses, {"llmos.cache.result": "miss"})
        yield Observation(counts.bypasses, {"llmos.cache.result": "bypass"})

    def held(options: CallbackOptions) -> Iterable[Observation]:
        yield Observation(cache.held_bytes)

    meter = metrics.get_meter("llmos.gateway", meter_provider=meters)
    meter.create_observable_counter(
        "llmos.cache.requests",
        [requests],
        unit="{request}",
        description="Generations, by what they had of the response cache.",
    )
    meter.create_observable_gauge(
        "llmos.cache.size",
        [held],
        unit="By",
        description="What the response cache holds in this process's memory.",
    )


def _details(request: ValidGeneration) -> dict[str, str | int | float | list[str]]:
    # Stop sequences are the caller's text: only how many there are is said.
    sampling = request.sampling
    optional: dict[str, str | int | float | None] = {
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.choice.count": request.n if request.n > 1 else None,
        "llmos.request.stop_count": len(request.stop) or None,
    }
    found: dict[str, str | int | float | list[str]] = {
        name: value for name, value in optional.items() if value is not None
    }
    # A span's integers are signed.
    found["gen_ai.request.seed"] = str(sampling.seed) if sampling.seed >= 2**63 else sampling.seed
    return found


def _error_type(error: BaseException) -> str:
    if isinstance(error, LlmosError):
        return error.reason
    return "CANCELLED" if not isinstance(error, Exception) else "INTERNAL"
