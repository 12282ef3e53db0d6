"""Spans and metrics of a generation: the names of the conventions, and no text of a caller's."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from services.gateway.admission.permits import Admission, AdmissionLimits
from services.gateway.completion import Completions
from services.gateway.generation import Message, Prompt, Role
from services.gateway.telemetry import AdmissionInstruments, Instruments
from services.mesh import errors
from services.mesh.histograms import Histograms
from tests.framework.gateway_fakes import MAX_TOKENS_LIMIT, Bench, FakeReplica, Gate, answer, generation
from tests.framework.waiting import eventually

CANARY = "canary-text"


class Observed:
    """A bench whose spans and metrics are kept in memory."""

    def __init__(self, replica: FakeReplica) -> None:
        self.bench = Bench([replica], max_concurrent=2)
        self.spans = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(self.spans))
        histograms = Histograms()
        meters = MeterProvider(metric_readers=[self.reader])
        histograms.join(self.reader, Resource.create())
        self.bench.admission = Admission(
            AdmissionLimits(max_generations=2),
            self.bench.router.capacity,
            self.bench.clock,
            AdmissionInstruments(meters=meters),
        )
        self.bench.completions = Completions(
            authorisation=self.bench.authorisation,
            cache=self.bench.cache,
            limits=self.bench.limits,
            admission=self.bench.admission,
            router=self.bench.router,
            clock=self.bench.clock,
            instruments=Instruments(self.bench.clock, tracers=tracers, histograms=histograms),
            max_tokens_limit=MAX_TOKENS_LIMIT,
        )

    async def generate(self, **changes: object) -> None:
        async with self.bench.call() as record:
            await self.bench.completions.generate(record, generation(**changes))

    def points(self) -> dict[str, list[Any]]:
        data = self.reader.get_metrics_data()
        assert data is not None
        scope = data.resource_metrics[0].scope_metrics[0]
        return {metric.name: list(metric.data.data_points) for metric in scope.metrics}


async def test_the_span_and_the_metrics_of_an_answer() -> None:
    observed = Observed(FakeReplica())
    prompt = Prompt(messages=(Message(Role.USER, (CANARY,)),))
    await observed.generate(
        prompt=prompt, stop=(CANARY,), max_tokens=9, end_user=CANARY, labels={"k": CANARY}
    )
    (span,) = observed.spans.get_finished_spans()
    assert (span.name, span.kind) == ("chat echo-1", SpanKind.CLIENT)
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == attributes["gen_ai.response.model"] == "echo-1"
    assert attributes["gen_ai.request.max_tokens"] == 9
    assert attributes["gen_ai.request.seed"] == 42
    assert attributes["gen_ai.usage.input_tokens"] == 7
    assert attributes["gen_ai.usage.output_tokens"] == 2
    assert attributes["gen_ai.usage.cache_read.input_tokens"] == 3
    assert attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert attributes["gen_ai.response.id"] == "req_1"
    assert CANARY not in span.to_json()

    points = observed.points()
    assert set(points) == {
        "gen_ai.client.operation.duration",
        "gen_ai.server.request.duration",
        "gen_ai.client.token.usage",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
    }
    tokens = {
        point.attributes["gen_ai.token.type"]: point.sum for point in points["gen_ai.client.token.usage"]
    }
    assert tokens == {"input": 7, "output": 2}
    assert points["gen_ai.client.operation.duration"][0].explicit_bounds[:3] == (0.01, 0.02, 0.04)
    assert points["gen_ai.client.token.usage"][0].explicit_bounds[-1] == 67_108_864


async def test_a_fault_is_named_and_an_unknown_model_is_no_time_series() -> None:
    observed = Observed(FakeReplica())
    with pytest.raises(errors.ModelNotFound):
        await observed.generate(model=CANARY)
    (span,) = observed.spans.get_finished_spans()
    assert dict(span.attributes or {})["error.type"] == "MODEL_NOT_FOUND"
    (point,) = observed.points()["gen_ai.client.operation.duration"]
    assert point.attributes["error.type"] == "MODEL_NOT_FOUND"
    assert "gen_ai.request.model" not in point.attributes


async def test_a_wait_for_a_place_stands_on_the_span_and_in_the_metrics() -> None:
    gate = Gate()
    observed = Observed(FakeReplica([gate, *answer("a")], places=1))
    first = asyncio.create_task(observed.generate())
    await gate.reached.wait()
    second = asyncio.create_task(observed.generate())
    await eventually(lambda: observed.bench.admission.waiting == 1)
    (queue,) = observed.points()["llmos.admission.queue"]
    assert (queue.value, dict(queue.attributes)) == (1, {"priority": "interactive"})
    with pytest.raises(errors.ConcurrencyLimit):
        await observed.generate()
    gate.open.set()
    await asyncio.gather(first, second)
    waits = [
        dict(span.attributes or {}).get("llmos.admission.wait_s")
        for span in observed.spans.get_finished_spans()
    ]
    assert [wait for wait in waits if wait is not None] == [pytest.approx(0, abs=5)]
    points = observed.points()
    assert points["llmos.admission.queue"][0].value == 0
    assert points["llmos.admission.wait"][0].count == 1
    (refused,) = points["llmos.admission.refused"]
    assert dict(refused.attributes) == {"priority": "interactive", "reason": "concurrency"}
