"""Who reads what of the audit log, and how a tail follows it."""

from __future__ import annotations

import asyncio
import base64
from contextlib import aclosing

import pytest
from llmos.logging.v1 import audit_service_pb2, watermark_service_pb2

from services.logging.audit import AuditLog, visible_to
from services.logging.servicer import AuditServicer, WatermarkServicer
from services.logging.store import RecordFilter
from services.logging.stores.memory import MemoryStore
from services.mesh import context
from services.mesh.audit_protocol import Place
from services.mesh.clock import SystemClock
from services.mesh.context import Caller, Identity, RequestContext
from services.mesh.errors import ConcurrencyLimit, NotFound, PolicyDenied, RequestInvalid, ScopeMissing
from services.mesh.event_codec import EventRead, IntentRead

READER = Identity("tenant-a", "c", scopes=frozenset({"audit.read"}))
ADMIN = Identity("tenant-x", "c", scopes=frozenset({"audit.read", "admin"}))


def intents(*ids: str, tenant_id: str = "tenant-a", first: int = 1) -> list[EventRead]:
    return [
        EventRead(tenant_id, Place(1, first + n), 1, IntentRead(each, tenant_id, "c", 1000 + n, b""))
        for n, each in enumerate(ids)
    ]


@pytest.fixture
def log() -> AuditLog:
    return AuditLog(MemoryStore(), SystemClock(), fence_after_s=600, max_tails=2)


def test_a_reader_sees_its_own_tenant_only() -> None:
    assert visible_to(READER, RecordFilter()).tenant_id == "tenant-a"
    assert visible_to(READER, RecordFilter(tenant_id="tenant-a")).tenant_id == "tenant-a"
    with pytest.raises(NotFound):
        visible_to(READER, RecordFilter(tenant_id="tenant-b"))
    assert visible_to(ADMIN, RecordFilter()).tenant_id == ""
    assert visible_to(ADMIN, RecordFilter(tenant_id="tenant-b")).tenant_id == "tenant-b"
    for scopes in (frozenset[str](), frozenset({"generate"}), frozenset({"admin"})):
        with pytest.raises(ScopeMissing):
            visible_to(Identity("tenant-a", "c", scopes=scopes), RecordFilter())


async def test_a_tail_gives_the_last_records_and_then_follows(log: AuditLog) -> None:
    await log.take("t", intents("a", "b", "c"), {})
    await log.take("t", intents("other", tenant_id="tenant-b"), {})
    async with aclosing(log.tail(READER, RecordFilter(), last=2, after_position=None)) as tail:
        assert [(await anext(tail)).request_id for _ in range(2)] == ["b", "c"]
        following = asyncio.ensure_future(anext(tail))
        await log.take("t", intents("another", tenant_id="tenant-b", first=9), {})
        await log.take("t", intents("d", first=4), {})
        record = await asyncio.wait_for(following, 5)
        assert record.request_id == "d"
        position = record.position
    await log.take("t", intents("e", first=5), {})
    async with aclosing(log.tail(READER, RecordFilter(), last=0, after_position=position)) as tail:
        assert (await anext(tail)).request_id == "e"


async def test_a_tail_reads_more_than_a_page(log: AuditLog) -> None:
    await log.take("t", intents(*(f"r{n}" for n in range(450))), {})
    async with aclosing(log.tail(READER, RecordFilter(), last=0, after_position=0)) as tail:
        assert [(await anext(tail)).request_id for _ in range(450)] == [f"r{n}" for n in range(450)]


async def test_tails_are_limited(log: AuditLog) -> None:
    await log.take("t", intents("a"), {})
    tails = [log.tail(READER, RecordFilter(), last=1, after_position=None) for _ in range(3)]
    await anext(tails[0])
    await anext(tails[1])
    with pytest.raises(ConcurrencyLimit):
        await anext(tails[2])
    await tails[0].aclose()
    again = log.tail(READER, RecordFilter(), last=1, after_position=None)
    await anext(again)
    await again.aclose()
    await tails[1].aclose()


class Request:
    """A request as the chain leaves it."""

    def __init__(self, identity: Identity | None, peer_service: str = "service:gateway") -> None:
        self._context = RequestContext("req_1", "/test", caller=Caller(identity, peer_service))

    def __enter__(self) -> None:
        self._token = context.enter(self._context)

    def __exit__(self, *_: object) -> None:
        context.leave(self._token)


async def test_search_pages_through_the_servicer(log: AuditLog) -> None:
    await log.take("t", intents(*(f"r{n}" for n in range(7))), {})
    servicer = AuditServicer(log)
    found: list[str] = []
    token = ""
    with Request(READER):
        for _ in range(3):
            request = audit_service_pb2.SearchRequest(page_size=3, page_token=token)
            response = await servicer.Search(request, None)  # type: ignore[arg-type]
            found += [record.request_id for record in response.records]
            token = response.next_page_token
    assert found == [f"r{n}" for n in reversed(range(7))]
    assert token == ""


@pytest.mark.parametrize("token", ["?", "AAAA", "w6Q=", "MTIz", "eDp5"])
async def test_a_page_token_of_another_make_is_refused(log: AuditLog, token: str) -> None:
    with Request(READER), pytest.raises(RequestInvalid, match="page_token"):
        await AuditServicer(log).Search(audit_service_pb2.SearchRequest(page_token=token), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [2**63 - 1, -(2**63), 10**12])
async def test_numbers_beyond_the_database_are_refused(log: AuditLog, seconds: int) -> None:
    servicer = AuditServicer(log)
    search = audit_service_pb2.SearchRequest()
    search.filter.receive_time_from.seconds = seconds
    huge = base64.urlsafe_b64encode(f"{2**70}:x".encode()).decode()
    with Request(READER):
        with pytest.raises(RequestInvalid, match="receive_time_from"):
            await servicer.Search(search, None)  # type: ignore[arg-type]
        with pytest.raises(RequestInvalid, match="page_token"):
            await servicer.Search(audit_service_pb2.SearchRequest(page_token=huge), None)  # type: ignore[arg-type]
        with pytest.raises(RequestInvalid, match="after_position"):
            await anext(aiter(servicer.Tail(audit_service_pb2.TailRequest(after_position=2**64 - 1), None)))  # type: ignore[arg-type]
    request = watermark_service_pb2.SyncProducerRequest(producer="p", epoch=2**64 - 1)
    with pytest.raises(RequestInvalid, match="epoch"):
        await WatermarkServicer(log).SyncProducer(request, None)  # type: ignore[arg-type]


async def test_only_the_gateway_speaks_for_readers(log: AuditLog) -> None:
    servicer = AuditServicer(log)
    with Request(ADMIN, "service:inference"), pytest.raises(PolicyDenied):
        await servicer.Search(audit_service_pb2.SearchRequest(), None)  # type: ignore[arg-type]
    with Request(ADMIN, "service:auth"), pytest.raises(PolicyDenied):
        await anext(aiter(servicer.Tail(audit_service_pb2.TailRequest(), None)))  # type: ignore[arg-type]


async def test_a_producer_learns_its_watermarks(log: AuditLog) -> None:
    await log.take("t", intents("a", "b", "d"), {})
    request = watermark_service_pb2.SyncProducerRequest(producer="tenant-a", epoch=1)
    request.held.add(epoch=1, floor_sequence=1, last_sequence=3)
    with Request(None, "service:gateway"):
        response = await WatermarkServicer(log).SyncProducer(request, None)  # type: ignore[arg-type]
    assert [(mark.epoch, mark.watermark_sequence) for mark in response.watermarks] == [(1, 3)]
    assert not response.fenced
