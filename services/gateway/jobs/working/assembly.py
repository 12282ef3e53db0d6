"""Puts together what runs jobs: it only constructs."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path

from services.gateway.admission.permits import Admission
from services.gateway.completion import Completions
from services.gateway.jobs.ports import SchedulePort, Seals
from services.gateway.jobs.working.identities import RenewedIdentities
from services.gateway.jobs.working.leases import Leases
from services.gateway.jobs.working.places import Places
from services.gateway.jobs.working.ports import Payloads, Runner
from services.gateway.jobs.working.requests import RequestRunner
from services.gateway.jobs.working.telemetry import JobInstruments
from services.gateway.jobs.working.webhook_addresses import WebhookAddresses
from services.gateway.jobs.working.webhooks import WebhookLimits, WebhookRunner
from services.gateway.jobs.working.worker import Worker, WorkerParts
from services.gateway.routing import Router
from services.gateway.settings import GatewaySettings
from services.mesh.app import Closing, Component, StartError
from services.mesh.clock import Clock
from services.mesh.health import Health
from services.mesh.interceptors import Link
from services.mesh.jobs import JobKind


def build_worker(
    settings: GatewaySettings,
    clock: Clock,
    *,
    links: Mapping[str, Link],
    health: Health,
    identities: RenewedIdentities,
    completions: Completions,
    admission: Admission,
    router: Router,
    schedule: SchedulePort,
    seals: Seals,
    payloads: Payloads,
    more: Mapping[JobKind, Runner] | None = None,
) -> tuple[Component, ...]:
    """The components, in order; `links` are those of the edges' chain. None where this gateway runs no jobs.
    `more`: the runners of further kinds. Raises StartError where `webhook_ca_file` cannot be used."""
    if not settings.run_jobs or settings.payload_key_file is None:
        return ()
    webhooks = WebhookRunner(
        payloads,
        seals,
        WebhookAddresses(settings.webhook_allowed_networks),
        clock,
        WebhookLimits(settings.webhook_allow_http, settings.webhook_timeout_s),
        trust=_trust(settings.webhook_ca_file),
    )
    requests = RequestRunner(links, identities, completions, payloads, seals, clock)
    worker = Worker(
        settings.name,
        WorkerParts(
            schedule=schedule,
            runners={JobKind.REQUEST: requests, JobKind.WEBHOOK: webhooks, **(more or {})},
            leases=Leases(schedule, seals, payloads, clock, lease_s=settings.job_lease_s),
            places=Places(admission, router.names, most=settings.jobs_concurrency),
            is_ready=lambda: health.ready,
            instruments=JobInstruments(),
            clock=clock,
        ),
    )
    return (Closing(webhooks.close), worker)


def _trust(ca_file: Path | None) -> ssl.SSLContext | bool:
    if ca_file is None:
        return True
    context = ssl.create_default_context()
    try:
        context.load_verify_locations(ca_file)
    except (OSError, ssl.SSLError) as error:
        raise StartError(f"the webhooks' authorities {ca_file} cannot be used: {error}") from None
    return context
