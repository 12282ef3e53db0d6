"""Who may call: the gateway, and nobody else. No method is open."""

from __future__ import annotations

from collections.abc import Mapping

from services.mesh.context import Caller
from services.mesh.errors import PolicyDenied
from services.mesh.interceptors import Authenticator
from services.mesh.tokens import GATEWAY

GENERATE_WHOLE = "/llmos.inference.v1.InferenceService/GenerateWhole"
GENERATE_MANY = "/llmos.inference.v1.InferenceService/GenerateMany"
WATCHES = frozenset(
    {"/llmos.inference.v1.FleetService/WatchLoad", "/llmos.inference.v1.InferenceService/WatchDeltas"}
)
"""Methods that last as long as the gateway likes: the drain ends them at once."""


class GatewayOnly:
    """An authenticator around that of services."""

    def __init__(self, services: Authenticator) -> None:
        self._services = services

    async def __call__(self, method: str, metadata: Mapping[str, str | bytes], source_address: str) -> Caller:
        """Raises what the inner one raises, and PolicyDenied for another service."""
        caller = await self._services(method, metadata, source_address)
        if caller.peer_service != GATEWAY:
            raise PolicyDenied("The inference service answers the gateway only.")
        return caller
