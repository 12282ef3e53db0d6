"""The composition root of the gateway: reads from top to bottom."""

from __future__ import annotations

from google.protobuf.descriptor import ServiceDescriptor
from llmos.auth.v1 import admin_service_pb2_grpc, token_service_pb2_grpc
from llmos.gateway.v1 import (
    embedding_service_pb2,
    embedding_service_pb2_grpc,
    generation_service_pb2_grpc,
    job_service_pb2_grpc,
    model_service_pb2_grpc,
    policy_service_pb2_grpc,
    task_service_pb2,
    task_service_pb2_grpc,
)
from llmos.logging.v1 import audit_service_pb2_grpc

from services.gateway.administration.clients import GrpcAdministration
from services.gateway.administration.servicer import AdminServicer
from services.gateway.admission.permits import Admission, AdmissionLimits
from services.gateway.auditing import AuditTrail
from services.gateway.authentication import GatewayAuthenticator, OpenMethodGuard
from services.gateway.authorisation import Authorisation
from services.gateway.batches.assembly import build_batches
from services.gateway.batches.working import BatchJobs
from services.gateway.cache.assembly import answer_cache
from services.gateway.clients import GrpcAuditLog, GrpcAuth, GrpcRenewal
from services.gateway.completion import Completions
from services.gateway.cutting import RunningCredentials
from services.gateway.first_replica import FIRST_REPLICA, FirstReplica
from services.gateway.http import HttpEdge
from services.gateway.http_cors import Cors
from services.gateway.http_protocol import HttpLimits
from services.gateway.http_receiving import Receiving
from services.gateway.http_server import HttpServer
from services.gateway.jobs.assembly import build_jobs
from services.gateway.jobs.working.assembly import build_worker
from services.gateway.jobs.working.identities import RenewedIdentities
from services.gateway.jobs.working.request import SealedPayloads
from services.gateway.keys import KeyRing
from services.gateway.limits.guard import Limits
from services.gateway.limits.memory import MemoryLimiter
from services.gateway.limits.plans import Plans
from services.gateway.limits.redis_limiter import RedisLimiter
from services.gateway.models import Models
from services.gateway.oauth.clients import AuthTokens, GrpcTokens
from services.gateway.oauth.http import OAuthRoutes
from services.gateway.oauth.outcomes import Outcomes
from services.gateway.oauth.servicer import TokenServicer
from services.gateway.policy_view import PolicyView
from services.gateway.redis import connect
from services.gateway.replica.clients import GrpcInference
from services.gateway.request import RequestParser
from services.gateway.routing import Replica, Router
from services.gateway.servicer import (
    AuditServicer,
    GenerationServicer,
    ModelServicer,
    PolicyServicer,
    pending,
)
from services.gateway.settings import GatewaySettings
from services.gateway.telemetry import AdmissionInstruments, Instruments, observe_cache
from services.mesh.actions import OPEN_METHODS
from services.mesh.app import App, Closing
from services.mesh.auth_client import GrpcJwks, own_tokens
from services.mesh.channel import Channel
from services.mesh.clock import Clock
from services.mesh.health import Health
from services.mesh.interceptors import Chain, server_chain
from services.mesh.jobs import JobKind
from services.mesh.jwks import KEYS, FirstKeys, JwksCache
from services.mesh.kafka import KafkaPublisher
from services.mesh.relay import Relay
from services.mesh.revocation import RevocationList
from services.mesh.running import RunningCalls
from services.mesh.server import GrpcServer
from services.mesh.slowdown import Slowdown
from services.mesh.source_address import TrustedProxies
from services.mesh.spool import Spool
from services.mesh.tls import TlsFiles
from services.mesh.tokens import Audience, Verifier
from services.mesh.watch_client import MAX_ANSWER_BYTES, GrpcWatches
from services.mesh.watching import POLICY, REVOCATIONS, PolicySource, watch_policy, watch_revocations
from services.mesh.watermark_client import GrpcWatermarks


