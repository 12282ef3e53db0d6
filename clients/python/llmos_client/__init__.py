"""The Python client of llmos: `Client` for threads, `AsyncClient` for asyncio, and the command `llmos`.

    from llmos_client import Client

    with Client("127.0.0.1:50050", model="smollm2-135m-instruct") as client:
        with client.stream("Why is the sky blue?", max_tokens=64) as stream:
            for delta in stream:
                print(delta.text, end="", flush=True)
        print(stream.usage, stream.request_id)

What is where, from the outside in:

- `sync_client`, `async_client`: the two clients. They differ only in how they wait.
- `calls`: what each operation sends and how its answer is read; the same for both clients.
- `streaming`, `tailing`: what a stream of deltas, or of audit records, must obey, event by event.
- `retry`: how often a call is tried, when, and for how long in all.
- `errors`: the tree of errors, and how a gRPC status becomes one of them.
- `async_admin`, `sync_admin`, `admin_calls`: administration, in the same three parts.
- `generation_types`, `audit_types`: what is returned; the protobuf message stands beside it in `raw`.
- `admin_types`: kinds of resources; the resources are the protobuf messages themselves.
- `config`, `transport`: where the server is, the credential, TLS, keepalive, trace context.
- `cli`: the command.

Pure and without I/O: everything but the two clients, `transport` and `cli`. The package knows the public
API (`llmos.gateway.v1`, `llmos.logging.v1`, `llmos.auth.v1`) and nothing of the services behind it.
"""

from llmos_client.admin_types import MadeResource, Resource, ResourceKind
from llmos_client.async_client import AsyncAuditTail, AsyncClient, AsyncStream
from llmos_client.audit_types import AuditFilter, AuditRecord, Outcome
from llmos_client.calls import GenerateOptions, Prompt, RawText, StreamOptions
from llmos_client.config import ClientOptions
from llmos_client.errors import (
    AuthenticationError,
    Cancelled,
    ConfigurationError,
    Conflict,
    DeadlineExceeded,
    FieldViolation,
    InvalidRequest,
    LlmosError,
    NotFound,
    NotImplementedByServer,
    PermissionDenied,
    RateLimited,
    ServerError,
    StreamBroken,
    StreamError,
    StreamIncomplete,
    Unavailable,
)
from llmos_client.generation_types import (
    Choice,
    Completion,
    Delta,
    Event,
    Finished,
    FinishReason,
    Message,
    Model,
    Moved,
    Role,
    Started,
    TokenCount,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from llmos_client.retry import RetryPolicy
from llmos_client.sync_client import AuditTail, Client, Stream
from llmos_client.version import __version__

__all__ = [
    "AsyncAuditTail",
    "AsyncClient",
    "AsyncStream",
    "AuditFilter",
    "AuditRecord",
    "AuditTail",
    "AuthenticationError",
    "Cancelled",
    "Choice",
    "Client",
    "ClientOptions",
    "Completion",
    "ConfigurationError",
    "Conflict",
    "DeadlineExceeded",
    "Delta",
    "Event",
    "FieldViolation",
    "FinishReason",
    "Finished",
    "GenerateOptions",
    "InvalidRequest",
    "LlmosError",
    "MadeResource",
    "Message",
    "Model",
    "Moved",
    "NotFound",
    "NotImplementedByServer",
    "Outcome",
    "PermissionDenied",
    "Prompt",
    "RateLimited",
    "RawText",
    "Resource",
    "ResourceKind",
    "RetryPolicy",
    "Role",
    "ServerError",
    "Started",
    "Stream",
    "StreamBroken",
    "StreamError",
    "StreamIncomplete",
    "StreamOptions",
    "TokenCount",
    "ToolCall",
    "ToolCallDelta",
    "Unavailable",
    "Usage",
    "__version__",
]
