"""Spans of a real process, read back from an OTLP exporter, and its metrics, read as Prometheus does."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import urllib.request
from contextlib import nullcontext
from pathlib import Path

import pytest
from opentelemetry import trace

from services.mesh import context as request_context
from services.mesh import telemetry
from services.mesh.context import RequestContext
from tests.framework.otlp import TraceReceiver

SCRIPT = """
import asyncio, sys
from pathlib import Path
from opentelemetry import trace
from services.mesh import telemetry
from services.mesh.context import RequestContext
from services.mesh.errors import Status
from tests.framework.tiny_service import TinySettings

async def main():
    settings = TinySettings(state_dir=Path("."), otlp_endpoint=sys.argv[1])
    providers = telemetry.Telemetry(settings)
    await providers.start()
    context = RequestContext("req_1", "/test.Service/Unary")
    parent = {"traceparent": "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"}
    around = telemetry.server_span(context, parent, "grpc")
    assert around is not None
    with around as span:
        headers = telemetry.inject_kafka()
        telemetry.call_ended(span, context.method, "grpc", Status.INTERNAL, 0.2)
    with telemetry.consumer_span("process llmos.audit.v1", headers, {"messaging.system": "kafka"}):
        pass
    print(context.trace_id, providers.ports["metrics"], flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await providers.stop()

asyncio.run(main())
"""


async def test_spans_nest_over_grpc_and_link_over_kafka(tmp_path: Path) -> None:
    async with TraceReceiver() as receiver:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            SCRIPT,
            receiver.endpoint,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        )
        assert process.stdout is not None
        trace_id, port = (await process.stdout.readline()).decode().split()
        assert trace_id == "ab" * 16
        url = f"http://127.0.0.1:{port}/metrics"
        metrics = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())
        assert "rpc_server_duration_seconds_count{" in metrics
        assert 'rpc_grpc_status_code="INTERNAL"' in metrics
        assert re.search(r"^llmos_process_tasks\{.*\} 1\.0$", metrics, re.MULTILINE)
        assert re.search(r"^llmos_process_memory_blocks\{.*\} \d", metrics, re.MULTILINE)
        await asyncio.wait_for(process.communicate(b"\n"), 20)
        await receiver.wait_for(lambda spans: len(spans) == 2)
    spans = {span.name: span for span in receiver.spans}
    served, consumed = spans["test.Service/Unary"], spans["process llmos.audit.v1"]
    assert served.service == "llmos-tiny"
    assert (served.trace_id, served.parent_id) == ("ab" * 16, "cd" * 8)
    assert served.attributes["llmos.request_id"] == "req_1"
    assert consumed.trace_id != served.trace_id
    assert consumed.linked_trace_ids == (served.trace_id,)


GIVEN = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"


@pytest.mark.parametrize(
    ("metadata", "goes_on"),
    [
        ({}, False),
        ({"traceparent": GIVEN}, True),
        ({"traceparent": "00-" + "00" * 16 + "-" + "cd" * 8 + "-01"}, False),
        ({"traceparent": "00-rubbish"}, False),
        ({"traceparent": GIVEN, "tracestate": "vendor=1"}, True),
    ],
    ids=["none", "given", "zeros", "broken", "with a state"],
)
def test_where_nobody_collects_spans_a_trace_goes_on_all_the_same(
    metadata: dict[str, str | bytes], goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "_collected", False)
    context = RequestContext("req_1", "/test.Service/Unary")
    token = request_context.enter(context)
    try:
        around = telemetry.server_span(context, metadata, "grpc")
        assert (around is None) == ("tracestate" not in metadata)
        with around or nullcontext(telemetry.NO_SPAN) as span:
            assert not span.is_recording()
            sent = dict(telemetry.inject())
            appended = telemetry.traceparent()
    finally:
        request_context.leave(token)
    if goes_on:
        assert context.trace_id == "ab" * 16
        assert sent["traceparent"].split("-")[1] == context.trace_id
        assert sent.get("tracestate") == metadata.get("tracestate")
    else:
        assert re.fullmatch(f"00-{context.trace_id}-[0-9a-f]{{16}}-00", context.traceparent)
        assert sent == {"traceparent": context.traceparent}
    assert appended == sent.get("traceparent", "")
    assert not trace.get_current_span().get_span_context().is_valid, "it has ended"
