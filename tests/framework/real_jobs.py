"""A caller of JobService on a mesh of real processes."""

from __future__ import annotations

from typing import Any

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from llmos.gateway.v1 import job_service_pb2, job_service_pb2_grpc

from tests.framework.calls import spec
from tests.framework.mesh import MeshHarness
from tests.framework.waiting import eventually

FINAL = (
    job_service_pb2.JOB_STATE_SUCCEEDED,
    job_service_pb2.JOB_STATE_FAILED,
    job_service_pb2.JOB_STATE_CANCELLED,
)

_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DEADLINE_EXCEEDED)
"""Logging may be away, or not know of the job yet."""


class JobCaller:
    """Hands in jobs, and follows them."""

    def __init__(self, mesh: MeshHarness, *, key: str | None = None, gateway: str = "gateway") -> None:
        self._metadata = mesh.bearer(key)
        self.stub = job_service_pb2_grpc.JobServiceStub(mesh.channel(gateway))

    async def submit(self, text: str, *, not_before_s: float = 0.0, **fields: Any) -> str:
        """Its id. `not_before_s` is in seconds since the epoch."""
        work = job_service_pb2.JobWork(generate=spec(text, labels=fields.pop("spec_labels", {})))
        request = job_service_pb2.SubmitJobRequest(work=work, **fields)
        if not_before_s:
            request.not_before_time.CopyFrom(Timestamp(seconds=int(not_before_s)))
        answered = await self.stub.SubmitJob(request, metadata=self._metadata, timeout=60)
        return str(answered.job.id)

    async def get(self, job_id: str) -> job_service_pb2.GetJobResponse:
        request = job_service_pb2.GetJobRequest(id=job_id)
        found: job_service_pb2.GetJobResponse = await self.stub.GetJob(
            request, metadata=self._metadata, timeout=30
        )
        return found

    async def reaches(
        self, job_id: str, *states: Any, timeout_s: float = 120.0
    ) -> job_service_pb2.GetJobResponse:
        """The job, as soon as it stands there; FINAL where no state is named."""

        async def there() -> job_service_pb2.GetJobResponse | None:
            try:
                found = await self.get(job_id)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _PASSING:
                    raise
                return None
            return found if found.job.state in (states or FINAL) else None

        reached = await eventually(there, timeout_s=timeout_s, what=f"{job_id} stands there")
        assert reached is not None
        return reached


def seconds(value: float) -> Duration:
    return Duration(seconds=int(value), nanos=int(value % 1 * 1e9))
