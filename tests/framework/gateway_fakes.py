"""The gateway's ports in memory: replicas that play scripts, an auth that counts, a spool that remembers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from services.gateway.admission.claim import Claim
from services.gateway.admission.permits import Admission, AdmissionLimits, Permit
from services.gateway.auditing import AuditTrail, RequestRecord
from services.gateway.authorisation import Authorisation
from services.gateway.cache.answers import AnswerCache
from services.gateway.cache.ports import ResponseCache
from services.gateway.completion import Completions
from services.gateway.cutting import RunningCredentials
from services.gateway.generation import (
    Capability,
    Delta,
    EngineEvent,
    EngineStarted,
    Finished,
    FinishReason,
    Message,
    Model,
    Prompt,
    Role,
    Sampling,
    TokenCount,
    Usage,
    ValidGeneration,
    ValidPrompt,
    WholeAnswer,
)
from services.gateway.limits.guard import Limits
from services.gateway.limits.limiter import Limiter
from services.gateway.limits.memory import MemoryLimiter
from services.gateway.limits.plans import Plans
from services.gateway.models import Models
from services.gateway.ports import InferencePort
from services.gateway.routing import Replica, Router
from services.gateway.telemetry import AdmissionInstruments, Instruments
from services.mesh.clock import Clock, SystemClock
from services.mesh.context import Caller, Identity, RequestContext
from services.mesh.decision import PolicyEngine
from services.mesh.errors import (
    CredentialExpired,
    CredentialInvalid,
    CredentialRevoked,
    LlmosError,
    ReplicaLost,
)
from services.mesh.events import Edge, RequestEnded, RequestStarted
from services.mesh.interceptors import Link
from services.mesh.policy import (
    BUILT_IN_PLANS,
    BUILT_IN_ROLES,
    AddressRule,
    Network,
    Plan,
    PolicyDocument,
    TenantPolicy,
)
from services.mesh.policy import Role as PolicyRole
from services.mesh.revocation import RevocationList
from services.mesh.running import RunningCalls
from services.mesh.tokens import Audience, VerifiedToken

MODEL = Model(
    "echo-1", "rev-1", (Capability.GENERATE, Capability.CHAT), 4096, datetime(2030, 1, 1, tzinfo=UTC), True
)
ALICE = Identity("acme", "alice", "key_1", frozenset({"generate", "models.read", "audit.read"}))


KEY = "alice-key"
NOBODY = Identity("acme", "nobody")
"""Has no scope."""
MAX_TOKENS_LIMIT = 4096


@dataclass(slots=True)
class FixedPolicy:
    """A `PolicySource` that is set by hand."""

    engine: PolicyEngine


def fixed_policy(
    *roles: PolicyRole, address_rules: Sequence[AddressRule] = (), plan: Plan = BUILT_IN_PLANS[0]
) -> FixedPolicy:
    """The built-in roles, with what is given, for the tenant of `ALICE`."""
    document = PolicyDocument(
        (*BUILT_IN_ROLES, *roles),
        tuple(address_rules),
        (TenantPolicy(ALICE.tenant_id, plan_id=plan.plan_id),),
        (plan,),
    )
    return FixedPolicy(PolicyEngine(document))


T = TypeVar("T")


class Gate:
    """A place in a script: tells that it was reached, and waits to be opened."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()
        self.arrivals = asyncio.Semaphore(0)
        """Released once for each arrival."""

    async def passing(self) -> None:
        self.reached.set()
        self.arrivals.release()
        await self.open.wait()


Step = EngineEvent | LlmosError | Gate


def answer(*texts: str, first_seq: int = 1, reason: FinishReason = FinishReason.STOP) -> list[Step]:
    """A whole, correct answer of one choice."""
    deltas = [Delta(first_seq + i, 0, text, (100 + i,)) for i, text in enumerate(texts)]
    return [
        EngineStarted("rev-1", 7, "replica-0"),
        *deltas,
        Finished((reason,), Usage(7, len(texts), 3)),
    ]


async def events_of(
    port: InferencePort, request: ValidGeneration, request_id: str = "req_1", *, whole: bool = False
) -> list[EngineEvent]:
    """All of an answer."""
    if whole:
        answer = await port.generate_whole(request_id, request)
        return [answer.started, *answer.deltas, answer.finished]
    async with aclosing(port.generate(request_id, request)) as events:
        return [event async for event in events]


