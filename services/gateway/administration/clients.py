"""The way to auth for administration."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message
from llmos.auth.v1 import admin_service_pb2_grpc

from services.mesh.channel import Channel


class GrpcAdministration:
    """Forwards requests to auth; the channel asserts the identity of whoever asks, and auth restricts it to
    what is its."""

    def __init__(self, channel: Channel) -> None:
        self._stub: Any = admin_service_pb2_grpc.AdminServiceStub(channel)

    async def call(self, method: str, request: Message) -> Any:
        """The answer to a method of AdminService, by name. Raises what auth does."""
        return await getattr(self._stub, method)(request)
