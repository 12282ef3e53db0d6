"""Prompts as jobs: over gRPC, and as a batch file over HTTP; timed from handing in to the last result."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import grpc
import openai
from llmos.gateway.v1 import (
    generation_pb2,
    generation_service_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
)

from tests.bench.through_gateway import Platform
from tests.bench.work import CannotMeasure, Stream, Work
from tests.framework.mesh import MeshHarness

POLL_S = 0.5
READERS = 2
LATE_S = 3600.0
OTHERWISE = "Again. "
"""Begins the prompts of a batch file: the same platform has had them as jobs, and its caches know those."""


class Jobs(Platform):
    """`JobService.SubmitJobs`, then each result as it comes."""

    name = "jobs"

    def __init__(self, mesh: MeshHarness, model: str) -> None:
        super().__init__(mesh, model)
        self._mesh = mesh
        self._model = model

    async def answer(self, work: Work) -> list[Stream]:
        stub = job_service_pb2_grpc.JobServiceStub(self._mesh.channel())
        bearer = self._mesh.bearer()
        due_s = time.perf_counter()
        try:
            taken = await stub.SubmitJobs(self._requests(work), metadata=bearer)
            if taken.refusals:
                raise CannotMeasure(f"{len(taken.refusals)} jobs: {taken.refusals[0].error.message}")
            found: dict[str, Stream] = {}
            waiting = iter(taken.job_ids)

            async def read() -> None:
                """Each result once it is there: jobs end about in the order in which they came."""
                for job_id in waiting:
                    while True:
                        answer = await self._result(stub, job_id)
                        if answer is not None:
                            break
                        await asyncio.sleep(POLL_S)
                    late_s = time.perf_counter() - due_s
                    (choice,) = answer.choices
                    ids = tuple(choice.token_ids)
                    tokens = answer.usage.completion_tokens
                    found[job_id] = Stream(late_s, late_s, tokens, ids, choice.text)

            async with asyncio.timeout(LATE_S):
                await asyncio.gather(*(read() for _ in range(READERS)))
            return [found[job_id] for job_id in taken.job_ids]
        except grpc.aio.AioRpcError as error:
            raise CannotMeasure(f"the platform refused: {error.code().name}: {error.details()}") from error

    async def _result(
        self, stub: job_service_pb2_grpc.JobServiceStub, job_id: str
    ) -> generation_service_pb2.GenerateResponse | None:
        """None: not yet."""
        request = job_service_pb2.GetJobRequest(id=job_id)
        found: job_service_pb2.GetJobResponse = await stub.GetJob(request, metadata=self._mesh.bearer())
        if found.job.state in (job_service_pb2.JOB_STATE_WAITING, job_service_pb2.JOB_STATE_RUNNING):
            return None
        if found.job.state != job_service_pb2.JOB_STATE_SUCCEEDED:
            raise CannotMeasure(f"a job failed: {found.job.last_error.message}")
        return found.result.generate

    async def _requests(self, work: Work) -> AsyncIterator[job_service_pb2.SubmitJobsRequest]:
        for prompt in work.prompts:
            spec = generation_pb2.GenerationSpec(
                model=self._model,
                prompt=generation_pb2.Prompt(text=prompt),
                sampling=generation_pb2.SamplingParams(temperature=0.0, seed=1),
                max_tokens=work.max_tokens,
                ignore_eos=True,
            )
            job = job_service_pb2.SubmitJobRequest(work=job_service_pb2.JobWork(generate=spec))
            yield job_service_pb2.SubmitJobsRequest(job=job)


class BatchFile(Platform):
    """A file uploaded, a batch polled, its output read: what a caller of OpenAI's batches waits for."""

    name = "batch file"

    def __init__(self, mesh: MeshHarness, model: str) -> None:
        super().__init__(mesh, model)
        self._mesh = mesh
        self._model = model

    async def answer(self, work: Work) -> list[Stream]:
        content = "".join(
            json.dumps(
                {
                    "custom_id": str(number),
                    "method": "POST",
                    "url": "/v1/completions",
                    "body": {
                        "model": self._model,
                        "prompt": OTHERWISE + prompt,
                        "temperature": 0,
                        "seed": 1,
                        "max_tokens": work.max_tokens,
                        "ignore_eos": True,
                    },
                }
            )
            + "\n"
            for number, prompt in enumerate(work.prompts)
        )
        due_s = time.perf_counter()
        async with openai.AsyncOpenAI(
            base_url=f"{self._mesh.http_url()}/v1", api_key=self._mesh.admin_key, timeout=60
        ) as client:
            file = await client.files.create(file=("in.jsonl", content.encode()), purpose="batch")
            batch = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            )
            async with asyncio.timeout(LATE_S):
                while batch.status not in ("completed", "failed", "expired", "cancelled"):
                    await asyncio.sleep(POLL_S)
                    batch = await client.batches.retrieve(batch.id)
            if batch.status != "completed" or batch.output_file_id is None or batch.error_file_id is not None:
                raise CannotMeasure(f"the batch is {batch.status}, with errors: {batch.error_file_id}")
            output = (await client.files.content(batch.output_file_id)).text
            late_s = time.perf_counter() - due_s
        found = [json.loads(each)["response"]["body"] for each in output.splitlines()]
        return [
            Stream(late_s, late_s, body["usage"]["completion_tokens"], (), body["choices"][0]["text"])
            for body in found
        ]