class FakeReplica:
    """An `InferencePort` that plays its scripts in turn; the last one again and again."""

    def __init__(
        self,
        *scripts: Sequence[Step],
        models: Sequence[Model] = (MODEL,),
        healthy: bool = True,
        places: int = 1000,
    ) -> None:
        self.scripts = list(scripts) or [answer("Hello", " world")]
        self.models = tuple(models)
        self.healthy = healthy
        self.places = places
        self.requests: list[ValidGeneration] = []
        self.closed = 0
        self.running = 0
        self.most_running = 0

    async def generate_whole(self, request_id: str, request: ValidGeneration) -> WholeAnswer:
        async with aclosing(self.generate(request_id, request)) as events:
            started, *deltas, finished = [event async for event in events]
        assert isinstance(started, EngineStarted)
        assert isinstance(finished, Finished)
        return WholeAnswer(started, [delta for delta in deltas if isinstance(delta, Delta)], finished)

    async def generate(self, request_id: str, request: ValidGeneration) -> AsyncGenerator[EngineEvent, None]:
        script = self.scripts[min(len(self.requests), len(self.scripts) - 1)]
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for step in script:
                if isinstance(step, Gate):
                    await step.passing()
                elif isinstance(step, LlmosError):
                    raise step
                else:
                    yield step
        finally:
            self.running -= 1
            self.closed += 1

    async def count_tokens(self, request: ValidPrompt) -> TokenCount:
        for step in self.scripts[0]:
            if isinstance(step, LlmosError):
                raise step
        return TokenCount(7, MODEL.context_tokens)

    async def list_models(self) -> tuple[Model, ...]:
        if not self.healthy:
            raise ReplicaLost("down")
        return self.models

    async def max_running(self) -> int:
        if not self.healthy:
            raise ReplicaLost("down")
        return self.places

    async def is_healthy(self) -> bool:
        return self.healthy


class FakeAudit:
    """An `AuditPort` that remembers. `gate` holds up intents; the errors are raised by what they name."""

    def __init__(self) -> None:
        self.started: list[RequestStarted] = []
        self.urgent: list[bool] = []
        """Of each intent."""
        self.ended: list[RequestEnded] = []
        self.anonymous: list[tuple[str, str]] = []
        self.gate: Gate | None = None
        self.end_gate: Gate | None = None
        self.start_error: Exception | None = None
        self.end_error: Exception | None = None

    def append_started(self, event: RequestStarted, *, urgent: bool = True) -> asyncio.Future[None]:
        self.urgent.append(urgent)
        return self._append(self.started, event, self.gate, self.start_error)

    def hurry(self, request_id: str) -> None: ...

    def append_ended(self, event: RequestEnded) -> asyncio.Future[None]:
        return self._append(self.ended, event, self.end_gate, self.end_error)

    def _append(
        self, events: list[T], event: T, gate: Gate | None, error: Exception | None
    ) -> asyncio.Future[None]:
        async def passing(gate: Gate) -> None:
            await gate.passing()
            if error is not None:
                raise error
            events.append(event)

        if gate is not None:
            return asyncio.create_task(passing(gate))
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if error is not None:
            done.set_exception(error)
        else:
            events.append(event)
            done.set_result(None)
        return done

    def count_anonymous(self, source_address: str, reason: str) -> None:
        self.anonymous.append((source_address, reason))


class FakeAuth:
    """An `AuthPort` with a fixed set of keys, and the `VerifierPort` for the tokens that it gives."""

    def __init__(self, clock: Clock, *, lifetime_s: float = 300) -> None:
        self.clock = clock
        self.lifetime_s = lifetime_s
        self.keys: dict[str, Identity] = {}
        self.error: LlmosError | None = None
        self.exchanges = 0
        self.gate: Gate | None = None
        self.revoked: set[str] = set()
        """Tokens."""
        self._tokens: dict[str, tuple[Identity, datetime]] = {}

    async def exchange(self, api_key: str) -> str:
        self.exchanges += 1
        if self.gate is not None:
            await self.gate.passing()
        if self.error is not None:
            raise self.error
        if api_key not in self.keys:
            raise CredentialInvalid("not known")
        token = f"token-{self.exchanges}"
        self._tokens[token] = (self.keys[api_key], self.clock.now() + timedelta(seconds=self.lifetime_s))
        return token

    async def verify(self, token: str) -> VerifiedToken:
        identity, expires_at = self._tokens[token]
        if token in self.revoked:
            raise CredentialRevoked("revoked")
        if self.clock.now() >= expires_at:
            raise CredentialExpired("expired")
        return VerifiedToken(
            subject=identity.client_id,
            client_id=identity.client_id,
            tenant_id=identity.tenant_id,
            key_id=identity.key_id,
            scopes=identity.scopes,
            audience=Audience.GATEWAY,
            issued_at_s=identity.issued_at_s,
            expires_at=expires_at,
            token_id=identity.token_id,
            kid="key-1",
            roles=identity.roles,
            direct_scopes=identity.direct_scopes,
            models=identity.models,
            addresses=identity.addresses,
        )


