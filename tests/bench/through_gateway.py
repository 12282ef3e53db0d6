"""The whole platform: this client over gRPC, the gateway with auth and audit, inference, over loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import grpc
import psutil
from llmos.gateway.v1 import generation_pb2, generation_service_pb2, generation_service_pb2_grpc

from tests.bench.tenants import tenants
from tests.bench.work import CannotMeasure, Stream, Work
from tests.framework.mesh import CannotStart, MeshHarness

TIMEOUT_S = 300.0
START_TIMEOUT_S = 300.0


class Platform:
    """A `Subject`: a mesh whose settings are made; `start` starts it unless it runs."""

    name = "platform, gRPC"

    def __init__(self, mesh: MeshHarness, model: str, *, tenant: str = "") -> None:
        """`tenant` is who asks, and is made: its prompts are in no cache of another's. Empty: the
        administrator."""
        self._mesh = mesh
        self._model = model
        self._tenant = tenant
        self._key: str | None = None
        self._stub: Any = None

    async def start(self) -> None:
        try:
            if not self._mesh.processes:
                await self._mesh.start(timeout_s=START_TIMEOUT_S)
        except CannotStart as error:
            raise CannotMeasure(f"the platform does not start: {error}") from error
        if self._tenant:
            self._key = (await tenants(self._mesh, [self._tenant]))[self._tenant]

    async def answer(self, work: Work) -> list[Stream]:
        due_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.ask(prompt, work.max_tokens, due_s)) for prompt in work.prompts]
        return [task.result() for task in tasks]

    async def ask(self, prompt: str, max_tokens: int, due_s: float) -> Stream:
        """One request; times count from `due_s` of time.perf_counter. Raises CannotMeasure."""
        spec = generation_pb2.GenerationSpec(
            model=self._model,
            prompt=generation_pb2.Prompt(text=prompt),
            sampling=generation_pb2.SamplingParams(temperature=0.0, seed=1),
            max_tokens=max_tokens,
            ignore_eos=True,
        )
        if self._stub is None:
            self._stub = generation_service_pb2_grpc.GenerationServiceStub(self._mesh.channel())
        first_s = last_s = 0.0
        token_ids: list[int] = []
        text: list[str] = []
        finished = False
        call = self._stub.StreamGenerate(
            generation_service_pb2.StreamGenerateRequest(spec=spec),
            metadata=self._mesh.bearer(self._key),
            timeout=TIMEOUT_S,
        )
        try:
            async for response in call:
                match response.WhichOneof("event"):
                    case "delta":
                        last_s = time.perf_counter() - due_s
                        first_s = first_s or last_s
                        token_ids += response.delta.token_ids
                        text.append(response.delta.text)
                    case "finished":
                        last_s = time.perf_counter() - due_s
                        finished = True
        except grpc.aio.AioRpcError as error:
            raise CannotMeasure(f"the platform refused: {error.code().name}: {error.details()}") from error
        if not finished:
            raise CannotMeasure("the platform's stream has no end")
        return Stream(first_s, last_s, len(token_ids), tuple(token_ids), "".join(text))

    def processes(self) -> Mapping[str, psutil.Process]:
        for name, process in self._mesh.processes.items():
            if not process.running:
                raise CannotMeasure(f"{name} ended with {process.exit_code}: {process.tail(8)}")
        found = {name: psutil.Process(process.pid) for name, process in self._mesh.processes.items()}
        for child in self._mesh.children("inference"):
            found["engine"] = child
        if self._mesh.broker is not None:
            found["broker"] = psutil.Process(self._mesh.broker.process.pid)
        return found | {"client": psutil.Process()}

    def rest(self) -> None:
        """It stays: its ties to the broker want to live. `rounds.idle` tells what that takes."""

    def wake(self) -> None:
        """It is awake."""

    async def stop(self) -> None:
        await self._mesh.close()
