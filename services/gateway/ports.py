"""What the gateway's domain needs of the world. `clients` has the gRPC implementations, the mesh's spool is
the audit port, and tests have fakes in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Protocol

from services.gateway.generation import (
    EngineEvent,
    Model,
    TokenCount,
    ValidGeneration,
    ValidPrompt,
    WholeAnswer,
)
from services.mesh.events import RequestEnded, RequestStarted
from services.mesh.tokens import VerifiedToken


class InferencePort(Protocol):
    """One replica of inference."""

    def generate(self, request_id: str, request: ValidGeneration) -> AsyncGenerator[EngineEvent, None]:
        """EngineStarted, then Delta, then Finished. Closing the generator ends the work at the replica.

        Raises ReplicaLost where the replica cannot be reached, or went away; other errors as it raised them.
        """

    async def generate_whole(self, request_id: str, request: ValidGeneration) -> WholeAnswer:
        """The answer in one piece, since nobody reads along. Cancelling ends the work at the replica.

        Raises as `generate` does."""

    async def count_tokens(self, request: ValidPrompt) -> TokenCount:
        """Raises as `generate` does."""

    async def list_models(self) -> tuple[Model, ...]:
        """What this replica has, sorted by id. Raises as `generate` does."""

    async def max_running(self) -> int:
        """How many sequences it runs at once; 1 at least. Raises as `generate` does."""

    async def is_healthy(self) -> bool:
        """Whether the replica says that it serves. Ends within a deadline of its own, and raises nothing."""


class AuthPort(Protocol):
    """The auth service."""

    async def exchange(self, api_key: str) -> str:
        """An access token for the gateway, which stands for the key.

        Raises one of the UNAUTHENTICATED errors for a bad key, DependencyUnavailable where auth does not
        answer."""


class VerifierPort(Protocol):
    """What proves access tokens: `services.mesh.tokens.Verifier`."""

    async def verify(self, token: str) -> VerifiedToken:
        """Raises CredentialInvalid, CredentialExpired, CredentialRevoked or DependencyUnavailable."""


class AuditPort(Protocol):
    """Where the audit log begins. An event is handed over, in order, when the call returns; it is on this
    machine's disk when the future has its result."""

    def append_started(self, event: RequestStarted, *, urgent: bool = True) -> asyncio.Future[None]:
        """The future raises AuditUnavailable where the spool is full and the deployment chose `strict`. One
        that is not urgent is on disk some milliseconds later, where there are many, or when it is hurried."""

    def hurry(self, request_id: str) -> None:
        """Somebody waits for the intent of a request that is not yet on disk."""

    def append_ended(self, event: RequestEnded) -> asyncio.Future[None]:
        """As `append_started`; room is kept for the outcomes of what has begun."""

    def count_anonymous(self, source_address: str, reason: str) -> None:
        """Counts a refusal of someone unknown; never a record of its own."""
