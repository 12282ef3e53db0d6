"""One request, from the client to its audit record: the whole mesh is started for it and stopped after it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

from llmos_client import AsyncClient, AuditFilter, AuditRecord, LlmosError

from deploy.dev import ports
from deploy.dev.environment import settings_of_this_shell
from deploy.dev.mesh import Mesh
from deploy.dev.state import CannotStart, State

QUESTION = "In two sentences: why is the sky blue?"
MAX_TOKENS = 80
AUDIT_TIMEOUT_S = 30.0
INTERRUPTED = 130


async def demo(folder: Path, *, models: Path, dist: Path) -> int:
    """Returns the exit code: 0 when the answer and its audit record came and all stopped in order.

    Raises:
        CannotStart: something stands in the way.
    """
    began_s = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began_s:5.1f} s] {text}", flush=True)

    reservations = ports.PortReservations()  # held until the process ends
    mesh = Mesh(
        State(folder),
        mesh_ports=reservations.take(list(ports.DEFAULTS)),
        bootstrap=os.environ.get("LLMOS_KAFKA_BOOTSTRAP_SERVERS"),
        dist=dist,
        models=models,
        tls=False,
        settings=settings_of_this_shell(),
        say=say,
        on_line=None,
    )
    work = asyncio.ensure_future(_show(mesh))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    shown = False
    try:
        await work
        shown = True
    except asyncio.CancelledError:
        say("Interrupted.")
    except LlmosError as error:
        raise CannotStart(f"The request failed: {error} The logs are in {mesh.state.logs}.") from error
    finally:
        clean = await mesh.drain()
    if not shown:
        return INTERRUPTED
    say(f"Everything has stopped{'.' if clean else ', but not all of it as it should.'}")
    return 0 if clean else 1


async def _show(mesh: Mesh) -> None:
    await mesh.start()
    async with AsyncClient(mesh.plan.target("gateway"), api_key_file=mesh.state.admin_key) as client:
        model = next(model.id for model in await client.models() if model.ready)
        print(f"\n> {QUESTION}\n", flush=True)
        async with client.stream(QUESTION, model=model, max_tokens=MAX_TOKENS, temperature=0) as stream:
            async for event in stream:
                print(event.text, end="", flush=True)
        assert stream.usage is not None
        print(
            f"\n\nusage       {stream.usage.prompt_tokens} tokens of prompt,"
            f" {stream.usage.completion_tokens} of answer ({stream.finish_reason})"
            f"\nrequest id  {stream.request_id}\ntrace id    {stream.trace_id}\n",
            flush=True,
        )
        print("Its audit record, as the logging service has it after Kafka:")
        for name, value in _lines(await _audit_record(client, stream.request_id)):
            print(f"  {name:<20} {value}")
        print(flush=True)


async def _audit_record(client: AsyncClient, request_id: str) -> AuditRecord:
    """Follows the log until the request's outcome is in it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(AUDIT_TIMEOUT_S):
            async with client.audit.tail(AuditFilter(request_id=request_id), last=10) as tail:
                async for record in tail:
                    if record.outcome is not None:
                        return record
    raise CannotStart(f"The request's outcome was not in the audit log after {AUDIT_TIMEOUT_S:.0f} s.")


def _lines(record: AuditRecord) -> list[tuple[str, object]]:
    return [
        ("request_id", record.request_id),
        ("outcome", record.outcome),
        ("tenant, client", f"{record.tenant_id}, {record.client_id}"),
        ("method", f"{record.method} ({record.edge})"),
        ("model", record.model),
        ("usage", f"{record.usage.prompt_tokens} + {record.usage.completion_tokens} tokens"),
        ("first token after", f"{record.time_to_first_token_s or 0:.2f} s"),
        ("received", record.receive_time),
        ("ended", record.end_time),
        ("stored", f"{record.store_time} at position {record.position}"),
        ("trace_id", record.trace_id),
    ]
