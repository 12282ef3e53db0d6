"""What a request asks of the capacity."""

from __future__ import annotations

from msgspec import Struct

from services.gateway.generation import Priority


class Claim(Struct, frozen=True):
    """One request, as far as admission is concerned."""

    model: str
    tenant_id: str
    key: str
    """The API key, or the client where there is none."""
    tokens: int
    """An estimate over the prompt and all choices: what fairness counts. 1 at least."""
    sequences: int
    """The places it takes: one for each choice."""
    deadline_s: float
    """On the monotonic clock."""
    priority: Priority = Priority.INTERACTIVE
