"""A gateway for tests of clients: a real gRPC server that answers by a script, one entry a call.

It runs on threads of its own, so that it serves a sync and an async client alike.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from llmos.auth.v1 import admin_service_pb2, admin_service_pb2_grpc
from llmos.common.v1 import finish_reason_pb2, usage_pb2
from llmos.gateway.v1 import (
    generation_pb2,
    generation_service_pb2,
    generation_service_pb2_grpc,
    job_service_pb2,
    job_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)
from llmos.logging.v1 import audit_service_pb2, audit_service_pb2_grpc

DEADLINE_S = 10.0
"""Every wait in here ends after so long at the latest."""


@dataclass
class SeenCall:
    """One call as the server saw it."""

    method: str
    request: Any
    metadata: dict[str, str | bytes]
    time_remaining_s: float
    ended: threading.Event = field(default_factory=threading.Event)
    """Set when the call is over for the server, also by cancellation."""
    answered: bool = False
    """Whether the script came to its end; False where the client cancelled."""


@dataclass(frozen=True)
class Fail:
    """Answers with an error, as the platform's services write it."""

    code: grpc.StatusCode
    reason: str = ""
    message: str = "It failed."
    hint: str = "Do something."
    retry_after_s: float | None = None
    violations: tuple[tuple[str, str], ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()
    domain: str = "llmos"

    def end(self, context: grpc.ServicerContext) -> None:
        if not self.reason:  # an error of gRPC itself, or of a proxy
            context.abort(self.code, self.message)
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=self.domain)
        info.metadata.update({"request_id": "req_failed", "hint": self.hint, **dict(self.metadata)})
        status = status_pb2.Status(code=self.code.value[0], message=f"{self.message} {self.hint}")
        status.details.add().Pack(info)
        if self.violations:
            bad = error_details_pb2.BadRequest()
            for path, description in self.violations:
                bad.field_violations.add(field=path, description=description)
            status.details.add().Pack(bad)
        if self.retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(int(self.retry_after_s * 1e9))
            status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(self.code, status.message)


class Hang:
    """Waits until the client has gone away, or its deadline has passed."""


Step = Any
"""A response message, Fail, Hang, or a threading.Event to wait for."""


