"""Files of tenants: sealed, listed, limited and expired, whatever stores the bytes."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest

from services.gateway.files.sealing import CHUNK_BYTES
from services.gateway.files.store import FileLimits, FileStore, Purpose, StoredFile
from services.mesh.clock import ManualClock
from services.mesh.errors import DataCorrupt, DependencyUnavailable, MessageTooLarge, NotFound, RateLimit
from tests.framework.blobs import FakeFileKeys, MemoryBlobs

LIMITS = FileLimits(
    max_file_bytes=4 * CHUNK_BYTES, max_tenant_bytes=8 * CHUNK_BYTES, max_tenant_files=20, ttl_s=1000
)
CANARY = b"canary: what a tenant wrote"


class Bench:
    """A store over memory."""

    def __init__(self, *keys: str) -> None:
        self.clock = ManualClock()
        self.blobs = MemoryBlobs()
        self.files = self.over(*keys)

    def over(self, *keys: str) -> FileStore:
        """Another gateway, with other keys."""
        return FileStore(self.blobs, FakeFileKeys(*keys), self.clock, LIMITS)

    async def put(self, content: bytes, tenant: str = "acme", ttl_s: int | None = None) -> StoredFile:
        file_id = self.files.new_id(Purpose.BATCH, ttl_s)
        return await self.files.create(tenant, file_id, "in.jsonl", pieces(content))

    async def get(self, file_id: str, tenant: str = "acme", start: int = 0) -> bytes:
        return b"".join([chunk async for chunk in self.files.read(tenant, file_id, start)])


async def pieces(content: bytes, size: int = 300_000) -> AsyncIterator[bytes]:
    for at in range(0, len(content), size):
        yield content[at : at + size]


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
async def test_a_file_is_what_was_put_from_any_place(size: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    bench, content = Bench(), chance.randbytes(size)
    file = await bench.put(content)
    assert (file.size_bytes, file.filename, file.purpose) == (size, "in.jsonl", Purpose.BATCH)
    assert await bench.files.stat("acme", file.file_id) == file
    for start in (0, size // 2, chance.randrange(size + 1), size):
        assert await bench.get(file.file_id, start=start) == content[start:]


async def test_nothing_of_it_can_be_read_where_it_lies() -> None:
    bench = Bench()
    await bench.put(CANARY)
    stored = b"".join(bench.blobs.held.values()) + str(list(bench.blobs.held)).encode()
    for hidden in (CANARY, b"in.jsonl", b"acme"):
        assert hidden not in stored


async def test_another_tenant_has_no_such_file() -> None:
    bench = Bench()
    file = await bench.put(CANARY)
    with pytest.raises(NotFound):
        await bench.files.stat("other", file.file_id)
    with pytest.raises(NotFound):
        await bench.files.delete("other", file.file_id)
    assert (await bench.files.list("other", limit=10))[0] == []
    # Not even where the bytes are moved to it.
    ((folder, name), stored) = next(iter(bench.blobs.held.items()))
    own = await bench.put(b"own", "other")
    place = next(key for key in bench.blobs.held if key[0] != folder)
    bench.blobs.held[place[0], name] = stored
    with pytest.raises(DataCorrupt):
        await bench.files.stat("other", file.file_id)
    bench.blobs.held[place] = stored
    with pytest.raises(DataCorrupt):
        await bench.files.stat("other", own.file_id)


async def test_a_change_anywhere_is_seen() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance, bench = random.Random(seed), Bench()
    file = await bench.put(chance.randbytes(2 * CHUNK_BYTES + 9))
    ((place, stored),) = bench.blobs.held.items()
    for _ in range(40):
        at = chance.randrange(len(stored))
        bench.blobs.held[place] = (
            stored[:at] + bytes([stored[at] ^ 1 << chance.randrange(8)]) + stored[at + 1 :]
        )
        with pytest.raises(DataCorrupt):
            await bench.get(file.file_id)
    for cut in (1, 25, CHUNK_BYTES + 41, len(stored) - 10, len(stored)):
        bench.blobs.held[place] = stored[:-cut]
        with pytest.raises(DataCorrupt):
            await bench.get(file.file_id)


@pytest.mark.parametrize("file_id", ["", "file-1", "file-../../etc/passwd", "../x", "note-" + "0" * 40, "\0"])
async def test_what_is_no_id_is_not_looked_for(file_id: str) -> None:
    bench = Bench()
    with pytest.raises(NotFound):
        await bench.files.stat("acme", file_id)
    with pytest.raises(NotFound):
        await bench.files.delete("acme", file_id)
    assert bench.blobs.reads == 0


async def test_pages_by_time_and_purpose() -> None:
    bench, made = Bench(), []
    for number in range(7):
        file_id = bench.files.new_id(Purpose.BATCH if number % 2 else Purpose.BATCH_OUTPUT)
        made.append(await bench.files.create("acme", file_id, f"{number}", pieces(b"x")))
        await bench.clock.advance(1)
    await bench.files.write_note("acme", bench.files.note_name("x", 1, 10_000), b"not seen")
    found, more = await bench.files.list("acme", limit=3)
    assert (found, more) == (made[:-4:-1], True)
    found, more = await bench.files.list("acme", limit=10, after=found[-1].file_id)
    assert (found, more) == (made[3::-1], False)
    found, more = await bench.files.list("acme", limit=2, descending=False, after=made[4].file_id)
    assert (found, more) == (made[5:], False)
    found, _ = await bench.files.list("acme", limit=10, purpose=Purpose.BATCH, descending=False)
    assert found == made[1::2]


async def test_they_expire() -> None:
    bench = Bench()
    short, long = await bench.put(b"1", ttl_s=10), await bench.put(b"2", "other")
    kept = await bench.files.keep_for("acme", await bench.put(b"3"), 100)
    assert await bench.get(kept.file_id) == b"3"
    await bench.clock.advance(10)
    with pytest.raises(NotFound):
        await bench.files.stat("acme", short.file_id)
    assert [file.file_id for file in (await bench.files.list("acme", limit=9))[0]] == [kept.file_id]
    assert await bench.files.sweep() == 1
    await bench.clock.advance(90)
    assert await bench.files.sweep() == 1
    assert await bench.get(long.file_id, "other") == b"2"


async def test_the_limits_hold() -> None:
    bench = Bench()
    with pytest.raises(MessageTooLarge):
        await bench.put(bytes(LIMITS.max_file_bytes + 1))
    assert bench.blobs.held == {}
    for _ in range(2):
        await bench.put(bytes(LIMITS.max_file_bytes))
    with pytest.raises(RateLimit):
        await bench.put(b"1")
    await bench.put(b"1", "other")
    for _ in range(LIMITS.max_tenant_files):
        await bench.put(b"1", "third")
    with pytest.raises(RateLimit):
        await bench.put(b"1", "third")


async def test_keys_change() -> None:
    bench = Bench("old")
    file = await bench.put(b"1")
    bench.files = bench.over("new", "old")
    assert await bench.get(file.file_id) == b"1"
    later = await bench.put(b"2")
    bench.files = bench.over("new")
    assert await bench.get(later.file_id) == b"2"
    with pytest.raises(DataCorrupt):
        await bench.get(file.file_id)


async def test_a_note_is_written_over() -> None:
    bench = Bench()
    now_s = bench.clock.now().timestamp()
    name = bench.files.note_name("batch_1", now_s, 500)
    assert name == bench.files.note_name("batch_1", now_s, 500)
    assert await bench.files.note("acme", name) is None
    for text in (b"1", b"2"):
        await bench.files.write_note("acme", name, text)
        assert await bench.files.note("acme", name) == text
    assert await bench.files.note("other", name) is None
    # Two reads might meet two notes.
    reads = bench.blobs.reads
    await bench.files.note("acme", name)
    assert bench.blobs.reads == reads + 1


async def test_a_store_that_is_lost() -> None:
    bench = Bench()
    bench.blobs.lost = True
    with pytest.raises(DependencyUnavailable):
        await bench.put(b"1")
