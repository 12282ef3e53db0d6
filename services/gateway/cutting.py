"""Ends what runs for somebody whose credential was revoked, where the revocation asks for that."""

from __future__ import annotations

import asyncio
from typing import Any

from services.mesh.context import Identity
from services.mesh.errors import CredentialRevoked
from services.mesh.interceptors import Call, Rest
from services.mesh.revocation import Revocation, RevocationList


class RunningCredentials:
    """The calls that run, with whom each is for; as many as `RunningCalls` lets in.

    A call that is cut ends as if the credential had been refused, so its audit record says why. A revocation
    that cuts nothing lets them end by themselves.
    """

    def __init__(self, revoked: RevocationList) -> None:
        self._revoked = revoked
        self._identities: dict[asyncio.Task[Any], Identity] = {}
        self._cut: set[asyncio.Task[Any]] = set()
        revoked.on_revoked(self._on_revoked)

    def __len__(self) -> int:
        return len(self._identities)

    async def link(self, call: Call, rest: Rest) -> None:
        """The link. It stands inside `audit`, so that the outcome is that of the cut.

        Raises CredentialRevoked, also where the revocation came while the call passed the links before.
        """
        identity = call.context.caller.identity
        if identity is None:  # an open method: nobody's
            await rest(call)
            return
        task = call.task
        self._identities[task] = identity
        try:
            self._revoked.check_identity(identity)
            await rest(call)
        except asyncio.CancelledError:
            if task not in self._cut:
                raise
            task.uncancel()
            raise CredentialRevoked("The credential was revoked while the request was served.") from None
        finally:
            del self._identities[task]
            self._cut.discard(task)

    def _on_revoked(self, revocation: Revocation) -> None:
        if not revocation.cut_streams:
            return
        for task, identity in self._identities.items():
            if task not in self._cut and revocation.refuses(
                token_id=identity.token_id,
                key_id=identity.key_id,
                client_id=identity.client_id,
                tenant_id=identity.tenant_id,
                issued_at_s=identity.issued_at_s,
            ):
                self._cut.add(task)
                task.cancel()
