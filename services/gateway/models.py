"""The models that a caller sees: those of the replicas that policy does not keep from it."""

from __future__ import annotations

from services.gateway.auditing import RequestRecord
from services.gateway.authorisation import Authorisation
from services.gateway.generation import Model
from services.gateway.routing import Router
from services.mesh.errors import ModelNotFound


class Models:
    """Answers about models, for both edges."""

    def __init__(self, router: Router, authorisation: Authorisation) -> None:
        self._router = router
        self._authorisation = authorisation

    async def visible(self, record: RequestRecord) -> tuple[Model, ...]:
        """Sorted by id."""
        found = await self._router.models()
        return tuple(model for model in found if self._may_see(record, model.id))

    async def named(self, record: RequestRecord, model_id: str) -> Model:
        """Raises ModelNotFound, also for a model that is there for others only."""
        found = await self._router.model(model_id)
        if not self._may_see(record, model_id):
            raise ModelNotFound(f"There is no model `{model_id}`.")
        return found

    def _may_see(self, record: RequestRecord, model_id: str) -> bool:
        return self._authorisation.may_see(record.identity, model_id, address=record.source_address)