class ScriptedGateway(
    generation_service_pb2_grpc.GenerationServiceServicer,
    model_service_pb2_grpc.ModelServiceServicer,
    audit_service_pb2_grpc.AuditServiceServicer,
    admin_service_pb2_grpc.AdminServiceServicer,
    job_service_pb2_grpc.JobServiceServicer,
):
    """Use as a context manager. `will(step, …)` says how the next call is answered."""

    def __init__(self, port: int = 0, credentials: grpc.ServerCredentials | None = None) -> None:
        self._script: deque[tuple[Step, ...]] = deque()
        self._lock = threading.Condition()
        self.calls: list[SeenCall] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(self, self._server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(self, self._server)
        audit_service_pb2_grpc.add_AuditServiceServicer_to_server(self, self._server)
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(self, self._server)
        job_service_pb2_grpc.add_JobServiceServicer_to_server(self, self._server)
        address = f"127.0.0.1:{port}"
        if credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, credentials)
        self.target = f"127.0.0.1:{self.port}"

    def will(self, *steps: Step) -> None:
        """The next call that nothing was said about yet is answered so."""
        with self._lock:
            self._script.append(steps)

    def wait_for_calls(self, count: int) -> SeenCall:
        """The `count`-th call, once it is there."""
        with self._lock:
            if not self._lock.wait_for(lambda: len(self.calls) >= count, DEADLINE_S):
                raise AssertionError(f"only {len(self.calls)} of {count} calls came")
            return self.calls[count - 1]

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(0).wait(DEADLINE_S)

    def _serve(self, method: str, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        call = SeenCall(
            method, request, dict(context.invocation_metadata()), context.time_remaining() or float("inf")
        )
        if not context.add_callback(call.ended.set):
            call.ended.set()
        with self._lock:
            self.calls.append(call)
            self._lock.notify_all()
            steps = self._script.popleft() if self._script else (Fail(grpc.StatusCode.UNKNOWN, "UNSCRIPTED"),)
        for step in steps:
            if isinstance(step, Fail):
                step.end(context)
            elif step is Hang:
                call.ended.wait(DEADLINE_S)
                return
            elif isinstance(step, threading.Event):
                step.wait(DEADLINE_S)
            else:
                yield step
        call.answered = True

    def _one(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        for response in self._serve(method, request, context):
            return response
        return context.abort(grpc.StatusCode.CANCELLED, "hung")

    def Generate(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._one("Generate", request, context)

    def StreamGenerate(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._serve("StreamGenerate", request, context)

    def ResumeGenerate(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._serve("ResumeGenerate", request, context)

    def CancelGenerate(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._one("CancelGenerate", request, context)

    def CountTokens(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._one("CountTokens", request, context)

    def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._one("ListModels", request, context)

    def GetModel(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._one("GetModel", request, context)

    def Search(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._one("Search", request, context)

    def Tail(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._serve("Tail", request, context)


def _by_script(name: str, *, streams_in: bool, streams_out: bool) -> Any:
    def method(self: ScriptedGateway, request: Any, context: Any) -> Any:
        serve = self._serve if streams_out else self._one
        return serve(name, list(request) if streams_in else request, context)

    return method


for _service in (
    admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"],
    job_service_pb2.DESCRIPTOR.services_by_name["JobService"],
):
    for _method in _service.methods:
        setattr(
            ScriptedGateway,
            _method.name,
            _by_script(
                _method.name, streams_in=_method.client_streaming, streams_out=_method.server_streaming
            ),
        )


Response = generation_service_pb2.StreamGenerateResponse


def started(request_id: str = "req_1", seed: int = 7) -> Response:
    return Response(
        started=generation_pb2.Started(
            request_id=request_id, model="echo", model_revision="r1", seed=seed, stream_id="s1"
        )
    )


def delta(seq: int, text: str, choice_index: int = 0) -> Response:
    return Response(
        delta=generation_pb2.Delta(seq=seq, text=text, token_ids=[seq], choice_index=choice_index)
    )


def moved() -> Response:
    return Response(moved=generation_pb2.Moved(stream_id="s2"))


def finished(completion_tokens: int = 2, choices: int = 1) -> Response:
    return Response(
        finished=generation_pb2.Finished(
            choices=[
                generation_pb2.ChoiceEnd(index=i, finish_reason=finish_reason_pb2.FINISH_REASON_LENGTH)
                for i in range(choices)
            ],
            usage=usage_pb2.Usage(prompt_tokens=3, completion_tokens=completion_tokens),
        )
    )


def answer(*texts: str) -> tuple[Response, ...]:
    """A whole stream."""
    return (started(), *(delta(i, text) for i, text in enumerate(texts, 1)), finished(len(texts)))


def generated(text: str) -> generation_service_pb2.GenerateResponse:
    return generation_service_pb2.GenerateResponse(
        request_id="req_1",
        model="echo",
        model_revision="r1",
        seed=7,
        choices=[
            generation_pb2.Choice(
                index=0, text=text, finish_reason=finish_reason_pb2.FINISH_REASON_END_OF_SEQUENCE
            )
        ],
        usage=usage_pb2.Usage(prompt_tokens=3, completion_tokens=2, cached_prompt_tokens=1),
    )


def models(*ids: str, ready: bool = True) -> model_service_pb2.ListModelsResponse:
    return model_service_pb2.ListModelsResponse(
        models=[
            model_service_pb2.Model(
                id=name,
                revision="r1",
                context_tokens=2048,
                ready=ready,
                capabilities=[
                    model_service_pb2.MODEL_CAPABILITY_GENERATE,
                    model_service_pb2.MODEL_CAPABILITY_CHAT,
                ],
            )
            for name in ids
        ]
    )


def record(position: int, request_id: str = "") -> audit_service_pb2.RequestRecord:
    stored = audit_service_pb2.RequestRecord(request_id=request_id or f"req_{position}", position=position)
    facts = stored.ended.facts
    facts.request_id = stored.request_id
    facts.method = "/llmos.gateway.v1.GenerationService/StreamGenerate"
    facts.edge = 1
    facts.model = "echo"
    facts.trace_id = "ab" * 16
    facts.identity.tenant_id = "acme"
    facts.identity.client_id = "web"
    facts.receive_time.FromSeconds(1_700_000_000)
    stored.ended.end_time.FromMilliseconds(1_700_000_001_500)
    stored.ended.outcome = 1
    stored.ended.finish_reasons.append(finish_reason_pb2.FINISH_REASON_STOP)
    stored.ended.usage.prompt_tokens = 3
    stored.ended.usage.completion_tokens = 5
    return stored


def tailed(position: int) -> audit_service_pb2.TailResponse:
    return audit_service_pb2.TailResponse(record=record(position))
