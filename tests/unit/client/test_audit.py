"""Both clients read the audit log."""

from __future__ import annotations

import grpc
import llmos_client as sdk
import pytest

from tests.framework import scripted_gateway as script
from tests.framework.both_clients import REVOKED, UNAVAILABLE, Both, wait
from tests.framework.scripted_gateway import Fail, Hang, ScriptedGateway


async def test_search_goes_through_the_pages(gateway: ScriptedGateway, both: Both) -> None:
    page = script.audit_service_pb2.SearchResponse
    gateway.will(page(records=[script.record(3), script.record(2)], next_page_token="more"))
    gateway.will(page(records=[script.record(1)]))
    wanted = sdk.AuditFilter(client_id="web", outcome=sdk.Outcome.SUCCEEDED)
    records = await both.call("audit.search", wanted, limit=5)
    assert [record.position for record in records] == [3, 2, 1]
    first, second = (call.request for call in gateway.calls)
    assert (first.filter.client_id, first.filter.outcome, first.page_size) == ("web", 1, 5)
    assert (second.page_token, second.page_size) == ("more", 3)
    found = records[0]
    assert found.outcome is sdk.Outcome.SUCCEEDED
    assert found.usage == sdk.Usage(3, 5)
    assert found.duration_s == 1.5
    assert (found.tenant_id, found.client_id, found.edge, found.error_reason) == ("acme", "web", "grpc", "")


async def test_tail_goes_on_after_a_break_without_loss_or_doubling(
    gateway: ScriptedGateway, both: Both
) -> None:
    gateway.will(script.tailed(4), script.tailed(5), Fail(grpc.StatusCode.UNAVAILABLE, "DRAINING"))
    gateway.will(UNAVAILABLE)
    gateway.will(
        script.tailed(5), script.tailed(6), Fail(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
    )
    gateway.will(script.tailed(7))
    gateway.will(REVOKED)
    tail = both.client.audit.tail(last=2)
    positions: list[int] = []
    with pytest.raises(sdk.AuthenticationError):
        await both.read(tail, at_each=lambda record: positions.append(record.position))
    assert positions == [4, 5, 6, 7]
    requests = [call.request for call in gateway.calls]
    assert (requests[0].last, requests[0].HasField("after_position")) == (2, False)
    assert [request.after_position for request in requests[1:]] == [5, 5, 6, 7]


async def test_tail_begins_anew_while_nothing_was_delivered(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(UNAVAILABLE)
    gateway.will(REVOKED)
    with pytest.raises(sdk.AuthenticationError):
        await both.read(both.client.audit.tail(last=3))
    assert [call.request.last for call in gateway.calls] == [3, 3]


async def test_tail_ends_on_errors_that_stay(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(script.tailed(1), REVOKED)
    with pytest.raises(sdk.AuthenticationError):
        await both.read(both.client.audit.tail())
    assert len(gateway.calls) == 1


async def test_tail_is_ended_by_its_own_deadline_and_by_cancel(gateway: ScriptedGateway, both: Both) -> None:
    gateway.will(script.tailed(1), Hang)
    with pytest.raises(sdk.DeadlineExceeded):
        await both.read(both.client.audit.tail(timeout_s=0.2))
    gateway.will(script.tailed(1), Hang)
    tail = both.client.audit.tail()
    with pytest.raises(sdk.Cancelled):
        await both.read(tail, at_each=lambda record: tail.cancel())
    await wait(gateway.calls[-1].ended)
