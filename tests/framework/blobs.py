"""Stores of bytes for files: one in memory, and a real S3 server (moto) on a free port."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator, Sequence

from services.gateway.files.ports import READ_MAX_BYTES, Blob
from services.gateway.files.s3 import S3Blobs
from services.mesh.errors import DataCorrupt, DependencyUnavailable, NotFound

ACCESS_KEY_ID, SECRET_ACCESS_KEY = "llmos-test", "llmos-test-secret"
BUCKET = "llmos"


class MemoryBlobs:
    """A dictionary. `lost` makes it fail."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], bytes] = {}
        self.lost = False
        self.reads = 0

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def put(self, folder: str, name: str, parts: AsyncIterator[bytes]) -> None:
        self._check()
        self.held[folder, name] = b"".join([part async for part in parts])

    async def read(self, folder: str, name: str, start: int, max_bytes: int) -> tuple[int, bytes]:
        self._check()
        self.reads += 1
        found = self.held.get((folder, name))
        if found is None:
            raise NotFound("There is no such file.")
        return len(found), found[start : start + min(max_bytes, READ_MAX_BYTES)]

    async def list(self, folder: str, max_blobs: int, after: str = "") -> Sequence[Blob]:
        self._check()
        found = [Blob(name, len(held)) for (each, name), held in self.held.items() if each == folder]
        return sorted((blob for blob in found if blob.name > after), key=lambda blob: blob.name)[:max_blobs]

    async def rename(self, folder: str, name: str, new_name: str) -> None:
        self._check()
        if (folder, name) not in self.held:
            raise NotFound("There is no such file.")
        self.held[folder, new_name] = self.held.pop((folder, name))

    async def delete(self, folder: str, name: str) -> bool:
        self._check()
        return self.held.pop((folder, name), None) is not None

    async def folders(self) -> Sequence[str]:
        self._check()
        return sorted({folder for folder, _ in self.held})

    def _check(self) -> None:
        if self.lost:
            raise DependencyUnavailable("The store of files cannot do this now.")


class FakeFileKeys:
    """Keys by name; the first seals."""

    def __init__(self, *names: str) -> None:
        self._names = names or ("one",)

    @property
    def key_id(self) -> str:
        return self._names[0]

    def derive(self, key_id: str, tenant_id: str, info: bytes) -> bytes:
        if key_id not in self._names:
            raise DataCorrupt("There is no such key.")
        return hmac.digest(key_id.encode(), tenant_id.encode() + b"\0" + info, hashlib.sha256)


class S3Server:
    """moto's server, in a thread of this process; holds everything in memory."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)

    def start(self) -> None:
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"
        self.make_bucket(BUCKET)

    def stop(self) -> None:
        self._server.stop()

    def make_bucket(self, name: str) -> None:
        import boto3

        self.client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY_ID,
            aws_secret_access_key=SECRET_ACCESS_KEY,
        )
        self.client.create_bucket(Bucket=name)

    def blobs(self, prefix: str = "", *, bucket: str = BUCKET) -> S3Blobs:
        return S3Blobs(
            endpoint=self.endpoint,
            bucket=bucket,
            region="us-east-1",
            access_key_id=ACCESS_KEY_ID,
            secret_access_key=SECRET_ACCESS_KEY,
            prefix=prefix,
        )
