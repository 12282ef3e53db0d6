"""The logging service over gRPC, as the relay's `WatermarkSource`."""

from __future__ import annotations

from llmos.logging.v1 import watermark_service_pb2, watermark_service_pb2_grpc

from services.mesh.audit_protocol import ProducerAnswer, ProducerReport
from services.mesh.channel import Channel


class GrpcWatermarks:
    """The channel carries this service's token."""

    def __init__(self, channel: Channel, *, timeout_s: float = 5.0) -> None:
        self._stub = watermark_service_pb2_grpc.WatermarkServiceStub(channel)
        self._timeout_s = timeout_s

    async def sync(self, report: ProducerReport) -> ProducerAnswer:
        request = watermark_service_pb2.SyncProducerRequest(producer=report.producer, epoch=report.epoch)
        for held in report.held:
            request.held.add(epoch=held.epoch, floor_sequence=held.floor, last_sequence=held.last)
        if report.settled_before is not None:
            request.settled_before.epoch = report.settled_before.epoch
            request.settled_before.sequence = report.settled_before.sequence
        response = await self._stub.SyncProducer(request, timeout=self._timeout_s)
        watermarks = {mark.epoch: mark.watermark_sequence for mark in response.watermarks}
        return ProducerAnswer(watermarks, response.fenced, response.next_epoch)
