"""What policy decides for a request that nobody makes: asked by an administrator, decided by the function
that decides real ones."""

from __future__ import annotations

from msgspec import structs

from services.auth.administration.authority import reach, roles_of
from services.auth.administration.callers import By, administrator
from services.auth.administration.resources import there_is_no
from services.auth.store import ApiKey, Client, Kind, Owned, Store
from services.auth.stores import shapes
from services.mesh.actions import ACTIONS, OPEN_METHODS
from services.mesh.clock import Clock
from services.mesh.context import Identity
from services.mesh.decision import Decision, Facts, PolicyEngine
from services.mesh.errors import RequestInvalid, Violation
from services.mesh.policy import Role


class Explanation:
    """Answers ExplainDecision."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def explain(self, by: By, subject: shapes.Key, method: str, facts: Facts) -> Decision:
        """Raises NotFound for a subject that does not exist for whoever asks."""
        now = self._clock.now()
        asking = await administrator(self._store, by.identity, now)
        if subject[0] not in (Kind.CLIENT, Kind.API_KEY):
            raise RequestInvalid(
                "Requests are made by clients and API keys.",
                violations=[Violation("subject.kind", "must be a client or an API key")],
            )
        key, owned = await self._subject(subject)
        if owned is None or not asking.sees(owned.client, owned.tenant.tenant_id):
            there_is_no(subject)
        version, document = await self._store.policy()
        refused = _no_token(owned, key, facts)
        if refused is not None:
            return refused
        if method in OPEN_METHODS:
            return Decision(True, "open", "The method is open: the request itself holds a credential.")
        action = ACTIONS.get(method)
        if action is None:
            return Decision(
                False, "default", "There is no such method for callers; what is not named is denied."
            )
        roles = {role.role_id: role for role in document.roles}
        identity = identity_of(owned, key, roles)
        return PolicyEngine(document, version).decide(identity, action, facts)

    async def _subject(self, subject: shapes.Key) -> tuple[ApiKey | None, Owned | None]:
        client_id, key = subject[1], None
        if subject[0] is Kind.API_KEY:
            stored = await self._store.get(*subject)
            if stored is None or not isinstance(stored.resource, ApiKey):
                return None, None
            key = stored.resource
            client_id = key.client_id
        return key, await self._store.find_client(client_id)


def identity_of(owned: Owned, key: ApiKey | None, roles: dict[str, Role]) -> Identity:
    """What a token says that was issued now to the client, or for the key, with all scopes that there are."""
    client: Client = owned.client
    scopes = reach(client, owned.tenant, roles)
    held_roles = frozenset(role.role_id for role in roles_of(client, owned.tenant, roles))
    identity = Identity(
        owned.tenant.tenant_id,
        client.client_id,
        scopes=scopes,
        roles=held_roles,
        direct_scopes=client.scopes & scopes if held_roles else None,
    )
    if key is None:
        return identity
    held = scopes & (key.scopes or scopes)
    return structs.replace(
        identity,
        key_id=key.key_id,
        scopes=held,
        direct_scopes=None if identity.direct_scopes is None else identity.direct_scopes & held,
        models=key.models,
        addresses=key.addresses,
    )


def _no_token(owned: Owned, key: ApiKey | None, facts: Facts) -> Decision | None:
    """Where the subject gets no token at all."""
    what = None
    if owned.organisation is not None and owned.organisation.disabled:
        what = shapes.named((Kind.TENANT, owned.organisation.tenant_id))
    elif owned.tenant.disabled:
        what = shapes.named((Kind.TENANT, owned.tenant.tenant_id))
    elif owned.client.disabled:
        what = shapes.named((Kind.CLIENT, owned.client.client_id))
    elif key is not None and key.disabled:
        what = shapes.named((Kind.API_KEY, key.key_id))
    if what is not None:
        return Decision(False, "disabled", f"The {what} is disabled: its credentials are not accepted.")
    if key is not None and key.expires_at is not None and key.expires_at <= facts.at:
        return Decision(
            False, "expired", f"The {shapes.named((Kind.API_KEY, key.key_id))} has expired by then."
        )
    return None
