"""Traces and metrics (OpenTelemetry), from the first call on.

Traces and metrics go to an OTLP endpoint where one is set; metrics can always be read by Prometheus on
the process's metrics port. W3C trace context crosses gRPC in metadata and Kafka in headers. A consumer
of Kafka links to the span that it comes from, and does not nest under it.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import prometheus_client
from opentelemetry import metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, TraceIdRatioBased
from opentelemetry.trace import Link, Span, SpanKind, StatusCode

from services.mesh import context as request_context
from services.mesh.context import RequestContext
from services.mesh.errors import Status
from services.mesh.histograms import HISTOGRAMS
from services.mesh.randomness import random_bytes
from services.mesh.settings import ServiceSettings

__all__ = [
    "NO_SPAN",
    "Span",
    "Telemetry",
    "consumer_span",
    "inject",
    "inject_kafka",
    "is_unseen",
    "server_span",
    "traceparent",
]

NO_SPAN = trace.INVALID_SPAN

_tracer = trace.get_tracer("llmos")
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
"""https://www.w3.org/TR/trace-context/, version 00."""
_collected = True
"""Whether spans of this process go anywhere. `Telemetry` says so, as it sets the process's providers."""
_meter = metrics.get_meter("llmos")

# Buckets of the semantic conventions for durations in seconds.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60, 300)

call_duration = HISTOGRAMS.make(
    "rpc.server.duration",
    unit="s",
    description="Duration of calls, with their status.",
    bounds=_SECONDS,
    labels=("rpc.method", "rpc.system", "rpc.grpc.status_code"),
)
calls_running: Counter[str] = Counter()
"""Calls being served, by method. Read when somebody asks: counted in the meter, each call would pay twice."""


