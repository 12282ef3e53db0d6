"""Batches over a schedule in memory: files, submissions, and workers that run one step at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from llmos.gateway.v1 import generation_pb2, job_service_pb2
from llmos.jobs.v1 import payload_pb2

from services.gateway.batches.batches import Batch, Batches
from services.gateway.batches.ports import BatchWork
from services.gateway.batches.request import LineParser
from services.gateway.batches.runner import BatchRunner, RunnerLimits
from services.gateway.files.store import FileLimits, FileStore, Purpose, StoredFile
from services.gateway.jobs.ports import Failed, JobClaim, Report, Succeeded
from services.gateway.jobs.request import JobParser
from services.gateway.jobs.seals import PayloadSeals
from services.gateway.request import RequestParser
from services.mesh import context
from services.mesh.clock import ManualClock
from services.mesh.context import Caller, Identity, RequestContext
from services.mesh.errors import AuditUnavailable, EngineFault
from services.mesh.jobs import JobKind, JobRequested, RetryRequested
from tests.framework.blobs import MemoryBlobs
from tests.framework.schedules import ScheduleInMemory, report_one

ALICE = Identity("acme", "alice", "key_1", frozenset({"generate"}))
ENDPOINT = "/v1/chat/completions"
WINDOW_S = 86_400
FAILS = "fail in the engine"
MiB = 1024 * 1024


def line(custom_id: str, text: str = "hello", endpoint: str = ENDPOINT, **fields: Any) -> bytes:
    """One of an input file."""
    content: dict[str, Any] = {"model": "echo", "max_tokens": 4}
    match endpoint:
        case "/v1/chat/completions":
            content["messages"] = [{"role": "user", "content": text}]
        case "/v1/completions":
            content["prompt"] = text
        case _:
            content = {"model": "echo", "input": text}
    given = {"custom_id": custom_id, "method": "POST", "url": endpoint, "body": content | fields}
    return msgspec.json.encode(given) + b"\n"


class DirectSpool:
    """Hands jobs to the schedule at once. `full` makes it refuse."""

    def __init__(self, schedule: ScheduleInMemory) -> None:
        self._schedule = schedule
        self.full = False
        self.held: list[JobRequested | RetryRequested] | None = None
        """A list: what is handed in stays there, as where Kafka is away."""
        self.count = 0

    def append_job(self, event: JobRequested | RetryRequested) -> asyncio.Future[None]:
        return asyncio.ensure_future(self._append(event))

    async def _append(self, event: JobRequested | RetryRequested) -> None:
        if self.full:
            raise AuditUnavailable("The spool is full.")
        self.count += 1
        if self.held is None:
            await self._schedule.accept(event)
        else:
            self.held.append(event)

    async def release(self) -> None:
        """What was held comes to the schedule."""
        held, self.held = self.held or [], None
        for event in held:
            await self._schedule.accept(event)


class Record:
    """As much of a request's record as batches look at."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.source_address = "192.0.2.1"

    def begin(self) -> None: ...

    async def committed(self) -> None: ...


