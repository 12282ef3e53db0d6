"""The logging service over gRPC, as the relay's `WatermarkSource`."""

from __future__ import annotations

import grpc
from llmos.logging.v1 import watermark_service_pb2, watermark_service_pb2_grpc

from services.mesh import status
from services.mesh.audit_protocol import ProducerAnswer, ProducerReport


class GrpcWatermarks:
    """Works on any channel; one of `mesh.channel` carries this service's token."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float = 5.0) -> None:
        self._stub = watermark_service_pb2_grpc.WatermarkServiceStub(channel)
        self._timeout_s = timeout_s

    async def sync(self, report: ProducerReport) -> ProducerAnswer:
        request = watermark_service_pb2.SyncProducerRequest(producer=report.producer, epoch=report.epoch)
        for held in report.held:
            request.held.add(epoch=held.epoch, floor_sequence=held.floor, last_sequence=held.last)
        if report.settled_before is not None:
            request.settled_before.epoch = report.settled_before.epoch
            request.settled_before.sequence = report.settled_before.sequence
        try:
            response = await self._stub.SyncProducer(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error) from None
        watermarks = {mark.epoch: mark.watermark_sequence for mark in response.watermarks}
        return ProducerAnswer(watermarks, response.fenced, response.next_epoch)
