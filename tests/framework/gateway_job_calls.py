"""Calls of JobService as tests make them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from llmos.gateway.v1 import job_service_pb2 as pb
from llmos.gateway.v1 import job_service_pb2_grpc

from services.mesh import status
from services.mesh.context import Identity
from services.mesh.errors import LlmosError
from tests.framework.gateway_fakes import ALICE, KEY, NOBODY, Bench, FakeReplica
from tests.framework.gateway_grpc import serving
from tests.framework.gateway_jobs import JobBench

OTHER = Identity("umbrella", "eve", "key_2", frozenset({"generate"}))
ROOT = Identity("operators", "root", "key_3", frozenset({"generate", "admin"}))
CALLERS = {KEY: ALICE, "nobody-key": NOBODY, "other-key": OTHER, "root-key": ROOT}
CANARY = "the canary sings"
WEBHOOK_SECRET = "whsec_" + "QUFB" * 8


def auth_of(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


def submission(text: str = CANARY, **fields: Any) -> pb.SubmitJobRequest:
    """A job that continues a text, with fields of the submission set."""
    request = pb.SubmitJobRequest(**fields)
    request.work.generate.model = "echo-1"
    request.work.generate.prompt.text = text
    return request


async def refused(call: Awaitable[Any]) -> LlmosError:
    """What the call was refused with."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return status.from_rpc_error(error)
    raise AssertionError(f"it was answered: {answer}")


@dataclass
class Served:
    """A running edge with jobs."""

    bench: Bench
    jobs: JobBench
    channel: grpc.aio.Channel
    stub: Any

    async def submit(self, key: str = KEY, text: str = CANARY, **fields: Any) -> pb.Job:
        answer = await self.stub.SubmitJob(submission(text, **fields), metadata=auth_of(key))
        job: pb.Job = answer.job
        return job

    async def get(self, job_id: str, key: str = KEY) -> pb.GetJobResponse:
        answer: pb.GetJobResponse = await self.stub.GetJob(pb.GetJobRequest(id=job_id), metadata=auth_of(key))
        return answer


@asynccontextmanager
async def jobs_served(folder: Path, bench: Bench | None = None, **settings: Any) -> AsyncIterator[Served]:
    bench = bench or Bench([FakeReplica()], callers=dict(CALLERS))
    jobs = JobBench(bench, **settings)
    async with serving(bench, folder, jobs=jobs) as channel:
        yield Served(bench, jobs, channel, job_service_pb2_grpc.JobServiceStub(channel))
