"""Jobs on real processes whose gateways are killed and frozen, and whose credential is revoked."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import time

import httpx
from llmos.common.v1 import error_reason_pb2
from llmos.events.v1 import events_pb2
from llmos.gateway.v1 import job_service_pb2

from tests.framework.calls import Caller
from tests.framework.identities import Identities, Kind
from tests.framework.mesh import MeshHarness
from tests.framework.real_jobs import JobCaller
from tests.framework.waiting import eventually

RUNNING = job_service_pb2.JOB_STATE_RUNNING
SUCCEEDED = job_service_pb2.JOB_STATE_SUCCEEDED
FAILED = job_service_pb2.JOB_STATE_FAILED
OUTCOME = events_pb2.Outcome
LEASE_S = 5
SLOW = "[[tokens=300]][[delay_ms=30]] word by word"
"""Nine seconds: longer than a lease."""


def reasons(job: job_service_pb2.Job) -> list[str]:
    name = error_reason_pb2.ErrorReason.Name
    return [name(each.error.reason).removeprefix("ERROR_REASON_") for each in job.failed_attempts]


async def metric(mesh: MeshHarness, process: str, *parts: str) -> float:
    """The sum of the series whose lines have all the parts."""
    async with httpx.AsyncClient(trust_env=False) as client:
        text = (await client.get(mesh.metrics_url(process), timeout=20)).text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(part in line for part in parts))


async def test_r38_a_worker_that_is_killed_or_frozen_loses_its_job_which_ends_once(
    mesh: MeshHarness,
) -> None:
    for gateway in ("gateway", "gateway-1"):
        mesh.configure(gateway, job_lease_s=LEASE_S, replicas=2)
    mesh.configure("logging", lease_grace_s=LEASE_S)
    await mesh.start()
    first = JobCaller(mesh)
    killed = await first.submit(SLOW)
    await first.reaches(killed, RUNNING)

    mesh.kill("gateway")
    await mesh.start("gateway-1")
    second = JobCaller(mesh, gateway="gateway-1")
    found = await second.reaches(killed)
    assert found.job.state == SUCCEEDED, found.job
    assert (found.job.attempts, reasons(found.job)) == (2, ["WORKER_LOST"])
    assert len(found.result.generate.choices[0].token_ids) == 300

    frozen = await second.submit(SLOW)
    await second.reaches(frozen, RUNNING)
    await mesh.start("gateway")
    mesh.freeze("gateway-1")
    first = JobCaller(mesh)
    stolen = await first.reaches(frozen)
    assert stolen.job.state == SUCCEEDED, stolen.job
    assert (stolen.job.attempts, reasons(stolen.job)) == (2, ["WORKER_LOST"])
    mesh.thaw("gateway-1")
    # It finds out that the job is another's, by a heartbeat or by its report, and nothing changes.
    lost = ("llmos_jobs_attempts", 'outcome="lost"')

    async def is_fenced_off() -> bool:
        return await metric(mesh, "gateway-1", *lost) >= 1

    await eventually(is_fenced_off, timeout_s=60, what="the late gateway is told")
    after = await first.get(frozen)
    assert after == stolen

    # Each attempt is one request of the audit log.
    ids = {found.job.last_request_id, stolen.job.last_request_id}
    outcomes = await Caller(mesh).outcomes(ids, timeout_s=60)
    assert set(outcomes.values()) == {OUTCOME.OUTCOME_SUCCEEDED}


async def test_a_key_that_was_revoked_since_ends_the_job_and_nothing_is_sent_to_a_model(
    mesh: MeshHarness,
) -> None:
    mesh.configure("gateway", webhook_allow_http=True, webhook_allowed_networks="127.0.0.0/8")
    await mesh.start()
    identities = Identities(mesh)
    await identities.tenant("acme")
    await identities.client("acme", "app")
    revoked_id, revoked = await identities.api_key("app")
    _, other = await identities.api_key("app")
    told: list[tuple[dict[str, str], bytes]] = []

    async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Refuses the first time."""
        await reader.readline()
        headers = {}
        while line := (await reader.readline()).decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        told.append((headers, await reader.readexactly(int(headers["content-length"]))))
        status = b"503 Not now" if len(told) == 1 else b"204 No Content"
        writer.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(receive, "127.0.0.1", 0)
    port, key = server.sockets[0].getsockname()[1], secrets.token_bytes(32)
    secret = f"whsec_{base64.b64encode(key).decode()}"
    job_id = await JobCaller(mesh, key=revoked).submit(
        "never said",
        not_before_s=time.time() + 4,
        webhook=job_service_pb2.Webhook(url=f"http://127.0.0.1:{port}/done", secret=secret),
    )
    await identities.revoke(Kind.RESOURCE_KIND_API_KEY, revoked_id)

    caller = JobCaller(mesh, key=other)
    found = await caller.reaches(job_id)
    assert (found.job.state, reasons(found.job)) == (FAILED, ["CREDENTIAL_REVOKED"])
    assert found.job.attempts == 1
    assert await metric(mesh, "inference", "InferenceService/Generate") == 0

    await eventually(lambda: len(told) == 2, timeout_s=60, what="the webhook is told again")
    server.close()
    (once, first_body), (again, body) = told
    assert once["webhook-id"] == again["webhook-id"] == f"{job_id}-failed"
    signed = f"{again['webhook-id']}.{again['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert again["webhook-signature"] == f"v1,{expected}"
    assert first_body == body
    assert json.loads(body)["data"]["error"]["reason"] == "CREDENTIAL_REVOKED"
    # The secret is in no log.
    for process in ("gateway", "logging"):
        assert secret not in mesh.log(process)
    # Jobs of the tenant that come with a good key run.
    ran = await caller.reaches(await caller.submit("still here"))
    assert ran.job.state == SUCCEEDED, ran.job
