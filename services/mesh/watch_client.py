"""The streams of auth over gRPC, for `watching`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from datetime import UTC

from llmos.auth.v1 import token_service_pb2, token_service_pb2_grpc

from services.mesh.channel import Channel
from services.mesh.policy import RevocationKind
from services.mesh.policy_codec import document_of
from services.mesh.revocation import Revocation
from services.mesh.watching import PolicyAnswer, RevocationsAnswer

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""The whole policy comes in one answer; auth keeps it smaller than that."""
STREAM_TIMEOUT_S = 86_400.0
"""More than auth lets a call last, so that it is auth that ends it."""
_KINDS = {kind.value: kind for kind in RevocationKind}


class GrpcWatches:
    """The channel carries this service's token for auth. What the streams raise is an LlmosError."""

    def __init__(self, channel: Channel) -> None:
        self._stub = token_service_pb2_grpc.TokenServiceStub(channel)

    async def revocations(self) -> AsyncGenerator[RevocationsAnswer, None]:
        call = self._stub.WatchRevocations(
            token_service_pb2.WatchRevocationsRequest(), timeout=STREAM_TIMEOUT_S
        )
        try:
            async for response in call:
                yield RevocationsAnswer(
                    response.version,
                    response.snapshot,
                    tuple(_revocation(each) for each in response.revocations if _is_known(each)),
                )
        finally:
            call.cancel()

    async def policy(self) -> AsyncGenerator[PolicyAnswer, None]:
        call = self._stub.WatchPolicy(token_service_pb2.WatchPolicyRequest(), timeout=STREAM_TIMEOUT_S)
        try:
            async for response in call:
                document = None
                if response.HasField("policy"):
                    document = await asyncio.to_thread(document_of, response.policy)
                yield PolicyAnswer(response.version, document)
        finally:
            call.cancel()


def _is_known(message: token_service_pb2.Revocation) -> bool:
    if message.kind in _KINDS:
        return True
    log.error("auth revokes something of a kind that this version does not know: %d", message.kind)
    return False


def _revocation(message: token_service_pb2.Revocation) -> Revocation:
    return Revocation(
        version=message.version,
        kind=_KINDS[message.kind],
        subject_id=message.id,
        revoked_at=message.revoke_time.ToDatetime(tzinfo=UTC),
        expires_at=message.expire_time.ToDatetime(tzinfo=UTC),
        cut_streams=message.cut_streams,
    )
