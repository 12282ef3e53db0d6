"""The gateway's HTTP edge over fakes, behind the real chain, on a free port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import openai

from services.gateway.batches.assembly import build_batches
from services.gateway.http import HttpEdge
from services.gateway.http_cors import Cors
from services.gateway.http_protocol import HttpLimits
from services.gateway.http_receiving import Receiving
from services.gateway.http_server import HttpServer
from services.gateway.oauth.http import OAuthRoutes
from services.gateway.oauth.outcomes import Outcomes
from services.gateway.oauth.ports import TokensPort
from services.gateway.request import RequestParser
from services.mesh.actions import OPEN_METHODS
from services.mesh.context import Caller
from services.mesh.errors import CredentialInvalid
from services.mesh.health import Health
from services.mesh.interceptors import Chain, server_chain
from services.mesh.running import RunningCalls
from services.mesh.source_address import TrustedProxies
from services.mesh.tls import TlsFiles
from services.mesh.tokens import bearer
from tests.framework.gateway_fakes import KEY, Bench
from tests.framework.gateway_jobs import JobBench
from tests.framework.oauth_fakes import FakeTokens

LIMITS = HttpLimits(
    max_connections=64,
    max_head_bytes=16 * 1024,
    receive_timeout_s=5,
    idle_timeout_s=5,
    write_timeout_s=5,
)
ISSUER = "https://login.llmos.example/one"
PUBLIC_URL = "https://api.llmos.example/"
MAX_BODY_BYTES = 4 * 1024 * 1024


def chain_of(bench: Bench, *, max_call_s: float = 30) -> Chain:
    """The gateway's chain, with the bench's callers, audit and policy."""

    async def authenticate(method: str, metadata: Mapping[str, str | bytes], source: str) -> Caller:
        identity = bench.callers.get(bearer(metadata))
        if identity is None:
            raise CredentialInvalid("The API key was refused.")
        return Caller(identity, expires_at=bench.expires_at)

    chain = server_chain(
        clock=bench.clock,
        running=bench.running,
        authenticator=authenticate,
        open_methods=OPEN_METHODS,
        max_call_s=max_call_s,
        adopt_request_id=False,
    )
    return Chain(
        chain.links
        | {
            "audit": bench.trail.link,
            **({"extra": bench.extra_link} if bench.extra_link else {}),
            "revoked": bench.credentials.link,
            "authorise": bench.authorisation.link,
        }
    )


class HttpBench:
    """A running edge and its address."""

    def __init__(
        self, bench: Bench, server: HttpServer, running: RunningCalls, health: Health, receiving: Receiving
    ) -> None:
        self.receiving = receiving
        self.bench = bench
        self.server = server
        self.running = running
        self.health = health

    @property
    def port(self) -> int:
        return self.server.ports["http"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = KEY) -> openai.AsyncOpenAI:
        """The real client, without its retries."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=10)


@asynccontextmanager
async def serving(
    bench: Bench,
    *,
    limits: HttpLimits = LIMITS,
    tls: TlsFiles | None = None,
    max_call_s: float = 30,
    max_tokens_limit: int = 4096,
    tokens: TokensPort | None = None,
    cors_origins: frozenset[str] = frozenset(),
    jobs: JobBench | None = None,
    max_receiving: int = 64,
    max_receiving_bytes: int = 64 * 1024 * 1024,
) -> AsyncIterator[HttpBench]:
    running = bench.running
    health = Health()
    chain = chain_of(bench, max_call_s=max_call_s)
    oauth = OAuthRoutes(
        chain=chain,
        tokens=tokens or FakeTokens(),
        outcomes=Outcomes(bench.trail),
        clock=bench.clock,
        issuer=ISSUER,
        public_url=PUBLIC_URL,
    )
    jobs = jobs or JobBench(bench)
    built = jobs.jobs
    batches = build_batches(
        jobs.settings,
        bench.clock,
        built,
        chain=chain,
        proxies=TrustedProxies(bench.proxies),
        spool=jobs.spool,
        parser=RequestParser(max_tokens_limit=max_tokens_limit),
        blobs=jobs.blobs,
    )
    edge = HttpEdge(
        chain=chain,
        parser=RequestParser(max_tokens_limit=max_tokens_limit),
        completions=bench.completions,
        models=bench.models,
        jobs=built.parser,
        retries=built.retries,
        health=health,
        clock=bench.clock,
        max_body_bytes=MAX_BODY_BYTES,
        routes=[*oauth.routes(), *batches.routes],
        proxies=TrustedProxies(bench.proxies),
    )
    app = Cors(cors_origins).around(edge.app())
    receiving = Receiving(running, max_bodies=max_receiving, max_bytes=max_receiving_bytes)
    server = HttpServer(
        app,
        host="127.0.0.1",
        port=0,
        running=running,
        receiving=receiving,
        limits=limits,
        tls=tls,
    )
    await server.start()
    try:
        yield HttpBench(bench, server, running, health, receiving)
    finally:
        await server.drain(0)
