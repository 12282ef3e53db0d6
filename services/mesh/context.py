"""What is known of the request that is being served, for everything below its edge."""

from __future__ import annotations

from contextvars import ContextVar, Token
from datetime import datetime

import msgspec
from msgspec import Struct

from services.mesh.errors import Internal, ScopeMissing
from services.mesh.policy import Network


class Identity(Struct, frozen=True):
    """Who a request is made for."""

    tenant_id: str
    client_id: str
    key_id: str = ""
    scopes: frozenset[str] = frozenset()
    """The most that the credential may do: policy allows some of it, never more."""
    roles: frozenset[str] = frozenset()
    direct_scopes: frozenset[str] | None = None
    """What it may do without condition, whatever its roles say; None: all of `scopes`, since it has no
    roles."""
    models: tuple[str, ...] = ()
    """The models that the credential is limited to, `*` standing for any characters; empty: no such
    limit."""
    addresses: tuple[Network, ...] = ()
    """The addresses that it is limited to; empty: no such limit."""
    token_id: str = ""
    """The `jti` of the token that was verified."""
    issued_at_s: int = 0
    """When that token was issued, in seconds since the epoch: a revocation counts for tokens up to a
    moment."""

    def require(self, scope: str) -> None:
        """Raises ScopeMissing unless the credential has the scope."""
        if scope not in self.scopes:
            raise ScopeMissing(
                f"The credential lacks the scope `{scope}`.",
                hint=f"Use a credential that has the scope `{scope}`.",
                metadata={"scope": scope},
            )


class Caller(Struct, frozen=True):
    """What an authenticator found out."""

    identity: Identity | None = None
    """Whom the request is for; None for a call that a service makes on its own account."""
    peer_service: str | None = None
    """The service on the other end, such as `service:gateway`; None where a caller came directly."""
    expires_at: datetime | None = None
    """When the credential expires; None where that is not known here."""


class RequestContext(Struct):
    """One request on its way through this process. The chain of interceptors fills it."""

    request_id: str
    method: str
    """The full gRPC method name, `/package.Service/Method`; the HTTP edge uses the same names."""
    source_address: str = ""
    """The peer's address, without port."""
    deadline_s: float = float("inf")
    """On the injected monotonic clock."""
    caller: Caller = Caller()
    trace_id: str = ""
    traceparent: str = ""
    """The trace as W3C's header has it, where nobody collects this process's spans; else the span in force
    tells."""
    response_metadata: dict[str, str] = msgspec.field(default_factory=dict)
    """What the answer says of itself beside its content, errors too: names in lower case, values in ASCII.
    Headers on HTTP, until the answer begins; trailing metadata on gRPC, until it ends."""
    has_own_deadline: bool = False
    """Whether the deadline is the caller's, and not only the server's cap."""

    @property
    def identity(self) -> Identity:
        """Whom the request is for. Raises Internal where the method is open or a service asks."""
        if self.caller.identity is None:
            raise Internal(f"{self.method} was reached without an identity")
        return self.caller.identity


_current: ContextVar[RequestContext | None] = ContextVar("llmos_request", default=None)


def current() -> RequestContext | None:
    """The request being served by this task, if any."""
    return _current.get()


def require_current() -> RequestContext:
    """The request being served by this task. Raises Internal outside of one."""
    context = _current.get()
    if context is None:
        raise Internal("no request is being served here")
    return context


def enter(context: RequestContext) -> Token[RequestContext | None]:
    """Makes `context` the current one, until `leave`."""
    return _current.set(context)


def leave(token: Token[RequestContext | None]) -> None:
    _current.reset(token)
