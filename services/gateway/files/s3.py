"""Files in a bucket of an S3-compatible object store.

What is longer than a part goes up in parts; an upload that a lost gateway left half done is never seen as a
file, and the bucket's own rule (AbortIncompleteMultipartUpload) should clear it away.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from obstore.exceptions import BaseError
from obstore.store import S3Store

from services.gateway.files.ports import READ_MAX_BYTES, Blob
from services.mesh.app import StartError
from services.mesh.errors import DependencyUnavailable, NotFound

PART_BYTES = 8 * 1024 * 1024
PARTS_AT_ONCE = 2
"""So an upload holds 24 MiB at most."""
CONNECT_TIMEOUT_S = 5
TIMEOUT_S = 60
"""Of one call, such as a part."""
RETRY_TIMEOUT_S = 30
T = TypeVar("T")


class S3Blobs:
    """A bucket, or what lies in it below a prefix."""

    def __init__(
        self,
        *,
        endpoint: str,
        bucket: str,
        region: str,
        access_key_id: str,
        secret_access_key: str,
        prefix: str = "",
        ca_file: Path | None = None,
    ) -> None:
        """`endpoint` such as `https://s3.example`; with `http://` nothing is encrypted on the way but the
        files themselves are. Raises StartError where `ca_file` cannot be read."""
        try:
            root = ca_file.read_bytes() if ca_file else None
        except OSError as error:
            raise StartError(f"{ca_file} cannot be read: {error.strerror}") from error
        self._what = f"the bucket {bucket} at {endpoint}"
        self._store = S3Store(
            bucket,
            prefix=prefix or None,
            endpoint=endpoint,
            region=region,
            access_key_id=access_key_id,
            secret_access_key=secret_access_key,
            virtual_hosted_style_request=False,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
                "timeout": timedelta(seconds=TIMEOUT_S),
                **({"root_certificate": root} if root else {}),
            },
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=RETRY_TIMEOUT_S)},
        )

    async def start(self) -> None:
        """Looks nothing up: a gateway serves all else without it."""

    async def stop(self) -> None:
        """Its connections end with it."""

    async def put(self, folder: str, name: str, parts: AsyncIterator[bytes]) -> None:
        raised: list[BaseException] = []

        async def told() -> AsyncIterator[bytes]:
            try:
                async for part in parts:
                    yield part
            except BaseException as error:
                raised.append(error)
                raise

        try:
            await self._store.put_async(
                f"{folder}/{name}", told(), chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE
            )
        except Exception as error:
            if raised:
                raise raised[0] from None
            raise _lost(error) from error

    async def read(self, folder: str, name: str, start: int, max_bytes: int) -> tuple[int, bytes]:
        path = f"{folder}/{name}"
        length = min(max_bytes, READ_MAX_BYTES)
        found = await _done(self._store.get_async(path, options={"range": (start, start + length)}))
        content = await _done(found.bytes_async())
        return found.meta["size"], content.to_bytes()

    async def list(self, folder: str, max_blobs: int, after: str = "") -> Sequence[Blob]:
        offset = f"{folder}/{after}" if after else None
        found: list[Blob] = []
        try:
            async for page in self._store.list_async(f"{folder}/", offset=offset, chunk_size=1000):
                found += [Blob(each["path"].rpartition("/")[2], each["size"]) for each in page]
                if len(found) >= max_blobs:
                    break
        except BaseError as error:
            raise _lost(error) from error
        return found[:max_blobs]

    async def rename(self, folder: str, name: str, new_name: str) -> None:
        await _done(self._store.rename_async(f"{folder}/{name}", f"{folder}/{new_name}"))

    async def delete(self, folder: str, name: str) -> bool:
        path = f"{folder}/{name}"
        try:
            await _done(self._store.head_async(path))
        except NotFound:
            return False
        await _done(self._store.delete_async(path))
        return True

    async def folders(self) -> Sequence[str]:
        found = await _done(self._store.list_with_delimiter_async())
        return [prefix.strip("/").rpartition("/")[2] for prefix in found["common_prefixes"]]


async def _done(work: Awaitable[T]) -> T:
    try:
        return await work
    except FileNotFoundError:
        raise NotFound("There is no such file.") from None
    except (BaseError, OSError, ValueError) as error:
        raise _lost(error) from error


def _lost(error: Exception) -> DependencyUnavailable:
    return DependencyUnavailable("The store of files cannot do this now.")
