"""What is sealed in jobs, as our own types: requests and webhooks in, results out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf.message import DecodeError
from llmos.gateway.v1 import generation_service_pb2, job_service_pb2
from llmos.jobs.v1 import payload_pb2
from msgspec.structs import replace

from services.gateway.generation import Generation
from services.gateway.jobs.working.ports import WebhookTarget, Work
from services.gateway.request import RequestParser
from services.gateway.servicer import whole_answer
from services.mesh.errors import DataCorrupt, NotImplementedYet
from services.mesh.jobs import JobRequested

MAX_LABELS = 16


class SealedPayloads:
    """A `Payloads`."""

    def __init__(self, parser: RequestParser) -> None:
        self._parser = parser

    def work(self, plaintext: bytes, job: JobRequested) -> Work:
        payload = _parsed(plaintext)
        kind = payload.work.WhichOneof("request")
        if kind is None:
            raise DataCorrupt("The job holds no request.")
        if kind != "generate":
            raise NotImplementedYet(f"This version of the server does not run `{kind}`.")
        message = generation_service_pb2.GenerateRequest(spec=payload.work.generate)
        request = self._parser.generation(message)
        labels = _joined(request.labels, job.labels)
        return Work(replace(request, labels=labels, is_job=True), payload.source_address)

    def webhook(self, plaintext: bytes) -> WebhookTarget:
        payload = _parsed(plaintext)
        if not payload.webhook.url:
            raise DataCorrupt("The job names no webhook.")
        return WebhookTarget(payload.webhook.url, payload.webhook.secret)

    def result(self, generation: Generation) -> bytes:
        return job_service_pb2.JobResult(generate=whole_answer(generation)).SerializeToString()

    def partial(self, texts: Sequence[str]) -> bytes:
        return payload_pb2.PartialResult(texts=texts).SerializeToString()


def _parsed(plaintext: bytes) -> payload_pb2.RequestPayload:
    try:
        return payload_pb2.RequestPayload.FromString(plaintext)
    except DecodeError:
        raise DataCorrupt("What the job holds cannot be read.") from None


def _joined(own: Mapping[str, str], of_job: Mapping[str, str]) -> dict[str, str]:
    """The request's own labels go before those of its job."""
    labels = dict(own)
    for name, value in of_job.items():
        if len(labels) < MAX_LABELS:
            labels.setdefault(name, value)
    return labels
