"""Where answers are kept."""

from __future__ import annotations

from typing import Protocol


class ResponseCache(Protocol):
    """Bytes by key, for a while. It may forget anything at any time, and raises nothing: what is lost is a
    miss."""

    async def get(self, key: bytes) -> bytes | None:
        """What was put under the key, unless it has expired or was displaced."""

    async def put(self, key: bytes, value: bytes) -> None:
        """Keeps it, in the place of what was there. A value above the bound on one entry is not kept."""

    @property
    def held_bytes(self) -> int:
        """What this process holds of it in memory."""


class Engines(Protocol):
    """What the replicas compute with now: `services.gateway.routing.Router`."""

    def computes(self, model: str, revision: str, numerics_id: str) -> bool:
        """Whether a replica names this revision of the model and these numerics."""
