"""One request is one trace over gateway, auth and inference, and logging's part is linked to it."""

from __future__ import annotations

from deploy.dev.broker import Broker
from tests.conftest import MeshFactory
from tests.framework.calls import Caller
from tests.framework.mesh import ALL
from tests.framework.otlp import ReceivedSpan, TraceReceiver

SERVER, CLIENT, CONSUMER = 2, 3, 5


async def test_one_trace_holds_gateway_auth_inference_and_links_logging(
    make_mesh: MeshFactory, broker: Broker
) -> None:
    async with TraceReceiver() as receiver:
        mesh = make_mesh(broker)
        for service in ALL:
            mesh.configure(service, otlp_endpoint=receiver.endpoint)
        await mesh.start()
        caller = Caller(mesh)
        streamed = await caller.stream("how far does a trace go")
        assert streamed.finished

        def whole(spans: list[ReceivedSpan]) -> bool:
            ours = request_trace(spans, streamed.request_id)
            services = {span.service for span in spans if span.trace_id == ours}
            linked = [span for span in spans if ours in span.linked_trace_ids]
            return services >= {"llmos-gateway", "llmos-auth", "llmos-inference"} and bool(linked)

        await receiver.wait_for(whole)
    ours = request_trace(receiver.spans, streamed.request_id)
    spans = {span.name: span for span in receiver.spans if span.trace_id == ours}
    by_id = {span.span_id: span for span in spans.values()}
    edge = spans["llmos.gateway.v1.GenerationService/StreamGenerate"]
    generation = spans["chat echo"] if "chat echo" in spans else spans["text_completion echo"]
    exchange = spans["llmos.auth.v1.TokenService/VerifyApiKey"]
    work = spans["llmos.inference.v1.InferenceService/Generate"]
    assert edge.kind == SERVER
    assert generation.kind == CLIENT
    assert by_id[generation.parent_id] is edge
    assert ancestors(work, by_id) >= {generation.span_id, edge.span_id}
    assert edge.span_id in ancestors(exchange, by_id)
    stored = [span for span in receiver.spans if ours in span.linked_trace_ids]
    assert {(span.service, span.kind) for span in stored} == {("llmos-logging", CONSUMER)}
    assert all(span.trace_id != ours for span in stored)


def request_trace(spans: list[ReceivedSpan], request_id: str) -> str:
    return next(
        (span.trace_id for span in spans if span.attributes.get("llmos.request_id") == request_id), "-"
    )


def ancestors(span: ReceivedSpan, by_id: dict[str, ReceivedSpan]) -> set[str]:
    found: set[str] = set()
    while span.parent_id in by_id:
        span = by_id[span.parent_id]
        found.add(span.span_id)
    return found
