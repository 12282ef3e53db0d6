"""The composition root of the auth service."""

from __future__ import annotations

from llmos.auth.v1 import admin_service_pb2_grpc, token_service_pb2_grpc

from services.auth import service_secrets
from services.auth.access import OPEN_METHODS, AccessControl
from services.auth.admin import Administration
from services.auth.exchange import Exchange
from services.auth.first_start import KeyFile, ensure_administrator
from services.auth.servicer import AdminServicer, TokenServicer
from services.auth.settings import AuthSettings
from services.auth.signing import KeyRing, Sealer
from services.auth.stores.sqlite import SqliteStore
from services.auth.tokens import TokenIssuer
from services.mesh.app import App
from services.mesh.clock import Clock
from services.mesh.health import Health
from services.mesh.interceptors import server_chain
from services.mesh.running import RunningCalls
from services.mesh.server import GrpcServer
from services.mesh.tokens import Audience, Verifier


class _FirstStart:
    """The step between opening the store and serving, as a component."""

    def __init__(self, store: SqliteStore, settings: AuthSettings, clock: Clock) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock

    async def start(self) -> None:
        await ensure_administrator(self._store, KeyFile(self._settings.admin_key_path), self._clock)

    async def stop(self) -> None:
        """Nothing is left to do."""


async def build(settings: AuthSettings, clock: Clock) -> App:
    """Puts the service together. Raises StartError where secrets are missing."""
    service_digests = service_secrets.load(settings.service_secrets_dir)
    key_file = settings.key_encryption_key_file
    sealer = Sealer.from_file(key_file) if key_file is not None else None
    store = SqliteStore(settings.db_path)
    ring = KeyRing(
        store,
        clock,
        rotation_s=settings.signing_key_rotation_s,
        publish_ahead_s=settings.signing_key_publish_ahead_s,
        token_ttl_s=settings.access_token_ttl_s,
        sealer=sealer,
    )
    issuer = TokenIssuer(ring, clock, issuer=settings.issuer, ttl_s=settings.access_token_ttl_s)
    exchange = Exchange(store, issuer, clock, service_digests)
    verifier = Verifier(ring, issuer=settings.issuer, audience=Audience.AUTH, clock=clock)

    running = RunningCalls(settings.max_concurrent_calls)
    health = Health()
    chain = server_chain(
        clock=clock,
        running=running,
        authenticator=AccessControl(verifier),
        open_methods=OPEN_METHODS,
        max_call_s=settings.max_call_s,
        adopt_request_id=True,
    )
    server = GrpcServer(settings, chain=chain, running=running, health=health)
    await server.add(
        token_service_pb2_grpc.add_TokenServiceServicer_to_server,
        TokenServicer(exchange, ring),
        "llmos.auth.v1.TokenService",
    )
    await server.add(
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server,
        AdminServicer(Administration(store, clock)),
        "llmos.auth.v1.AdminService",
    )
    return App(
        settings=settings,
        clock=clock,
        health=health,
        server=server,
        components=(store, _FirstStart(store, settings, clock), ring),
    )