async def build(settings: GatewaySettings, clock: Clock) -> App:
    """Puts the gateway together; nothing runs yet. Raises StartError where its secret is missing."""
    tls = TlsFiles.of(settings)
    health = Health(parts=[KEYS, REVOCATIONS, POLICY, FIRST_REPLICA])
    running = RunningCalls(settings.max_concurrent_calls)

    # To the other services: this service's own tokens, and what is reached with them.
    anonymous = Channel(settings.auth_target, clock=clock, tls=tls)
    tokens = own_tokens(settings, anonymous, clock)

    def channel(target: str, audience: Audience, max_bytes: int = settings.max_message_bytes) -> Channel:
        return Channel(
            target, clock=clock, tls=tls, tokens=tokens, audience=audience, max_message_bytes=max_bytes
        )

    auth = channel(settings.auth_target, Audience.AUTH)
    telling = channel(settings.auth_target, Audience.AUTH, MAX_ANSWER_BYTES)
    log = channel(settings.logging_target, Audience.LOGGING)
    inference = [channel(target, Audience.INFERENCE) for target in settings.inference_targets]

    # What is shared with other gateways, where there are several.
    redis = connect(settings, clock)
    shared = RedisLimiter(redis, clock, replicas=settings.replicas) if redis else None

    # The record of what is done here.
    spool = Spool.open(
        settings.state_dir / "spool",
        source=settings.service,
        instance=settings.name,
        mode=settings.audit_mode,
        max_bytes=settings.spool_max_bytes,
        max_events=settings.spool_max_events,
        clock=clock,
    )
    publisher = KafkaPublisher(settings)
    relay = Relay(spool, publisher, GrpcWatermarks(log), clock)
    trail = AuditTrail(spool, clock, running.is_cut)

    # What auth tells: whom not to let in, and by which rules.
    watches = GrpcWatches(telling)
    revoked, policy = RevocationList(clock), PolicySource()
    credentials = RunningCredentials(revoked)

    # Who comes in.
    jwks = JwksCache(GrpcJwks(anonymous), clock, refresh_interval_s=settings.jwks_refresh_s)
    verifier = Verifier(
        jwks,
        issuer=settings.issuer,
        audience=Audience.GATEWAY,
        clock=clock,
        cache_max_entries=settings.token_cache_max_entries,
        revoked=revoked.check,
    )
    keys = KeyRing(
        GrpcAuth(auth),
        verifier,
        clock,
        max_entries=settings.key_cache_max_entries,
        refusal_ttl_s=settings.key_refusal_ttl_s,
    )
    slowdown = Slowdown(clock, free_failures=settings.free_failures)
    links = server_chain(
        clock=clock,
        running=running,
        authenticator=GatewayAuthenticator(verifier, keys, spool, slowdown),
        open_methods=OPEN_METHODS,
        watch_methods=frozenset(
            {"/llmos.logging.v1.AuditService/Tail", "/llmos.gateway.v1.JobService/WatchJob"}
        ),
        max_call_s=settings.max_call_s,
        adopt_request_id=False,
    ).links
    authorisation = Authorisation(policy, clock)
    proxies = TrustedProxies(settings.trusted_proxies)
    chain = Chain(
        {
            **links,
            "slowdown": OpenMethodGuard(spool, slowdown).link,
            "audit": trail.link,
            "revoked": credentials.link,
            "authorise": authorisation.link,
        }
    )

    # What is done for them.
    ports = [GrpcInference(to, clock, probe_timeout_s=settings.probe_timeout_s) for to in inference]
    router = Router(
        [Replica(target, port) for target, port in zip(settings.inference_targets, ports, strict=True)],
        clock,
        probe_interval_s=settings.probe_interval_s,
        max_running=settings.max_concurrent_per_replica,
    )
    admission = Admission(
        AdmissionLimits(
            max_generations=settings.max_concurrent_generations,
            max_queued=settings.max_queued,
            max_queued_per_tenant=settings.max_queued_per_tenant,
            max_queue_wait_s=settings.max_queue_wait_s,
            tenant_share=settings.tenant_share,
            key_share=settings.key_share,
            batch_ageing_s=settings.batch_ageing_s,
            batch_share=settings.batch_share,
            batch_alone_after_s=settings.batch_alone_after_s,
            gateways=settings.replicas,
        ),
        router.capacity,
        clock,
        AdmissionInstruments(),
    )
    router.on_change = admission.capacity_changed
    models = Models(router, authorisation)
    limits = Limits(
        Plans(policy),
        shared or MemoryLimiter(clock),
        clock,
        max_tokens_limit=settings.max_tokens_limit,
        assumed_completion_tokens=settings.assumed_completion_tokens,
    )
    cache = answer_cache(settings, redis, router, clock)
    observe_cache(cache)
    completions = Completions(
        authorisation=authorisation,
        limits=limits,
        cache=cache,
        admission=admission,
        router=router,
        clock=clock,
        instruments=Instruments(clock),
        max_tokens_limit=settings.max_tokens_limit,
        require_deadline=settings.require_deadline,
    )
    view = PolicyView(
        authorisation,
        models,
        limits,
        clock,
        max_request_bytes=settings.max_message_bytes,
        max_tokens=settings.max_tokens_limit,
    )
    parser = RequestParser(
        max_tokens_limit=settings.max_tokens_limit,
        max_total_tokens=settings.max_total_tokens,
        max_prompt_bytes=settings.max_prompt_bytes,
        max_messages=settings.max_messages,
    )
    jobs = build_jobs(settings, clock, log=log, spool=spool, parser=parser, authorisation=authorisation)
    batches = build_batches(settings, clock, jobs, chain=chain, proxies=proxies, spool=spool, parser=parser)
    identities = RenewedIdentities(GrpcRenewal(auth), verifier, revoked, clock)
    worker = build_worker(
        settings,
        clock,
        links=chain.links,
        health=health,
        identities=identities,
        completions=completions,
        admission=admission,
        router=router,
        schedule=jobs.schedule,
        seals=jobs.seals,
        payloads=SealedPayloads(parser),
        more={JobKind.BATCH: BatchJobs(batches.runner, identities)},
    )

    # The two edges.
    server = GrpcServer(
        settings, chain=chain, running=running, health=health, validate=False, proxies=proxies
    )
    await server.add(
        generation_service_pb2_grpc.add_GenerationServiceServicer_to_server,
        GenerationServicer(parser, completions, jobs.parser, jobs.retries),
        "llmos.gateway.v1.GenerationService",
    )
    await server.add(
        model_service_pb2_grpc.add_ModelServiceServicer_to_server,
        ModelServicer(parser, models),
        "llmos.gateway.v1.ModelService",
    )
    await server.add(
        policy_service_pb2_grpc.add_PolicyServiceServicer_to_server,
        PolicyServicer(view),
        "llmos.gateway.v1.PolicyService",
    )
    await server.add(
        audit_service_pb2_grpc.add_AuditServiceServicer_to_server,
        AuditServicer(GrpcAuditLog(log)),
        "llmos.logging.v1.AuditService",
    )
    await server.add(
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server,
        AdminServicer(GrpcAdministration(auth)),
        "llmos.auth.v1.AdminService",
    )
    auth_tokens, outcomes = AuthTokens(auth, clock), Outcomes(trail)
    await server.add(
        token_service_pb2_grpc.add_TokenServiceServicer_to_server,
        TokenServicer(auth_tokens, outcomes),
        "llmos.auth.v1.TokenService",
    )
    await server.add(
        job_service_pb2_grpc.add_JobServiceServicer_to_server,
        jobs.servicer,
        "llmos.gateway.v1.JobService",
    )
    await add_pending(server)
    oauth = OAuthRoutes(
        chain=chain,
        tokens=GrpcTokens(auth_tokens),
        outcomes=outcomes,
        clock=clock,
        issuer=settings.issuer,
        public_url=settings.public_url,
        proxies=proxies,
    )
    edge = HttpEdge(
        chain=chain,
        parser=parser,
        completions=completions,
        models=models,
        jobs=jobs.parser,
        retries=jobs.retries,
        health=health,
        clock=clock,
        max_body_bytes=settings.http_max_body_bytes,
        routes=[*oauth.routes(), *batches.routes],
        proxies=proxies,
    )
    http = HttpServer(
        Cors(frozenset(settings.http_cors_origins)).around(edge.app()),
        host=settings.http_listen_host,
        port=settings.http_port,
        running=running,
        receiving=Receiving(
            running, max_bodies=settings.http_max_receiving, max_bytes=settings.http_max_receiving_bytes
        ),
        limits=HttpLimits(
            max_connections=settings.http_max_connections,
            max_head_bytes=settings.http_max_head_bytes,
            receive_timeout_s=settings.http_receive_timeout_s,
            idle_timeout_s=settings.http_idle_timeout_s,
            write_timeout_s=settings.write_timeout_s,
        ),
        tls=tls,
    )

    return App(
        settings=settings,
        clock=clock,
        health=health,
        server=server,
        # Stopped from the last to the first: all outcomes are written, the relay sends what it can, the spool
        # closes, and the channels stay to the end.
        components=(
            anonymous,
            auth,
            telling,
            log,
            *inference,
            *([redis] if redis else []),
            *([shared] if shared else []),
            Closing(tokens.close),
            FirstKeys(jwks, health, clock),
            watch_revocations(watches.revocations, revoked, health=health, clock=clock),
            watch_policy(watches.policy, policy, health=health, clock=clock),
            spool,
            relay,
            trail,
            Closing(keys.close),
            *(Closing(port.close) for port in ports),
            router,
            FirstReplica(router, health, clock),
            *jobs.components,
            *batches.components,
            *worker,
        ),
        edges=(http,),
    )


async def add_pending(server: GrpcServer) -> None:
    """The public services that answer UNIMPLEMENTED, with a reason, until a later version brings them."""
    for register, base, service in (
        (
            embedding_service_pb2_grpc.add_EmbeddingServiceServicer_to_server,
            embedding_service_pb2_grpc.EmbeddingServiceServicer,
            embedding_service_pb2.DESCRIPTOR.services_by_name["EmbeddingService"],
        ),
        (
            task_service_pb2_grpc.add_TaskServiceServicer_to_server,
            task_service_pb2_grpc.TaskServiceServicer,
            task_service_pb2.DESCRIPTOR.services_by_name["TaskService"],
        ),
    ):
        await server.add(register, pending(base, _methods(service)), service.full_name)


def _methods(service: ServiceDescriptor) -> list[tuple[str, bool]]:
    return [(method.name, method.server_streaming) for method in service.methods]
