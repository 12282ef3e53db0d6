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

POLL_S = 1.0
"""Each look takes time from the engine, and so does a late one from the answer."""
PAGE = 100
LATE_S = 3600.0
OTHERWISE = "Again. "
"""Begins the prompts of a batch file: the same platform has had them as jobs, and its caches know those."""


class Jobs(Platform):
    """`JobService.SubmitJobs`; once all have ended, their results, page by page."""

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
            async with asyncio.timeout(LATE_S):
                await self._ended(stub, taken.batch_id, len(taken.job_ids))
                answers = await self._answers(stub, taken.batch_id)
            late_s = time.perf_counter() - due_s
            found = [answers[job_id] for job_id in taken.job_ids]
            return [
                Stream(
                    late_s,
                    late_s,
                    answer.usage.completion_tokens,
                    tuple(answer.choices[0].token_ids),
                    answer.choices[0].text,
                )
                for answer in found
            ]
        except grpc.aio.AioRpcError as error:
            raise CannotMeasure(f"the platform refused: {error.code().name}: {error.details()}") from error

    async def _ended(self, stub: job_service_pb2_grpc.JobServiceStub, batch_id: str, count: int) -> None:
        request = job_service_pb2.CountJobsRequest(batch_id=batch_id)
        while True:
            counts = await stub.CountJobs(request, metadata=self._mesh.bearer())
            if counts.failed or counts.cancelled:
                raise CannotMeasure(f"{counts.failed} jobs failed, {counts.cancelled} were cancelled")
            if counts.succeeded >= count:
                return
            await asyncio.sleep(POLL_S)

    async def _answers(
        self, stub: job_service_pb2_grpc.JobServiceStub, batch_id: str
    ) -> dict[str, generation_service_pb2.GenerateResponse]:
        """By job."""
        found: dict[str, generation_service_pb2.GenerateResponse] = {}
        request = job_service_pb2.ListJobsRequest(batch_id=batch_id, with_results=True, page_size=PAGE)
        while True:
            page = await stub.ListJobs(request, metadata=self._mesh.bearer())
            for job, result in zip(page.jobs, page.results, strict=True):
                found[job.id] = result.generate
            request.page_token = page.next_page_token
            if not page.next_page_token:
                return found

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
