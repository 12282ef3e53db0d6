"""Which scope each method needs, for the chain. What is not listed here is denied."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from services.mesh.errors import PolicyDenied
from services.mesh.interceptors import Call

GENERATE = "generate"
READ_MODELS = "models.read"
READ_AUDIT = "audit.read"
SIGNED_IN = ""
"""Any valid credential: a method that answers everybody alike."""

_GATEWAY = "/llmos.gateway.v1."
_PENDING = {
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
    "JobService": (
        "SubmitJob",
        "GetJob",
        "ListJobs",
        "CancelJob",
        "WatchJob",
        "ListDeadLetters",
        "ReplayDeadLetter",
        "DiscardDeadLetter",
    ),
    "PolicyService": ("GetEffectivePolicy",),
}

SCOPES: Mapping[str, str] = {
    f"{_GATEWAY}GenerationService/Generate": GENERATE,
    f"{_GATEWAY}GenerationService/StreamGenerate": GENERATE,
    f"{_GATEWAY}GenerationService/ResumeGenerate": GENERATE,
    f"{_GATEWAY}GenerationService/CancelGenerate": GENERATE,
    f"{_GATEWAY}GenerationService/CountTokens": GENERATE,
    f"{_GATEWAY}ModelService/ListModels": READ_MODELS,
    f"{_GATEWAY}ModelService/GetModel": READ_MODELS,
    "/llmos.logging.v1.AuditService/Search": READ_AUDIT,
    "/llmos.logging.v1.AuditService/Tail": READ_AUDIT,
    # These answer UNIMPLEMENTED so far; the scopes come with them.
    **{
        f"{_GATEWAY}{service}/{method}": SIGNED_IN
        for service, methods in _PENDING.items()
        for method in methods
    },
}


@asynccontextmanager
async def link(call: Call) -> AsyncIterator[None]:
    """The link. It stands inside `audit`, so that a refusal leaves an outcome. Raises ScopeMissing, or
    PolicyDenied for a method that is not listed."""
    scope = SCOPES.get(call.context.method)
    if scope is None:
        raise PolicyDenied("This method is not open to anybody.")
    if scope != SIGNED_IN:
        call.context.identity.require(scope)
    yield
