"""The composition root of the logging service."""

from __future__ import annotations

from functools import partial

from llmos.logging.v1 import audit_service_pb2_grpc, watermark_service_pb2_grpc

from services.logging.audit import AuditLog
from services.logging.consumer import AuditConsumer
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
from services.mesh.kafka import KafkaSource
from services.mesh.revocation import RevocationList
from services.mesh.running import RunningCalls
from services.mesh.server import GrpcServer
from services.mesh.tls import TlsFiles
from services.mesh.tokens import Audience, ServiceAuthenticator, Verifier
from services.mesh.watch_client import GrpcWatches
from services.mesh.watching import REVOCATIONS, watch_revocations

CONSUMER = "consumer"
GROUP = "llmos-logging"


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

    health = Health(parts=[CONSUMER, KEYS, REVOCATIONS])
    store = SqliteStore(settings.db_path)
    log = AuditLog(store, clock, fence_after_s=settings.fence_after_s, max_tails=settings.max_tails)
    consumer = AuditConsumer(
        KafkaSource(settings, Topic.AUDIT, group=GROUP),
        store,
        log,
        clock,
        topic=settings.topic_name(Topic.AUDIT),
        stalled_after_s=settings.stalled_after_s,
        on_health=partial(health.set_part, CONSUMER),
    )

    running = RunningCalls(settings.max_concurrent_calls)
    chain = server_chain(
        clock=clock,
        running=running,
        authenticator=ServiceAuthenticator(verifier, revoked.check_identity),
        watch_methods=frozenset({"/llmos.logging.v1.AuditService/Tail"}),
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
            consumer,
        ),
    )