class BatchBench:
    """One tenant's gateway."""

    def __init__(self, *, max_lines: int = 1000, max_jobs: int = 10_000) -> None:
        self.clock = ManualClock()
        self.schedule = ScheduleInMemory(self.clock, draw=lambda: 0.5)
        self.spool = DirectSpool(self.schedule)
        self.seals = PayloadSeals([b"k" * 32])
        self.blobs = MemoryBlobs()
        limits = FileLimits(
            max_file_bytes=8 * MiB, max_tenant_bytes=64 * MiB, max_tenant_files=100, ttl_s=30 * 86_400
        )
        self.files = FileStore(self.blobs, self.seals, self.clock, limits)
        parser = RequestParser(max_tokens_limit=4096, assign_seed=lambda: 7)
        self.parser = LineParser(parser, JobParser(parser, self.clock, max_tokens_limit=4096))
        self.limits = RunnerLimits(max_lines=max_lines, max_jobs_per_tenant=max_jobs)
        self.runner = self.new_runner()
        self.batches = Batches(
            schedule=self.schedule,
            spool=self.spool,
            seals=self.seals,
            files=self.files,
            runner=self.runner,
            clock=self.clock,
        )
        self.ran: list[str] = []
        """The ids of requests that an engine was given."""

    def new_runner(self) -> BatchRunner:
        return BatchRunner(
            schedule=self.schedule,
            spool=self.spool,
            seals=self.seals,
            files=self.files,
            parser=self.parser,
            clock=self.clock,
            limits=self.limits,
        )

    @contextmanager
    def request(self, identity: Identity = ALICE) -> Iterator[Record]:
        """Inside a request of the tenant's."""
        token = context.enter(RequestContext("req_test", "/test", caller=Caller(identity)))
        try:
            yield Record(identity)
        finally:
            context.leave(token)

    async def upload(self, *given: bytes) -> StoredFile:
        async def parts() -> AsyncIterator[bytes]:
            for part in given:
                yield part

        file_id = self.files.new_id(Purpose.BATCH)
        return await self.files.create(ALICE.tenant_id, file_id, "in.jsonl", parts())

    async def create(self, *given: bytes, endpoint: str = ENDPOINT, **fields: Any) -> Batch:
        file = await self.upload(*given)
        work = BatchWork(file.file_id, endpoint, WINDOW_S, b"", **fields)
        with self.request() as record:
            return await self.batches.create(record, work)  # type: ignore[arg-type]

    async def get(self, batch_id: str) -> Batch:
        with self.request():
            return await self.batches.get(batch_id)

    async def cancel(self, batch_id: str) -> Batch:
        with self.request() as record:
            return await self.batches.cancel(record, batch_id)  # type: ignore[arg-type]

    async def claim(self, kinds: Iterable[JobKind] = tuple(JobKind)) -> list[JobClaim]:
        claims = await self.schedule.claim("worker", 100, lease_s=60, wait_s=0)
        return [claim for claim in claims if claim.scheduled.job.kind in kinds]

    async def run(self, claim: JobClaim) -> Report:
        """As a worker does."""
        job = claim.scheduled.job
        if job.kind is JobKind.BATCH:
            return await self.runner.run(claim)
        self.ran.append(job.job_id)
        return self.answered(job)

    def answered(self, job: JobRequested) -> Report:
        payload = payload_pb2.RequestPayload.FromString(self.seals.open(job.request, job, "request"))
        spec = payload.work.generate
        assert payload.source_address == "192.0.2.1"
        text = spec.prompt.text or spec.prompt.chat.messages[-1].content[0].text
        if FAILS in text:
            return Failed(EngineFault.reason, int(EngineFault.status), "The engine failed.", retryable=False)
        result = job_service_pb2.JobResult()
        answer = result.generate
        answer.request_id, answer.model, answer.seed = f"req_{job.job_id[4:12]}", spec.model, 7
        answer.choices.add(text=text.upper(), finish_reason=generation_pb2.Choice().finish_reason or 1)
        answer.usage.prompt_tokens, answer.usage.completion_tokens = 3, 2
        return Succeeded(self.seals.seal(result.SerializeToString(), job, "result"))

    async def step(self, *, advance_s: float = 1.0) -> int:
        """Runs what is due, moves the clock; returns how much that was."""
        claims = await self.claim()
        for claim in claims:
            report = await self.run(claim)
            await report_one(self.schedule, claim.scheduled.job.job_id, claim.fence, "req_x", report)
        await self.clock.advance(advance_s)
        await self.schedule.sweep()
        return len(claims)

    async def finish(self, batch_id: str, *, steps: int = 200) -> Batch:
        """Works until the batch has ended."""
        for _ in range(steps):
            batch = await self.get(batch_id)
            if batch.end_time is not None:
                return batch
            await self.step()
        raise AssertionError(f"the batch is {batch.status}")

    async def lines_of(self, file_id: str) -> list[dict[str, Any]]:
        """What a file holds."""
        content = b"".join([chunk async for chunk in self.files.read(ALICE.tenant_id, file_id)])
        return [msgspec.json.decode(each) for each in content.splitlines()]
