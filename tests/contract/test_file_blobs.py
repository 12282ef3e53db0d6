"""Where files lie: a dictionary, a folder and an S3 server keep one contract."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from services.gateway.files.folder import PARTIAL, FolderBlobs
from services.gateway.files.ports import READ_MAX_BYTES, Blobs
from services.gateway.files.s3 import PART_BYTES
from services.mesh.app import StartError
from services.mesh.errors import DependencyUnavailable, NotFound
from tests.framework.blobs import MemoryBlobs, S3Server


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    pytest.importorskip("moto", reason="moto is not installed: there is no S3 server to test with")
    server = S3Server()
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["memory", "folder", "s3"])
async def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Blobs]:
    found: Blobs
    match request.param:
        case "memory":
            found = MemoryBlobs()
        case "folder":
            found = FolderBlobs(tmp_path / "files")
        case _:
            found = request.getfixturevalue("s3").blobs(secrets.token_hex(4))
    await found.start()
    yield found
    await found.stop()


async def parts(*given: bytes) -> AsyncIterator[bytes]:
    for part in given:
        yield part


async def test_what_was_put_is_read_from_any_place(blobs: Blobs) -> None:
    await blobs.put("a", "one", parts(b"0123", b"", b"456789"))
    assert await blobs.read("a", "one", 0, 100) == (10, b"0123456789")
    assert await blobs.read("a", "one", 3, 4) == (10, b"3456")
    assert await blobs.read("a", "one", 8, 100) == (10, b"89")
    await blobs.put("a", "one", parts(b"other"))
    assert await blobs.read("a", "one", 0, 100) == (5, b"other")


async def test_what_is_not_there(blobs: Blobs) -> None:
    await blobs.put("a", "one", parts(b"1"))
    for folder, name in (("a", "two"), ("b", "one")):
        with pytest.raises(NotFound):
            await blobs.read(folder, name, 0, 1)
        with pytest.raises(NotFound):
            await blobs.rename(folder, name, "three")
        assert await blobs.delete(folder, name) is False
    assert await blobs.list("b", 10) in ([], ())


async def test_a_large_one_goes_through_in_parts(blobs: Blobs) -> None:
    part = os.urandom(1024 * 1024)
    count = PART_BYTES // len(part) * 2 + 1
    await blobs.put("a", "large", parts(*[part] * count))
    size, begin = await blobs.read("a", "large", 0, 2**40)
    assert size == count * len(part)
    assert begin == (part * 3)[:READ_MAX_BYTES]
    assert (await blobs.read("a", "large", size - 5, 100))[1] == part[-5:]


async def test_one_that_breaks_off_leaves_what_was_there(blobs: Blobs) -> None:
    class Broken(Exception):
        pass

    async def breaking() -> AsyncIterator[bytes]:
        yield b"x" * (PART_BYTES + 1)
        raise Broken

    await blobs.put("a", "kept", parts(b"kept"))
    for name in ("kept", "new"):
        with pytest.raises(Broken):
            await blobs.put("a", name, breaking())
    assert [blob.name for blob in await blobs.list("a", 10)] == ["kept"]
    assert await blobs.read("a", "kept", 0, 10) == (4, b"kept")


async def test_they_are_listed_by_name_in_pages(blobs: Blobs) -> None:
    names = [f"n-{number:03}" for number in range(7)]
    for name in reversed(names):
        await blobs.put("a", name, parts(name.encode() * 2))
    await blobs.put("ab", "other", parts(b"1"))
    found = await blobs.list("a", 100)
    assert [(blob.name, blob.size_bytes) for blob in found] == [(name, 10) for name in names]
    assert [blob.name for blob in await blobs.list("a", 3)] == names[:3]
    assert [blob.name for blob in await blobs.list("a", 3, names[2])] == names[3:6]
    assert sorted(await blobs.folders()) == ["a", "ab"]


async def test_they_are_renamed_and_deleted(blobs: Blobs) -> None:
    await blobs.put("a", "one", parts(b"1"))
    await blobs.rename("a", "one", "two")
    assert [blob.name for blob in await blobs.list("a", 10)] == ["two"]
    assert await blobs.delete("a", "two") is True
    assert await blobs.delete("a", "two") is False
    assert len(await blobs.list("a", 10)) == 0


async def test_several_at_once(blobs: Blobs) -> None:
    await asyncio.gather(*(blobs.put("a", f"n{number}", parts(b"%d" % number)) for number in range(20)))
    assert len(await blobs.list("a", 100)) == 20
    read = await asyncio.gather(*(blobs.read("a", f"n{number}", 0, 10) for number in range(20)))
    assert [content for _, content in read] == [b"%d" % number for number in range(20)]


async def test_a_folder_leaves_no_partial_file_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path / "files")
    await blobs.start()
    await blobs.put("a", "one", parts(b"1"))
    with pytest.raises(ZeroDivisionError):
        await blobs.put("a", "two", (1 // 0 async for _ in parts(b"1")))  # type: ignore[misc]
    assert list((tmp_path / "files" / PARTIAL).iterdir()) == []
    assert (tmp_path / "files" / "a" / "one").stat().st_mode & 0o077 == 0
    assert (tmp_path / "files" / "a").stat().st_mode & 0o077 == 0


async def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="cannot be used"):
        await FolderBlobs(tmp_path / "file" / "files").start()


async def test_a_bucket_that_is_not_there(s3: S3Server) -> None:
    blobs = s3.blobs(bucket="none")
    with pytest.raises((DependencyUnavailable, NotFound)):
        await blobs.put("a", "one", parts(b"1"))
    with pytest.raises(DependencyUnavailable):
        await blobs.list("a", 1)


async def test_an_upload_that_breaks_off_leaves_no_parts_in_the_bucket(s3: S3Server) -> None:
    async def breaking() -> AsyncIterator[bytes]:
        yield b"x" * (PART_BYTES * 2 + 1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await s3.blobs("parts").put("a", "one", breaking())
    assert s3.client.list_multipart_uploads(Bucket="llmos").get("Uploads", []) == []
