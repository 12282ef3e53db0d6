"""A key management service behind a plugin of Kubernetes (KMS v2), on a socket in the file system; there are
plugins for the services of clouds, for vaults and for hardware.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from services.auth.signing.kms import request
from services.mesh.errors import DataCorrupt, DependencyUnavailable

CALL_S = 3.0
_DAMAGED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DATA_LOSS)


class KmsPlugin:
    """A `KeyManagement`. Wrapped is the plugin's whole answer, since its key id and annotations are needed to
    unwrap it. It connects for each call: there is one for each signing key that is made, or read anew.
    """

    def __init__(self, socket: Path) -> None:
        self._target = f"unix://{socket.absolute()}"

    async def wrap(self, data_key: bytes) -> bytes:
        asked = request.EncryptRequest(plaintext=data_key, uid=secrets.token_hex(16))
        answer = await self._call("Encrypt", asked, request.EncryptResponse)
        if not answer.ciphertext or answer.ciphertext == data_key:
            raise DependencyUnavailable("The key management service did not encrypt.")
        return bytes(answer.SerializeToString(deterministic=True))

    async def unwrap(self, wrapped: bytes) -> bytes:
        try:
            kept = request.EncryptResponse.FromString(wrapped)
        except DecodeError:
            raise DataCorrupt("A data key was not wrapped by a key management service.") from None
        asked = request.DecryptRequest(
            ciphertext=kept.ciphertext,
            uid=secrets.token_hex(16),
            key_id=kept.key_id,
            annotations=dict(kept.annotations),
        )
        answer = await self._call("Decrypt", asked, request.DecryptResponse)
        return bytes(answer.plaintext)

    async def _call(self, method: str, asked: Any, answer: Any) -> Any:
        try:
            async with grpc.aio.insecure_channel(self._target) as channel:
                call = channel.unary_unary(
                    f"/{request.SERVICE}/{method}",
                    request_serializer=type(asked).SerializeToString,
                    response_deserializer=answer.FromString,
                )
                return await call(asked, timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in _DAMAGED:
                raise DataCorrupt(
                    f"The key management service refuses a key ({error.code().name})."
                ) from None
            raise DependencyUnavailable(
                f"The key management service cannot be used now ({error.code().name})."
            ) from None