def _observe_running(options: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
    for method, count in calls_running.items():
        yield metrics.Observation(count, {"rpc.method": method})


_meter.create_observable_up_down_counter(
    "llmos.calls.running", [_observe_running], description="Calls being served, watches too."
)


def _observe_process(loop: asyncio.AbstractEventLoop) -> None:
    """What must not grow with the requests served: read when somebody asks, from the thread that asks."""

    def tasks(options: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        yield metrics.Observation(len(asyncio.all_tasks(loop)))

    def blocks(options: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        yield metrics.Observation(sys.getallocatedblocks())

    _meter.create_observable_gauge(
        "llmos.process.tasks", [tasks], description="Tasks of the event loop that have not ended."
    )
    _meter.create_observable_gauge(
        "llmos.process.memory_blocks", [blocks], description="Blocks of memory that Python's objects hold."
    )


# Statuses that are the server's fault; the others are the caller's and leave a span unset.
_SERVER_FAULTS = frozenset(
    {Status.UNKNOWN, Status.INTERNAL, Status.DATA_LOSS, Status.UNAVAILABLE, Status.UNIMPLEMENTED}
)


class Telemetry:
    """The providers of this process; a component of the app."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        resource = Resource.create(
            {
                "service.namespace": "llmos",
                "service.name": f"llmos-{settings.service}",
                "service.instance.id": settings.name,
            }
        )
        endpoint = settings.otlp_endpoint
        # Where nobody collects spans, requests still have a trace id, and nothing is recorded.
        global _collected
        _collected = bool(endpoint)
        sampler = ParentBased(TraceIdRatioBased(settings.trace_sample_ratio)) if endpoint else ALWAYS_OFF
        self._tracers = TracerProvider(resource=resource, sampler=sampler)
        readers: list[MetricReader] = [PrometheusMetricReader()]
        if endpoint:
            # Only where it is used: the import takes a tenth of a start.
            from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            insecure = endpoint.startswith("http://")
            self._tracers.add_span_processor(
                BatchSpanProcessor(
                    OTLPSpanExporter(endpoint=endpoint, insecure=insecure, timeout=5),
                    schedule_delay_millis=500,
                )
            )
            readers.append(
                PeriodicExportingMetricReader(
                    OTLPMetricExporter(endpoint=endpoint, insecure=insecure, timeout=5)
                )
            )
        # Neither of the two readers passes exemplars on.
        self._meters = MeterProvider(
            resource=resource, metric_readers=readers, exemplar_filter=AlwaysOffExemplarFilter()
        )
        for reader in readers:
            HISTOGRAMS.join(reader, resource)
        trace.set_tracer_provider(self._tracers)
        metrics.set_meter_provider(self._meters)
        self.ports: dict[str, int] = {}
        self._close: Callable[[], None] | None = None

    async def start(self) -> None:
        """Opens the metrics port. Raises OSError with a sentence where it is taken."""
        _observe_process(asyncio.get_running_loop())
        host, port = self._settings.listen_host, self._settings.metrics_port
        try:
            server, thread = prometheus_client.start_http_server(port, addr=host)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port} for metrics: {error.strerror}") from error
        self.ports["metrics"] = server.server_port

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join(2)

        self._close = close

    async def stop(self) -> None:
        if self._close:
            self._close()
        self._tracers.force_flush(2_000)
        self._tracers.shutdown()
        self._meters.shutdown(2_000)


def server_span(
    context: RequestContext, metadata: Mapping[str, str | bytes], protocol: str
) -> AbstractContextManager[Span] | None:
    """A SERVER span, child of the caller's where `metadata` carries one; None where nobody would see it.
    Fills `context.trace_id`."""
    if _collected or "tracestate" in metadata:
        return _seen(context, metadata, protocol)
    # Nobody would see a span. The trace still joins the logs of all hops, and goes on as it came.
    given = metadata.get("traceparent", "")
    if isinstance(given, str) and (parsed := _TRACEPARENT.fullmatch(given)):
        context.trace_id, context.traceparent = parsed[1], given
    else:
        ids = random_bytes(24).hex()
        context.trace_id, context.traceparent = ids[:32], f"00-{ids[:32]}-{ids[32:]}-00"
    return None


@contextmanager
def _seen(context: RequestContext, metadata: Mapping[str, str | bytes], protocol: str) -> Iterator[Span]:
    carrier = {key: value for key, value in metadata.items() if isinstance(value, str)}
    parent: Context = propagate.extract(carrier)
    service, _, method = context.method.strip("/").partition("/")
    with _tracer.start_as_current_span(
        context.method.strip("/"),
        context=parent,
        kind=SpanKind.SERVER,
        attributes={
            "rpc.system": protocol,
            "rpc.service": service,
            "rpc.method": method,
            "client.address": context.source_address,
            "llmos.request_id": context.request_id,
        },
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        found = span.get_span_context()
        context.trace_id = trace.format_trace_id(found.trace_id) if found.is_valid else ""
        yield span


_STATUS_NAMES = {status: status.name for status in Status}


def call_ended(span: Span, method: str, protocol: str, status: Status, duration_s: float) -> None:
    """Records a call's end on its span and in the metrics."""
    if span.is_recording():
        span.set_attribute("rpc.grpc.status_code", int(status))
        if status in _SERVER_FAULTS:
            span.set_status(StatusCode.ERROR, status.name)
    call_duration.record(duration_s, (method, protocol, _STATUS_NAMES[status]))


def is_unseen() -> bool:
    """Whether nobody would see the spans of the request that this task serves."""
    request = request_context.current()
    return request is not None and bool(request.traceparent)


def traceparent() -> str:
    """Where the current trace stands, as W3C's header has it; empty outside of one."""
    request = request_context.current()
    if request is not None and request.traceparent:
        return request.traceparent
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def inject() -> list[tuple[str, str]]:
    """The current trace context as metadata for an outgoing call."""
    request = request_context.current()
    if request is not None and request.traceparent:
        return [("traceparent", request.traceparent)]
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return list(carrier.items())


def inject_kafka() -> list[tuple[str, bytes]]:
    """The current trace context as Kafka headers; keep it with an event that is sent later."""
    return [(key, value.encode()) for key, value in inject()]


@contextmanager
def consumer_span(
    name: str, headers: Sequence[tuple[str, bytes]], attributes: Mapping[str, str | int]
) -> Iterator[Span]:
    """A CONSUMER span of its own trace, linked to the one that the message's headers carry."""
    carrier = {key: value.decode("ascii", "replace") for key, value in headers}
    origin = trace.get_current_span(propagate.extract(carrier)).get_span_context()
    links = [Link(origin)] if origin.is_valid else []
    with _tracer.start_as_current_span(
        name, context=Context(), kind=SpanKind.CONSUMER, links=links, attributes=dict(attributes)
    ) as span:
        yield span
