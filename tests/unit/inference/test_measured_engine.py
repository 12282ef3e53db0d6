"""What is measured of a generation, read back from OpenTelemetry's own readers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.inference.backends.echo import EchoConfig, EchoEngine
from services.inference.engine.frames import EngineState
from services.inference.engine.port import Delta, Finished, Started
from services.inference.telemetry import MeasuredEngine, StepInstruments
from services.mesh.clock import SystemClock
from services.mesh.errors import EngineFault
from services.mesh.histograms import Histograms
from tests.framework.engines import answer, begin, text_request


class Measures:
    """An engine with readers of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spans = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(self.spans))
        meters = MeterProvider(metric_readers=[self.reader])
        monkeypatch.setattr(trace, "get_tracer", tracers.get_tracer)
        monkeypatch.setattr(metrics, "get_meter", meters.get_meter)
        clock = SystemClock()
        self.histograms = Histograms()
        self.histograms.join(self.reader, Resource.get_empty())
        echo = EchoEngine(EchoConfig(directives=True), clock)
        self.engine = MeasuredEngine(echo, clock, self.histograms)

    def points(self, name: str) -> list[Any]:
        data = self.reader.get_metrics_data()
        found = [
            metric
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
        ]
        return [point for metric in found for point in metric.data.data_points]


@pytest.fixture
async def measures(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Measures]:
    measures = Measures(monkeypatch)
    await measures.engine.start()
    yield measures
    await measures.engine.stop()


async def test_a_generation_is_measured(measures: Measures) -> None:
    await answer(measures.engine, text_request("echo", "[[tokens=5]][[delay_ms=2]] a b"))
    (first,) = measures.points("gen_ai.server.time_to_first_token")
    assert first.count == 1
    (between,) = measures.points("gen_ai.server.time_per_output_token")
    assert 0.002 <= between.sum < 1
    (tokens,) = measures.points("llmos.engine.output_tokens")
    assert tokens.value == 5
    (span,) = measures.spans.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["gen_ai.usage.output_tokens"] == 5
    assert span.attributes["gen_ai.response.finish_reasons"] == ("end_of_sequence",)
    assert [event.name for event in span.events] == ["started", "first_token"]


async def test_what_goes_past_the_reader_is_measured_as_well(measures: Measures) -> None:
    taken: list[Delta] = []

    def direct(delta: Delta) -> bool:
        taken.append(delta)
        return len(delta.token_ids) == 1 and len(taken) != 2

    request = text_request("echo", "[[tokens=5]][[delay_ms=2]] a b")
    async with aclosing(measures.engine.generate(request, direct)) as events:
        kinds = [type(event) for event in [event async for event in events]]
    assert kinds == [Started, Delta, Finished], "one that was not taken, and no other"
    (first,) = measures.points("gen_ai.server.time_to_first_token")
    (tokens,) = measures.points("llmos.engine.output_tokens")
    (span,) = measures.spans.get_finished_spans()
    assert (first.count, tokens.value, len(taken)) == (1, 5, 5)
    assert [event.name for event in span.events] == ["started", "first_token"]


async def test_r32_no_text_is_in_a_span(measures: Measures) -> None:
    await answer(measures.engine, text_request("echo", "canary"))
    (span,) = measures.spans.get_finished_spans()
    assert "canary" not in span.to_json()


async def test_what_runs_and_waits_is_told(measures: Measures) -> None:
    stream = await begin(measures.engine, text_request("echo", "[[hang_after=1]] a b", n=2))
    assert [point.value for point in measures.points("llmos.engine.sequences_running")] == [2]
    await stream.aclose()
    assert [point.value for point in measures.points("llmos.engine.sequences_running")] == [0]
    assert [point.value for point in measures.points("llmos.engine.restarts")] == [0]


async def test_the_load_is_told(measures: Measures) -> None:
    stream = await begin(measures.engine, text_request("echo", "[[hang_after=1]] a b"))
    assert [point.value for point in measures.points("llmos.engine.kv_pages_used")] == [1]
    assert [point.value for point in measures.points("llmos.engine.kv_pages")] == [8 * 512]
    assert [point.value for point in measures.points("llmos.engine.prompt_tokens_waiting")] == [0]
    await stream.aclose()


async def test_steps_are_measured_and_counters_go_on_after_a_restart(measures: Measures) -> None:
    steps = StepInstruments(measures.histograms)
    nothing = EngineState()
    first = EngineState(
        step_sequences=3,
        step_tokens=66,
        step_s=0.02,
        prefix_tokens=64,
        prefix_hit_tokens=16,
        preemptions=1,
        guessed_tokens=6,
        guessed_right_tokens=4,
    )
    steps.record(nothing, first)
    steps.record(first, msgspec.structs.replace(first, step_s=0.0))  # nothing was computed
    steps.record(nothing, first)  # another process
    (time,) = measures.points("llmos.engine.step_time")
    assert (time.count, time.sum) == (2, pytest.approx(0.04))
    (rows,) = measures.points("llmos.engine.step_sequences")
    (tokens,) = measures.points("llmos.engine.step_tokens")
    assert (rows.max, tokens.max) == (3, 66)
    for name, value in (
        ("prefix_tokens", 128),
        ("prefix_hit_tokens", 32),
        ("preemptions", 2),
        ("guessed_tokens", 12),
        ("guessed_right_tokens", 8),
    ):
        assert [point.value for point in measures.points(f"llmos.engine.{name}")] == [value]


async def test_a_failure_and_a_reader_that_left_are_spans_too(measures: Measures) -> None:
    with pytest.raises(EngineFault):
        await answer(measures.engine, text_request("echo", "[[fail_after=1]] a b"))
    await (await begin(measures.engine, text_request("echo", "[[hang_after=1]] a b"))).aclose()
    failed, left = measures.spans.get_finished_spans()
    assert failed.attributes is not None
    assert left.attributes is not None
    assert failed.attributes["error.type"] == "ENGINE_FAULT"
    assert left.attributes["gen_ai.usage.output_tokens"] == 1
