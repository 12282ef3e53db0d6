"""The composition root of the logging service."""

from __future__ import annotations

import random
from functools import partial

from llmos.logging.v1 import (
    audit_service_pb2_grpc,
    schedule_service_pb2_grpc,
    watermark_service_pb2_grpc,
)

from services.logging.audit import AuditLog
from services.logging.consumer import TopicConsumer
from services.logging.intake import AuditIntake, Intake, JobIntake
from services.logging.outbox import Outbox
from services.logging.schedule.machine import Machine, Rules
from services.logging.schedule.schedule import Limits, Schedule
from services.logging.schedule.servicer import ScheduleServicer
from services.logging.schedule.store import Bounds
from services.logging.schedule.stores.sqlite import SqliteScheduleStore
from services.logging.servicer import AuditServicer, WatermarkServicer
from services.logging.settings import LoggingSettings
from services.logging.stores.sqlite import SqliteStore
from services.mesh.app import App, Closing
from services.mesh.auth_client import GrpcJwks, own_tokens
from services.mesh.broker import Topic
from services.mesh.channel import Channel
from services.mesh.clock import Clock
from services.mesh.health import Health
from services.mesh.interceptors import server_chain
from services.mesh.jwks import KEYS, FirstKeys, JwksCache
from services.mesh.kafka import KafkaPublisher, KafkaSource
from services.mesh.revocation import RevocationList
from services.mesh.running import RunningCalls
from services.mesh.server import GrpcServer
from services.mesh.tls import TlsFiles
from services.mesh.tokens import Audience, ServiceAuthenticator, Verifier
from services.mesh.watch_client import GrpcWatches
from services.mesh.watching import REVOCATIONS, watch_revocations

CONSUMERS = {Topic.AUDIT: "audit-consumer", Topic.JOBS: "job-consumer", Topic.RETRY: "retry-consumer"}
GROUP = "llmos-logging"
AUDIT_GATHER_S = 0.2
"""Nobody waits for an audit event, as somebody does for a job."""
WAITING = frozenset(
    {
        "/llmos.logging.v1.AuditService/Tail",
        "/llmos.logging.v1.ScheduleService/ClaimJobs",
        "/llmos.logging.v1.ScheduleService/WatchJob",
    }
)
"""Calls that wait for something to happen: the drain does not wait for them."""


async def build(settings: LoggingSettings, clock: Clock) -> App:
    """Puts the service together."""
    tls = TlsFiles.of(settings)
    anonymous = Channel(settings.auth_target, clock=clock, tls=tls)
    tokens = own_tokens(settings, anonymous, clock)
    auth = Channel(settings.auth_target, clock=clock, tls=tls, tokens=tokens, audience=Audience.AUTH)
    jwks = JwksCache(GrpcJwks(anonymous), clock, refresh_interval_s=settings.jwks_refresh_s)
    revoked = RevocationList(clock)
    verifier = Verifier(
        jwks, issuer=settings.issuer, audience=Audience.LOGGING, clock=clock, revoked=revoked.check
    )

    health = Health(parts=[*CONSUMERS.values(), KEYS, REVOCATIONS])
    store = SqliteStore(settings.db_path)
    log = AuditLog(store, clock, fence_after_s=settings.fence_after_s, max_tails=settings.max_tails)
    schedule_store, schedule = _schedule(settings, clock)

    # What comes from Kafka, and what goes there.
    names = {topic: settings.topic_name(topic) for topic in CONSUMERS}
    intakes: dict[Topic, Intake] = {
        Topic.AUDIT: AuditIntake(names[Topic.AUDIT], log, schedule),
        Topic.JOBS: JobIntake(names[Topic.JOBS], log, schedule, clock),
        Topic.RETRY: JobIntake(names[Topic.RETRY], log, schedule, clock),
    }
    consumers = [
        TopicConsumer(
            KafkaSource(settings, topic, group=GROUP),
            intake,
            clock,
            stalled_after_s=settings.stalled_after_s,
            on_health=partial(health.set_part, CONSUMERS[topic]),
            gather_s=AUDIT_GATHER_S if topic is Topic.AUDIT else 0.0,
        )
        for topic, intake in intakes.items()
    ]
    outbox = Outbox(
        schedule, KafkaPublisher(settings), clock, source=settings.service, producer=settings.name
    )

    running = RunningCalls(settings.max_concurrent_calls)
    chain = server_chain(
        clock=clock,
        running=running,
        authenticator=ServiceAuthenticator(verifier, revoked.check_identity),
        watch_methods=WAITING,
        max_call_s=settings.max_call_s,
        adopt_request_id=True,
    )
    server = GrpcServer(settings, chain=chain, running=running, health=health)
    await server.add(
        audit_service_pb2_grpc.add_AuditServiceServicer_to_server,
        AuditServicer(log),
        "llmos.logging.v1.AuditService",
    )
    await server.add(
        watermark_service_pb2_grpc.add_WatermarkServiceServicer_to_server,
        WatermarkServicer(log),
        "llmos.logging.v1.WatermarkService",
    )
    await server.add(
        schedule_service_pb2_grpc.add_ScheduleServiceServicer_to_server,
        ScheduleServicer(schedule),
        "llmos.logging.v1.ScheduleService",
    )
    return App(
        settings=settings,
        clock=clock,
        health=health,
        server=server,
        components=(
            anonymous,
            auth,
            Closing(tokens.close),
            FirstKeys(jwks, health, clock),
            watch_revocations(GrpcWatches(auth).revocations, revoked, health=health, clock=clock),
            store,
            schedule_store,
            schedule,
            outbox,
            *consumers,
        ),
    )


def _schedule(settings: LoggingSettings, clock: Clock) -> tuple[SqliteScheduleStore, Schedule]:
    rules = Rules(
        first_backoff_s=settings.first_backoff_s,
        max_backoff_s=settings.max_backoff_s,
        dead_letter_ttl_s=settings.dead_letter_ttl_s,
        max_result_ttl_s=settings.max_result_ttl_s,
    )
    bounds = Bounds(
        max_jobs_per_tenant=settings.max_jobs_per_tenant,
        max_jobs=settings.max_jobs,
        max_dead_letters_per_tenant=settings.max_dead_letters_per_tenant,
    )
    store = SqliteScheduleStore(settings.schedule_path, Machine(rules, random.random), bounds)
    limits = Limits(
        min_lease_s=settings.min_lease_s,
        max_lease_s=settings.max_lease_s,
        lease_grace_s=settings.lease_grace_s,
        max_watchers=settings.max_job_watchers,
    )
    return store, Schedule(store, clock, limits)
