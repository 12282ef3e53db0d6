"""What each method is, for policy: the scope that it needs. A method that is not listed is denied to all.

The HTTP edge's routes stand for gRPC methods and are listed by their names. The matrix of all methods by all
credentials is in tests/e2e/access_matrix.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.mesh.policy import ADMIN, TENANT_ADMIN

GENERATE = "generate"
READ_MODELS = "models.read"
READ_AUDIT = "audit.read"


@dataclass(frozen=True, slots=True)
class Action:
    """What a caller does by calling a method."""

    method: str
    """The full gRPC name: `/package.Service/Method`."""
    scopes: tuple[str, ...]
    """One of them is needed; none: any valid credential will do."""
    per_request: bool = False
    """Its rules may depend on what is asked for, so that it is decided again when the request is parsed."""
    by_scopes: bool = False
    """What it does depends on the caller's further scopes, which may hang on conditions too: whoever does it
    is told only of those that policy allows at that moment."""


_GATEWAY = "/llmos.gateway.v1."
_ADMIN = "/llmos.auth.v1.AdminService/"
_SIGNED_IN = {
    "EmbeddingService": ("Embed",),
    "TaskService": (
        "Classify",
        "AnalyzeSentiment",
        "ExtractEntities",
        "Summarize",
        "Translate",
        "AnswerQuestion",
        "GenerateCode",
    ),
    "PolicyService": ("GetEffectivePolicy",),
}
"""These answer UNIMPLEMENTED so far, save the last; the scopes come with them."""
_JOBS = (
    "SubmitJob",
    "SubmitJobs",
    "GetJob",
    "ListJobs",
    "CountJobs",
    "CancelJob",
    "WatchJob",
    "ListDeadLetters",
    "ReplayDeadLetter",
    "ReplayDeadLetters",
    "DiscardDeadLetter",
)
_ADMINISTRATION = (
    "CreateResource",
    "GetResource",
    "ListResources",
    "UpdateResource",
    "DeleteResource",
    "RotateSecret",
    "Revoke",
    "ListChanges",
    "ExplainDecision",
    "ExportConfiguration",
    "ApplyConfiguration",
)

ACTIONS: Mapping[str, Action] = {
    action.method: action
    for action in (
        Action(f"{_GATEWAY}GenerationService/Generate", (GENERATE,), per_request=True),
        Action(f"{_GATEWAY}GenerationService/StreamGenerate", (GENERATE,), per_request=True),
        Action(f"{_GATEWAY}GenerationService/ResumeGenerate", (GENERATE,)),
        Action(f"{_GATEWAY}GenerationService/CancelGenerate", (GENERATE,)),
        Action(f"{_GATEWAY}GenerationService/CountTokens", (GENERATE,), per_request=True),
        Action(f"{_GATEWAY}ModelService/ListModels", (READ_MODELS,)),
        Action(f"{_GATEWAY}ModelService/GetModel", (READ_MODELS,)),
        Action("/llmos.logging.v1.AuditService/Search", (READ_AUDIT,), by_scopes=True),
        Action("/llmos.logging.v1.AuditService/Tail", (READ_AUDIT,), by_scopes=True),
        *(Action(f"{_GATEWAY}JobService/{method}", (GENERATE,), by_scopes=True) for method in _JOBS),
        *(Action(_ADMIN + method, (ADMIN, TENANT_ADMIN), by_scopes=True) for method in _ADMINISTRATION),
        *(
            Action(f"{_GATEWAY}{service}/{method}", ())
            for service, methods in _SIGNED_IN.items()
            for method in methods
        ),
    )
}
GET_JWKS = "/llmos.auth.v1.TokenService/GetJwks"
"""The only open method whose request holds no credential."""
OPEN_METHODS = frozenset(
    f"/llmos.auth.v1.TokenService/{method}"
    for method in ("IssueToken", "ExchangeToken", "IntrospectToken", "RevokeToken", "GetJwks")
)
"""At the gateway and at auth these need no credential of the call: the request itself holds one, or the
answer is public."""
