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
- `async_jobs`, `sync_jobs`, `job_calls`: jobs and dead letters, in the same three parts; `job_options`: what
  they are told; `job_types`: what they return.
- `streaming`: what a stream of deltas must obey, event by event.
- `tailing`: what is followed across breaks; `async_following`, `sync_following` do so.
- `retry`: how often a call is tried, when, and for how long in all.
- `errors`: the tree of errors, and how a gRPC status becomes one of them.
- `async_admin`, `sync_admin`, `admin_calls`: administration, in the same three parts.
- `generation_types`, `audit_types`: what is returned; the protobuf message stands beside it in `raw`.
- `admin_types`: kinds of resources; the resources are the protobuf messages themselves.
- `config`, `transport`: where the server is, the credential, TLS, keepalive, trace context.
- `cli`: the command.

Pure and without I/O: everything but what begins with `sync_` and `async_`, `transport` and `cli`. The package
knows the public API (`llmos.gateway.v1`, `llmos.logging.v1`, `llmos.auth.v1`) and nothing of the services
behind it.
"""

from llmos_client.admin_types import MadeResource, Resource, ResourceKind
from llmos_client.async_client import AsyncClient, AsyncStream
from llmos_client.async_following import AsyncAuditTail
from llmos_client.async_jobs import AsyncJobWatch, AsyncReplay
from llmos_client.audit_types import AuditFilter, AuditRecord, Outcome
from llmos_client.calls import GenerateOptions, Prompt, PromptOptions, RawText, StreamOptions
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
from llmos_client.job_options import (
    DeadLetterFilter,
    NewJob,
    ReplayAllOptions,
    ReplayOptions,
    SubmitOptions,
    Work,
)
from llmos_client.job_types import (
    DeadLetter,
    Job,
    JobAttempt,
    JobCounts,
    JobError,
    JobPriority,
    JobRefusal,
    JobResult,
    JobState,
    JobUpdate,
    ReplayedDeadLetter,
    RetryOnFailure,
    SubmittedJobs,
)
from llmos_client.retry import RetryPolicy
from llmos_client.sync_client import Client, Stream
from llmos_client.sync_following import AuditTail
from llmos_client.sync_jobs import JobWatch, Replay
from llmos_client.version import __version__

__all__ = [
    "AsyncAuditTail",
    "AsyncClient",
    "AsyncJobWatch",
    "AsyncReplay",
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
    "DeadLetter",
    "DeadLetterFilter",
    "DeadlineExceeded",
    "Delta",
    "Event",
    "FieldViolation",
    "FinishReason",
    "Finished",
    "GenerateOptions",
    "InvalidRequest",
    "Job",
    "JobAttempt",
    "JobCounts",
    "JobError",
    "JobPriority",
    "JobRefusal",
    "JobResult",
    "JobState",
    "JobUpdate",
    "JobWatch",
    "LlmosError",
    "MadeResource",
    "Message",
    "Model",
    "Moved",
    "NewJob",
    "NotFound",
    "NotImplementedByServer",
    "Outcome",
    "PermissionDenied",
    "Prompt",
    "PromptOptions",
    "RateLimited",
    "RawText",
    "Replay",
    "ReplayAllOptions",
    "ReplayOptions",
    "ReplayedDeadLetter",
    "Resource",
    "ResourceKind",
    "RetryOnFailure",
    "RetryPolicy",
    "Role",
    "ServerError",
    "Started",
    "Stream",
    "StreamBroken",
    "StreamError",
    "StreamIncomplete",
    "StreamOptions",
    "SubmitOptions",
    "SubmittedJobs",
    "TokenCount",
    "ToolCall",
    "ToolCallDelta",
    "Unavailable",
    "Usage",
    "Work",
    "__version__",
]
