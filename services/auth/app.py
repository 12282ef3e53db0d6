"""The composition root of the auth service."""

from __future__ import annotations

from llmos.auth.v1 import admin_service_pb2_grpc, token_service_pb2_grpc

from services.auth.access import OPEN_METHODS, RULES, AccessControl, Rule
from services.auth.administration.apply import Configuration
from services.auth.administration.explain import Explanation
from services.auth.administration.service import Administration
from services.auth.administration.servicer import AdminServicer
from services.auth.credentials import service_secrets
from services.auth.credentials.assertions import Assertions
from services.auth.credentials.last_use import LastUse
from services.auth.credentials.proof import Proofs
from services.auth.first_start import KeyFile, ensure_administrator
from services.auth.grants.exchange import Exchange
from services.auth.grants.introspection import Introspection
from services.auth.grants.own_tokens import OwnTokens
from services.auth.grants.renewal import Renewal
from services.auth.grants.tokens import TokenIssuer
from services.auth.guard import Guard
from services.auth.providers.fetching import Fetcher
from services.auth.providers.provider_tokens import ProviderTokens
from services.auth.servicer import TokenServicer
from services.auth.settings import AuthSettings
from services.auth.signing import master_key
from services.auth.signing.kms.clients import KmsPlugin
from services.auth.signing.master_key import EnvelopeSealer, Sealing
from services.auth.signing.ring import KeyRing
from services.auth.stores.opening import open_store
from services.auth.stores.sql import SqlStore
from services.auth.watching import REVOKE_TOKEN, WATCHES, Hub, Pruning
from services.mesh.app import App
from services.mesh.clock import Clock
from services.mesh.health import Health
from services.mesh.interceptors import Chain, server_chain
from services.mesh.running import RunningCalls
from services.mesh.server import GrpcServer
from services.mesh.slowdown import Slowdown
from services.mesh.tokens import Audience, Verifier


class _FirstStart:
    """The step between opening the store and serving, as a component."""

    def __init__(self, store: SqlStore, settings: AuthSettings, clock: Clock) -> None:
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
    sealer: Sealing | None = master_key.load(
        settings.key_encryption_key_file, settings.key_encryption_key, settings.key_encryption_key_env
    )
    if settings.key_encryption_kms_socket is not None:
        sealer = EnvelopeSealer(KmsPlugin(settings.key_encryption_kms_socket))
    store = open_store(settings)
    ring = KeyRing(
        store,
        clock,
        rotation_s=settings.signing_key_rotation_s,
        publish_ahead_s=settings.signing_key_publish_ahead_s,
        token_ttl_s=settings.longest_token_ttl_s,
        sealer=sealer,
    )
    issuer = TokenIssuer(
        ring,
        clock,
        issuer=settings.issuer,
        ttl_s=settings.access_token_ttl_s,
        service_ttl_s=settings.service_token_ttl_s,
    )
    last_use = LastUse(store, clock)
    assertions = Assertions(store, clock, audiences=frozenset({settings.issuer, settings.token_endpoint}))
    proofs = Proofs(store, clock, assertions, last_use, service_digests)
    own_tokens = OwnTokens(store, ring, clock, issuer=settings.issuer)
    providers = ProviderTokens(store, clock, Fetcher(settings.provider_ca_file), own_issuer=settings.issuer)
    exchange = Exchange(store, proofs, own_tokens, issuer, clock, providers)
    introspection = Introspection(store, proofs, own_tokens, exchange, clock)
    renewal = Renewal(store, exchange, own_tokens, issuer, clock)
    hub = Hub(store, clock)
    verifier = Verifier(
        ring, issuer=settings.issuer, audience=Audience.AUTH, clock=clock, revoked=hub.revoked.check
    )

    guard = Guard(Slowdown(clock, free_failures=settings.free_failures), verifier)

    running = RunningCalls(settings.max_concurrent_calls)
    health = Health()
    links = server_chain(
        clock=clock,
        running=running,
        authenticator=AccessControl(verifier, store, clock, hub.revoked.check_identity),
        open_methods=OPEN_METHODS,
        watch_methods=WATCHES,
        max_call_s=settings.max_call_s,
        adopt_request_id=True,
    ).links
    administration = {method for method, rule in RULES.items() if rule is Rule.ADMINISTRATOR}
    chain = Chain({**links, "guard": guard.link, "tell": hub.link({*administration, REVOKE_TOKEN})})
    server = GrpcServer(settings, chain=chain, running=running, health=health)
    await server.add(
        token_service_pb2_grpc.add_TokenServiceServicer_to_server,
        TokenServicer(exchange, introspection, renewal, ring, hub, guard, settings.issuer),
        "llmos.auth.v1.TokenService",
    )
    await server.add(
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server,
        AdminServicer(
            Administration(store, clock, cuts_streams=settings.revocation_cuts_streams),
            Configuration(store, clock, cuts_streams=settings.revocation_cuts_streams),
            Explanation(store, clock),
            clock,
        ),
        "llmos.auth.v1.AdminService",
    )
    return App(
        settings=settings,
        clock=clock,
        health=health,
        server=server,
        components=(
            store,
            _FirstStart(store, settings, clock),
            hub,
            Pruning(store, clock),
            ring,
            last_use,
            providers,
        ),
    )
