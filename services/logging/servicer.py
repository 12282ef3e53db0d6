"""gRPC: messages in, our own types through, messages out; and who may ask."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from llmos.logging.v1 import (
    audit_service_pb2,
    audit_service_pb2_grpc,
    watermark_service_pb2,
    watermark_service_pb2_grpc,
)

from services.logging.audit import AuditLog
from services.logging.store import Cursor, RecordFilter, RequestRecord
from services.mesh.audit_protocol import HeldEpoch, Place, ProducerReport
from services.mesh.context import Identity, require_current
from services.mesh.errors import PolicyDenied, RequestInvalid, Violation
from services.mesh.event_codec import MAX_PLACE, MAX_SECONDS
from services.mesh.tokens import GATEWAY

DEFAULT_PAGE = 50
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AuditServicer(audit_service_pb2_grpc.AuditServiceServicer):
    """llmos.logging.v1.AuditService, for the gateway on behalf of its callers."""

    def __init__(self, log: AuditLog) -> None:
        self._log = log

    async def Search(
        self, request: audit_service_pb2.SearchRequest, context: _Context
    ) -> audit_service_pb2.SearchResponse:
        reader = _reader()
        records, cursor = await self._log.search(
            reader, _filter(request.filter), request.page_size or DEFAULT_PAGE, _unpack(request.page_token)
        )
        return audit_service_pb2.SearchResponse(
            records=[_message(record) for record in records], next_page_token=_pack(cursor)
        )

    async def Tail(
        self, request: audit_service_pb2.TailRequest, context: _Context
    ) -> AsyncIterator[audit_service_pb2.TailResponse]:
        records = self._log.tail(
            _reader(),
            _filter(request.filter),
            last=request.last,
            after_position=_bounded("after_position", request.after_position)
            if request.HasField("after_position")
            else None,
        )
        async with aclosing(records):
            async for record in records:
                yield audit_service_pb2.TailResponse(record=_message(record))


class WatermarkServicer(watermark_service_pb2_grpc.WatermarkServiceServicer):
    """llmos.logging.v1.WatermarkService, for services."""

    def __init__(self, log: AuditLog) -> None:
        self._log = log

    async def SyncProducer(
        self, request: watermark_service_pb2.SyncProducerRequest, context: _Context
    ) -> watermark_service_pb2.SyncProducerResponse:
        _bounded("epoch", request.epoch)
        for held in request.held:
            _bounded("held", max(held.epoch, held.floor_sequence, held.last_sequence))
        settled = request.settled_before
        _bounded("settled_before", max(settled.epoch, settled.sequence))
        answer = await self._log.sync(
            ProducerReport(
                request.producer,
                request.epoch,
                tuple(HeldEpoch(h.epoch, h.floor_sequence, h.last_sequence) for h in request.held),
                Place(settled.epoch, settled.sequence) if request.HasField("settled_before") else None,
            )
        )
        response = watermark_service_pb2.SyncProducerResponse(
            fenced=answer.fenced, next_epoch=answer.next_epoch
        )
        for epoch, sequence in answer.watermarks.items():
            response.watermarks.add(epoch=epoch, watermark_sequence=sequence)
        return response


def _reader() -> Identity:
    """Whom the gateway asks for. Raises PolicyDenied for anybody else's word."""
    request = require_current()
    if request.caller.peer_service != GATEWAY:
        raise PolicyDenied("The audit log is read through the gateway.")
    return request.identity


def _filter(message: audit_service_pb2.RequestFilter) -> RecordFilter:
    def time_us(field: str) -> int | None:
        stamp: Timestamp = getattr(message, field)
        if not message.HasField(field):  # type: ignore[arg-type]
            return None
        _bounded(f"filter.{field}", abs(stamp.seconds), MAX_SECONDS)
        return stamp.ToMicroseconds()

    return RecordFilter(
        request_id=message.request_id,
        tenant_id=message.tenant_id,
        client_id=message.client_id,
        outcome=message.outcome,
        receive_time_from_us=time_us("receive_time_from"),
        receive_time_before_us=time_us("receive_time_before"),
        open_only=message.open_only,
    )


def _message(record: RequestRecord) -> audit_service_pb2.RequestRecord:
    message = audit_service_pb2.RequestRecord(
        request_id=record.request_id,
        position=record.position,
        closed_by_logging=record.closed_by_logging,
    )
    if record.started is not None:
        message.started.ParseFromString(record.started)
    if record.ended is not None:
        message.ended.ParseFromString(record.ended)
    message.store_time.FromMicroseconds(record.store_time_us)
    return message


def _pack(cursor: Cursor | None) -> str:
    if cursor is None:
        return ""
    return base64.urlsafe_b64encode(f"{cursor.receive_time_us}:{cursor.request_id}".encode()).decode()


def _unpack(token: str) -> Cursor | None:
    """Raises RequestInvalid for what is no token of ours."""
    if not token:
        return None
    try:
        text = base64.urlsafe_b64decode(token.encode()).decode()
        time_us, request_id = text.split(":", 1)
        return Cursor(_bounded("page_token", int(time_us)), request_id)
    except (binascii.Error, ValueError) as error:
        raise _invalid("page_token", "is not one that a search returned") from error


def _bounded(field: str, value: int, limit: int = MAX_PLACE) -> int:
    """Numbers beyond what the database has are nobody's."""
    if abs(value) > limit:
        raise _invalid(field, "is out of range")
    return value


def _invalid(field: str, description: str) -> RequestInvalid:
    return RequestInvalid(
        f"The request is invalid: `{field}` {description}.", violations=[Violation(field, description)]
    )
