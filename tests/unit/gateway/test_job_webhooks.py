"""Webhooks: where they may lead to, what they say, how they are signed, and what an answer means."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from services.gateway.jobs.ports import Failed, JobClaim, Report, ScheduledJob, Succeeded
from services.gateway.jobs.working.ports import Attempt
from services.gateway.jobs.working.request import SealedPayloads
from services.gateway.jobs.working.webhook_addresses import Address, WebhookAddresses
from services.gateway.jobs.working.webhooks import WebhookLimits, WebhookRunner
from services.gateway.request import RequestParser
from services.mesh.clock import ManualClock
from services.mesh.errors import DependencyUnavailable, PolicyDenied
from services.mesh.jobs import JobAttempt, JobKind, JobState
from tests.framework.job_workers import sealed_job
from tests.framework.jobs import new_seals

KEY = b"k" * 32
SECRET = f"whsec_{base64.b64encode(KEY).decode()}"
LOOPBACK = (ip_network("127.0.0.0/8"),)


class Receiver:
    """An HTTP server that answers what it is told to."""

    def __init__(self) -> None:
        self.answer = b"HTTP/1.1 204 No Content\r\n\r\n"
        self.port = 0
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.sent_bytes = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            first = (await reader.readline()).decode().strip()
            headers = {}
            while line := (await reader.readline()).decode().strip():
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            body = await reader.readexactly(int(headers["content-length"]))
            self.seen.append((first, headers, body))
            for _ in range(200):
                writer.write(self.answer)
                self.sent_bytes += len(self.answer)
                if b"\r\n\r\n" in self.answer:
                    break
                await writer.drain()
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()


async def to_loopback(host: str, port: int) -> Sequence[Address]:
    return [ip_address("127.0.0.1")]


async def tell(
    url: str,
    *,
    allow_http: bool = True,
    allowed: Sequence[Any] = LOOPBACK,
    timeout_s: float = 20.0,
    **changes: Any,
) -> Report:
    clock, seals = ManualClock(), new_seals()
    job = sealed_job(seals, clock, webhook=(url, SECRET), labels={"team": "a"})
    failure = JobAttempt(1, "req_1", "gw", clock.now(), clock.now(), "ENGINE_FAULT", 13, "It failed.")
    ended = ScheduledJob(
        replace(job, request=replace(job.request, ciphertext=b"")),
        JobState.FAILED,
        attempts=1,
        end_time=clock.now() + timedelta(seconds=3),
        history=(failure,),
        error_reason="ENGINE_FAULT",
    )
    ended = replace(ended, **changes)
    telling = replace(job, job_id="wh-1", kind=JobKind.WEBHOOK)
    claim = JobClaim(ScheduledJob(telling, JobState.RUNNING, attempts=1), 1, clock.now(), ended)
    runner = WebhookRunner(
        SealedPayloads(RequestParser(max_tokens_limit=10)),
        seals,
        WebhookAddresses(allowed, to_loopback),
        clock,
        WebhookLimits(allow_http, timeout_s),
        trust=False,  # authorities take long to load, and nobody here has a certificate
    )
    try:
        return await runner.run(Attempt(claim, "req_wh"))
    finally:
        await runner.close()


async def test_it_is_told_what_became_of_the_job_and_can_verify_who_says_so() -> None:
    async with receiving() as receiver:
        report = await tell(f"http://hooks.example:{receiver.port}/in?x=1")
        assert isinstance(report, Succeeded)
        ((first, headers, body),) = receiver.seen
    assert first == "POST /in?x=1 HTTP/1.1"
    assert headers["host"] == f"hooks.example:{receiver.port}"
    assert headers["content-type"] == "application/json"
    assert headers["webhook-id"] == "job_1-failed"
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    told = json.loads(body)
    assert (told["type"], told["timestamp"]) == ("job.failed", "2030-01-01T00:00:03.000Z")
    assert told["data"]["id"] == "job_1"
    assert told["data"]["error"] == {"reason": "ENGINE_FAULT", "message": "It failed."}
    assert told["data"]["labels"] == {"team": "a"}
    assert SECRET.encode() not in body


async def test_success_has_no_error() -> None:
    async with receiving() as receiver:
        report = await tell(
            f"http://hooks.example:{receiver.port}", state=JobState.SUCCEEDED, error_reason="", history=()
        )
        assert isinstance(report, Succeeded)
        told = json.loads(receiver.seen[0][2])
    assert told["type"] == "job.succeeded"
    assert "error" not in told["data"]


@pytest.mark.parametrize(
    ("answer", "retryable", "retry_after_s"),
    [
        (b"HTTP/1.1 500 No\r\nretry-after: 17\r\ncontent-length: 0\r\n\r\n", True, 17.0),
        (
            b"HTTP/1.1 503 No\r\nretry-after: Tue, 01 Jan 2030 00:01:00 GMT\r\ncontent-length: 0\r\n\r\n",
            True,
            60.0,
        ),
        (b"HTTP/1.1 429 No\r\nretry-after: 99999999\r\ncontent-length: 0\r\n\r\n", True, 3600.0),
        (b"HTTP/1.1 404 No\r\nretry-after: soon\r\ncontent-length: 0\r\n\r\n", True, 0.0),
        (b"HTTP/1.1 302 No\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n", True, 0.0),
        (b"HTTP/1.1 410 Gone\r\ncontent-length: 0\r\n\r\n", False, 0.0),
        (b"garbage\r\n\r\n", True, 0.0),
    ],
)
async def test_what_an_answer_means(answer: bytes, retryable: bool, retry_after_s: float) -> None:
    async with receiving() as receiver:
        receiver.answer = answer
        report = await tell(f"http://hooks.example:{receiver.port}/")
        assert len(receiver.seen) == 1
    assert isinstance(report, Failed)
    assert (report.retryable, report.retry_after_s) == (retryable, retry_after_s)
    assert "hooks.example" not in report.message


async def test_an_answer_without_end_is_not_read_to_its_end() -> None:
    async with receiving() as receiver:
        receiver.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 900000000\r\n\r\n" + b"x" * 100_000
        assert isinstance(await tell(f"http://hooks.example:{receiver.port}/"), Succeeded)


async def test_a_receiver_that_says_nothing_is_left() -> None:
    async with receiving() as receiver:
        receiver.answer = b""
        report = await tell(f"http://hooks.example:{receiver.port}/", timeout_s=0.5)
    assert isinstance(report, Failed)
    assert report.retryable


async def test_nobody_listens() -> None:
    async with receiving() as receiver:
        port = receiver.port
    report = await tell(f"http://hooks.example:{port}/")
    assert isinstance(report, Failed)
    assert report.retryable


@pytest.mark.parametrize(
    "url", ["http://hooks.example/", "ftp://hooks.example/", "https://u:p@hooks.example/"]
)
async def test_what_this_deployment_does_not_call(url: str) -> None:
    report = await tell(url, allow_http=False)
    assert isinstance(report, Failed)
    assert (report.error_reason, report.retryable) == ("REQUEST_INVALID", False)


async def test_a_name_that_leads_inside_is_not_called() -> None:
    async with receiving() as receiver:
        report = await tell(f"http://hooks.example:{receiver.port}/", allowed=())
        assert receiver.seen == []
    assert isinstance(report, Failed)
    assert (report.error_reason, report.retryable) == ("POLICY_DENIED", False)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "64:ff9b:1::1"),
        "2001:0:7f00:1::1",
    ],
)
def test_r24_what_is_not_public_is_not_called(address: str) -> None:
    assert not WebhookAddresses().may_be_called(ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_what_is_public_is_called(address: str) -> None:
    assert WebhookAddresses().may_be_called(ip_address(address))


async def test_the_first_address_that_may_be_called_is() -> None:
    async def lookup(host: str, port: int) -> Sequence[Address]:
        return [ip_address(each) for each in found]

    addresses = WebhookAddresses((ip_network("10.2.0.0/16"),), lookup)
    found = ["127.0.0.1", "8.8.8.8"]
    assert str(await addresses.choose("h", 443)) == "8.8.8.8"
    found = ["10.2.3.4"]
    assert str(await addresses.choose("h", 443)) == "10.2.3.4"
    found = ["10.3.3.4", "::1"]
    with pytest.raises(PolicyDenied):
        await addresses.choose("h", 443)


async def test_a_name_that_is_not_found_may_be_found_later() -> None:
    async def lookup(host: str, port: int) -> Sequence[Address]:
        raise OSError

    with pytest.raises(DependencyUnavailable):
        await WebhookAddresses((), lookup).choose("h", 443)