def generation(**changes: object) -> ValidGeneration:
    """A valid request, with fields changed."""
    fields: dict[str, object] = {
        "model": MODEL.id,
        "prompt": Prompt(messages=(Message(Role.USER, ("Hi",)),)),
        "sampling": Sampling(seed=42),
    }
    return ValidGeneration(**{**fields, **changes})  # type: ignore[arg-type]


@dataclass
class Bench:
    """The use case over fakes, with the audit link around each call."""

    replicas: list[FakeReplica]
    max_concurrent: int = 8
    admission_limits: AdmissionLimits | None = None
    """Instead of `max_concurrent` alone."""
    require_deadline: bool = False
    clock: Clock = field(default_factory=SystemClock)
    audit: FakeAudit = field(default_factory=FakeAudit)
    proxies: Sequence[Network] = ()
    callers: dict[str, Identity] = field(default_factory=lambda: {KEY: ALICE, "nobody-key": NOBODY})
    """By their API keys."""
    expires_at: datetime | None = None
    """Of the callers' credentials."""
    extra_link: Link | None = None
    """Stands in the chain after `audit`."""
    policy: FixedPolicy = field(default_factory=lambda: fixed_policy())
    kept: ResponseCache | None = None
    """The response cache's store; None: there is no cache."""
    max_flight_bytes: int = 1024 * 1024
    limiter: Limiter | None = None
    """None: one in memory."""

    def __post_init__(self) -> None:
        self.router = Router(
            [Replica(f"replica-{i}", port) for i, port in enumerate(self.replicas)],
            self.clock,
            probe_interval_s=3600,
            ask_again_s=0,
        )
        self.admission = Admission(
            self.admission_limits or AdmissionLimits(max_generations=self.max_concurrent),
            self.router.capacity,
            self.clock,
            AdmissionInstruments(),
        )
        self.router.on_change = self.admission.capacity_changed
        self.authorisation = Authorisation(self.policy, self.clock)
        self.models = Models(self.router, self.authorisation)
        self.limiter = self.limiter or MemoryLimiter(self.clock)
        self.limits = Limits(Plans(self.policy), self.limiter, self.clock, max_tokens_limit=MAX_TOKENS_LIMIT)
        self.cache = AnswerCache(self.kept, self.router, self.clock, max_flight_bytes=self.max_flight_bytes)
        self.completions = Completions(
            authorisation=self.authorisation,
            limits=self.limits,
            cache=self.cache,
            admission=self.admission,
            router=self.router,
            clock=self.clock,
            instruments=Instruments(self.clock),
            max_tokens_limit=MAX_TOKENS_LIMIT,
            require_deadline=self.require_deadline,
        )
        self.running = RunningCalls(64)
        self.trail = AuditTrail(self.audit, self.clock, lambda: self.running.is_cut())
        self.revoked = RevocationList(self.clock)
        self.credentials = RunningCredentials(self.revoked)
        self._next_id = 0

    def permit(self) -> Permit:
        """One that a test holds itself."""
        return self.admission.permit(Claim(MODEL.id, "holder", "key_0", 1, 1, float("inf")))

    @asynccontextmanager
    async def call(
        self, identity: Identity = ALICE, *, deadline_s: float = float("inf")
    ) -> AsyncIterator[RequestRecord]:
        """One authenticated request, as the chain would serve it."""
        self._next_id += 1
        context = RequestContext(
            f"req_{self._next_id}",
            "/llmos.gateway.v1.GenerationService/StreamGenerate",
            "127.0.0.1",
            deadline_s,
            Caller(identity),
        )
        with self.trail.around(context, Edge.GRPC) as record:
            yield record
