"""What the worker and the kinds of jobs have between them, and what they need of the world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.gateway.generation import Generation, ValidGeneration
from services.gateway.jobs.ports import JobClaim, Report
from services.mesh.context import Identity
from services.mesh.jobs import JobRequested


@dataclass(slots=True)
class Attempt:
    """A claimed job at work. Its runner fills in how far it is."""

    claim: JobClaim
    request_id: str
    """The attempt's own; the audit log has it by this."""
    waits: bool = False
    """It has no place at a model yet, but will want one."""
    progress_tokens: int = 0
    texts: Sequence[Sequence[str]] = ()
    """What there is of the answer, in pieces, for each choice."""

    @property
    def job(self) -> JobRequested:
        return self.claim.scheduled.job


class Runner(Protocol):
    """What one kind of job does."""

    async def run(self, attempt: Attempt) -> Report:
        """One attempt. An error that leaves it is a fault of ours, and counts as an attempt. When it is
        cancelled, it leaves nothing behind that still works."""


class RenewalPort(Protocol):
    """Auth, as it judges stored identities."""

    async def renew(self, identity: Identity) -> str:
        """An access token. Raises one of the UNAUTHENTICATED errors where whoever it was may act no more,
        DependencyUnavailable where auth does not answer."""


@dataclass(frozen=True, slots=True)
class Work:
    """What was sealed with a job of kind REQUEST."""

    request: ValidGeneration
    source_address: str
    """That it was submitted from."""


@dataclass(frozen=True, slots=True)
class WebhookTarget:
    """Whom to tell."""

    url: str
    secret: str


class Payloads(Protocol):
    """Reads and writes what is sealed."""

    def work(self, plaintext: bytes, job: JobRequested) -> Work:
        """Raises DataCorrupt where it is no such payload, RequestInvalid or NotImplementedYet where it asks
        for what this gateway does not serve."""

    def webhook(self, plaintext: bytes) -> WebhookTarget:
        """Raises DataCorrupt where it names none."""

    def result(self, generation: Generation) -> bytes: ...

    def partial(self, texts: Sequence[str]) -> bytes: ...
