"""Tells a webhook that a job has ended: a POST of JSON, signed as Standard Webhooks 1.0 says.

The receiver learns which job it was, where it stands and why it failed; what the job gave it asks for itself.
A repeat has the same `webhook-id`, so that a receiver that was told twice knows.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx

from services.gateway.jobs.ports import Failed, Postponed, Report, ScheduledJob, Seals, Succeeded
from services.gateway.jobs.working.outcomes import failed, unreadable
from services.gateway.jobs.working.ports import Attempt, Payloads
from services.gateway.jobs.working.webhook_addresses import WebhookAddresses
from services.mesh.clock import Clock
from services.mesh.errors import (
    DataCorrupt,
    DependencyUnavailable,
    LlmosError,
    NotFound,
    PolicyDenied,
    RequestInvalid,
    StateConflict,
)
from services.mesh.jobs import JobRequested, Sealed

KEY_PREFIX = "whsec_"
MAX_BODY_BYTES = 4096
"""Of an answer: more is not read."""
MAX_RETRY_AFTER_S = 3600.0
NO_KEY_WAIT_S = 60.0
USER_AGENT = "llmos-webhooks/1"
_GONE = 410


@dataclass(frozen=True, slots=True)
class WebhookLimits:
    """What a deployment allows. `settings.GatewaySettings` explains each."""

    allow_http: bool = False
    timeout_s: float = 10.0
    """For the name, the connection and the answer together."""
    max_connections: int = 64


class WebhookRunner:
    """The `Runner` of kind WEBHOOK; to be closed."""

    def __init__(
        self,
        payloads: Payloads,
        seals: Seals,
        addresses: WebhookAddresses,
        clock: Clock,
        limits: WebhookLimits | None = None,
        *,
        trust: ssl.SSLContext | bool = True,
    ) -> None:
        """`trust`: whose certificates; True: those that httpx brings."""
        self._payloads = payloads
        self._seals = seals
        self._addresses = addresses
        self._clock = clock
        self._limits = limits or WebhookLimits()
        most = self._limits.max_connections
        # A new connection each time: its address was just checked. No proxy of the environment's, which would
        # resolve the name anew.
        self._http = httpx.AsyncClient(
            verify=trust,
            follow_redirects=False,
            trust_env=False,
            timeout=self._limits.timeout_s,
            limits=httpx.Limits(max_connections=most, max_keepalive_connections=0),
            headers={"user-agent": USER_AGENT, "accept": "*/*", "accept-encoding": "identity"},
        )

    async def close(self) -> None:
        """Ends its connections."""
        await self._http.aclose()

    async def run(self, attempt: Attempt) -> Report:
        ended = attempt.claim.ended
        if ended is None:
            return unreadable(DataCorrupt("The schedule does not say which job has ended."))
        try:
            # Sealed for the job that has ended, not for the one that tells of it.
            plaintext = self._seals.open(attempt.job.request, ended.job, "request")
            target = self._payloads.webhook(plaintext)
        except DataCorrupt as error:
            return unreadable(error)
        except StateConflict:
            return Postponed(NO_KEY_WAIT_S)
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                answered = await self._post(target.url, target.secret, ended)
        except (PolicyDenied, RequestInvalid) as error:
            return failed(error, retryable=False)
        except LlmosError as error:
            return failed(error, retryable=True)
        except TimeoutError:
            return _not_delivered("The webhook did not answer in time.")
        except httpx.HTTPError as error:
            return _not_delivered(f"The webhook could not be reached: {type(error).__name__}.")
        return self._report(answered, attempt.job)

    async def _post(self, url: str, secret: str, ended: ScheduledJob) -> httpx.Response:
        parts = urlsplit(url)
        schemes = ("https", "http") if self._limits.allow_http else ("https",)
        host, port = parts.hostname, parts.port
        if parts.scheme not in schemes or not host or parts.username is not None:
            raise RequestInvalid("The webhook's URL is not one that this deployment calls.")
        port = port or (443 if parts.scheme == "https" else 80)
        address = await self._addresses.choose(host, port)
        body = message(ended)
        now = self._clock.now()
        name = f"[{address}]" if address.version == 6 else str(address)
        request = self._http.build_request(
            "POST",
            parts._replace(netloc=f"{name}:{port}", fragment="").geturl(),
            content=body,
            headers={
                "host": parts.netloc,
                "content-type": "application/json",
                **signature(secret, message_id(ended), now, body),
            },
            # The certificate must be the host's, whose address was looked up before.
            extensions={"sni_hostname": host, "timeout": httpx.Timeout(self._limits.timeout_s).as_dict()},
        )
        answered = await self._http.send(request, stream=True)
        try:
            size = 0
            async for part in answered.aiter_raw():
                size += len(part)
                if size >= MAX_BODY_BYTES:
                    break
        finally:
            await answered.aclose()
        return answered

    def _report(self, answered: httpx.Response, job: JobRequested) -> Report:
        status = answered.status_code
        if 200 <= status < 300:
            return Succeeded(self._nothing(job))
        said = f"The webhook answered with status {status}."
        if status == _GONE:
            return failed(NotFound(said), retryable=False)
        return _not_delivered(said, self._retry_after_s(answered.headers.get("retry-after", "")))

    def _nothing(self, job: JobRequested) -> Sealed:
        """There is no result, but a report has one."""
        return self._seals.seal(b"", job, "result")

    def _retry_after_s(self, value: str) -> float:
        """RFC 9110, section 10.2.3: seconds, or a date; 0 where there is none."""
        value = value.strip()
        if value.isascii() and value.isdecimal():
            return min(float(value), MAX_RETRY_AFTER_S)
        try:
            at = parsedate_to_datetime(value)
            wait_s = (at.replace(tzinfo=at.tzinfo or UTC) - self._clock.now()).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
        return min(max(wait_s, 0.0), MAX_RETRY_AFTER_S)


def message_id(ended: ScheduledJob) -> str:
    """The same for every repeat."""
    return f"{ended.job.job_id}-{ended.state.name.lower()}"


def message(ended: ScheduledJob) -> bytes:
    """The body."""
    job, state = ended.job, ended.state.name.lower()
    at = ended.end_time or job.create_time
    data: dict[str, object] = {
        "id": job.job_id,
        "state": state,
        "method": job.method,
        "model": job.model,
        "attempts": ended.attempts,
        "create_time": _time(job.create_time),
        "end_time": _time(at),
        "labels": dict(job.labels),
    }
    if job.batch_id:
        data["batch_id"] = job.batch_id
    if ended.error_reason:
        last = ended.history[-1] if ended.history else None
        data["error"] = {"reason": ended.error_reason, "message": "" if last is None else last.message}
    return json.dumps({"type": f"job.{state}", "timestamp": _time(at), "data": data}).encode()


def signature(secret: str, webhook_id: str, now: datetime, body: bytes) -> Mapping[str, str]:
    """The three headers. Raises RequestInvalid for a secret that is none."""
    try:
        key = base64.b64decode(secret.removeprefix(KEY_PREFIX), validate=True)
    except (ValueError, binascii.Error):
        raise RequestInvalid("The webhook's secret is not base64.") from None
    timestamp = str(int(now.timestamp()))
    signed = hmac.digest(key, f"{webhook_id}.{timestamp}.".encode() + body, hashlib.sha256)
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"v1,{base64.b64encode(signed).decode('ascii')}",
    }


def _not_delivered(said: str, retry_after_s: float = 0.0) -> Failed:
    error = DependencyUnavailable(said)
    return Failed(error.reason, int(error.status), said, retryable=True, retry_after_s=retry_after_s)


def _time(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
