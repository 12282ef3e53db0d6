"""Gateways that run jobs, without processes: the use case over fakes, a schedule in memory, an auth that is
told whom to let act."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from llmos.gateway.v1 import generation_pb2, job_service_pb2
from llmos.jobs.v1 import payload_pb2
from msgspec import structs

from services.gateway.jobs.ports import Report, ScheduledJob, SchedulePort
from services.gateway.jobs.seals import PayloadSeals
from services.gateway.jobs.working.identities import RenewedIdentities
from services.gateway.jobs.working.leases import Leases
from services.gateway.jobs.working.places import Places
from services.gateway.jobs.working.ports import Runner
from services.gateway.jobs.working.request import SealedPayloads
from services.gateway.jobs.working.requests import RequestRunner
from services.gateway.jobs.working.telemetry import JobInstruments
from services.gateway.jobs.working.worker import Worker, WorkerParts
from services.gateway.request import RequestParser
from services.mesh import context as request_context
from services.mesh.clock import Clock
from services.mesh.context import Caller, Identity, RequestContext
from services.mesh.errors import CredentialRevoked, LlmosError
from services.mesh.jobs import JobKind, JobRequested, Sealed
from tests.framework.gateway_fakes import ALICE, MAX_TOKENS_LIMIT, MODEL, Bench, FakeAuth
from tests.framework.gateway_http import chain_of
from tests.framework.jobs import a_job, new_seals
from tests.framework.schedules import ScheduleInMemory


class FakeRenewals:
    """A `RenewalPort`, over the tokens of a `FakeAuth`."""

    def __init__(self, auth: FakeAuth) -> None:
        self.auth = auth
        self.refused: dict[str, LlmosError] = {}
        """By client."""
        self.error: LlmosError | None = None
        self.asked: list[Identity] = []

    async def renew(self, identity: Identity) -> str:
        self.asked.append(identity)
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if (error := self.refused.get(identity.client_id)) is not None:
            raise error
        name = f"key-of-{len(self.asked)}"
        self.auth.keys[name] = structs.replace(identity, token_id=f"renewed-{len(self.asked)}")
        return await self.auth.exchange(name)


def sealed_job(seals: PayloadSeals, clock: Clock, text: str = "Hi", **changes: Any) -> JobRequested:
    """One that generates, as a gateway hands it in. `webhook`: its URL and secret; `source_address`."""
    webhook = changes.pop("webhook", None)
    payload = payload_pb2.RequestPayload(
        work=job_service_pb2.JobWork(
            generate=generation_pb2.GenerationSpec(
                model=changes.get("model", MODEL.id),
                prompt=generation_pb2.Prompt(text=text),
                labels=changes.pop("spec_labels", {}),
            )
        ),
        source_address=changes.pop("source_address", "10.0.0.1"),
    )
    if webhook is not None:
        payload.webhook.url, payload.webhook.secret = webhook
    now = clock.now()
    times = {"create_time": now, "not_before": now, "give_up_time": now + timedelta(days=1)}
    job = a_job(**{"identity": ALICE, "has_webhook": webhook is not None, **times, **changes})
    return replace(job, request=seals.seal(payload.SerializeToString(), job, "request"))


@dataclass
class JobBench:
    """One gateway; several may share a schedule and seals."""

    bench: Bench
    schedule: SchedulePort
    seals: PayloadSeals = field(default_factory=new_seals)
    name: str = "gateway-a"
    lease_s: float = 15.0
    most: int = 0
    runners: Mapping[JobKind, Runner] = field(default_factory=dict)
    """Further ones."""

    def __post_init__(self) -> None:
        bench, clock = self.bench, self.bench.clock
        self.is_ready = True
        self.auth = FakeAuth(clock)
        self.renewals = FakeRenewals(self.auth)
        self.identities = RenewedIdentities(self.renewals, self.auth, bench.revoked, clock)
        self.payloads = SealedPayloads(RequestParser(max_tokens_limit=MAX_TOKENS_LIMIT))
        self.requests = RequestRunner(
            chain_of(bench).links, self.identities, bench.completions, self.payloads, self.seals, clock
        )
        self.places = Places(bench.admission, bench.router.names, most=self.most)
        self.worker = Worker(
            self.name,
            WorkerParts(
                schedule=self.schedule,
                runners={JobKind.REQUEST: self.requests, **self.runners},
                leases=Leases(self.schedule, self.seals, self.payloads, clock, lease_s=self.lease_s),
                places=self.places,
                is_ready=lambda: self.is_ready,
                instruments=JobInstruments(),
                clock=clock,
            ),
        )

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """With replicas that are watched, and the worker at work."""
        await self.bench.router.start()
        await asyncio.wait_for(self.bench.router.found.wait(), 20)
        await self.worker.start()
        try:
            yield
        finally:
            await self.worker.stop()
            await self.bench.router.stop()

    def result(self, job: JobRequested, sealed: Sealed | None) -> job_service_pb2.JobResult:
        """What the job gave."""
        assert sealed is not None
        return job_service_pb2.JobResult.FromString(self.seals.open(sealed, job, "result"))


async def standing(
    schedule: ScheduleInMemory, job_id: str = "job_1", identity: Identity = ALICE
) -> tuple[ScheduledJob, Sealed | None]:
    """As its tenant is told."""
    token = request_context.enter(RequestContext("req", "/test", caller=Caller(identity)))
    try:
        return await schedule.get(job_id)
    finally:
        request_context.leave(token)


async def ended(
    schedule: ScheduleInMemory, job_id: str = "job_1", identity: Identity = ALICE
) -> tuple[ScheduledJob, Sealed | None]:
    """Waits for a job's end, without moving the clock."""
    for _ in range(5000):
        found = await standing(schedule, job_id, identity)
        if found[0].state.is_final:
            return found
        await asyncio.sleep(0)
    raise AssertionError(f"{job_id} is {found[0].state.name}")


REVOKED = CredentialRevoked("The API key was revoked.")
__all__ = ["REVOKED", "FakeRenewals", "JobBench", "Report", "ended", "sealed_job", "standing"]
