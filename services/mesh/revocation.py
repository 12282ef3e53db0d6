"""What auth has revoked, as a service knows it: a list in memory that every credential is checked against.

A revocation of a token refuses that token. One of an API key, a client or a tenant refuses the tokens that
were issued up to a moment: whoever is let in again later works with new tokens. All are forgotten when the
last token that they refuse has ended by itself, so the list stays about as long as what was revoked within
the life of a token.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from services.mesh.clock import Clock
from services.mesh.context import Identity
from services.mesh.errors import CredentialRevoked
from services.mesh.policy import RevocationKind

log = logging.getLogger(__name__)

MAX_ENTRIES = 1_000_000

_WHAT = {
    RevocationKind.TOKEN: "The access token was revoked.",
    RevocationKind.API_KEY: "The API key was revoked.",
    RevocationKind.CLIENT: "The client's credentials were revoked.",
    RevocationKind.TENANT: "The tenant's credentials were revoked.",
}


@dataclass(frozen=True, slots=True)
class Revocation:
    """Refuses what was issued up to a moment."""

    version: int
    """Of the commit that it came with; never falls from one to the next."""
    kind: RevocationKind
    subject_id: str
    """The id of the token (`jti`), API key, client or tenant."""
    revoked_at: datetime
    expires_at: datetime
    """Then the last token that it refuses has ended by itself."""
    cut_streams: bool = False
    """Also ends what runs."""

    def refuses(
        self, *, token_id: str, key_id: str, client_id: str, tenant_id: str, issued_at_s: int
    ) -> bool:
        """Whether it refuses a token of these ids. It is not asked whether it has expired."""
        if self.kind is RevocationKind.TOKEN:
            return token_id == self.subject_id
        ids = {
            RevocationKind.API_KEY: key_id,
            RevocationKind.CLIENT: client_id,
            RevocationKind.TENANT: tenant_id,
        }
        return ids[self.kind] == self.subject_id and issued_at_s <= math.floor(self.revoked_at.timestamp())


@dataclass(frozen=True, slots=True)
class _Entry:
    up_to_s: float
    """Refuses tokens issued up to then; of a token: infinite."""
    end_s: float


class _Table:
    """The entries by kind and id, and the order in which they end."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._ends: list[tuple[float, int, str]] = []
        self.by_kind: dict[RevocationKind, dict[str, _Entry]] = {kind: {} for kind in RevocationKind}

    def __len__(self) -> int:
        return sum(len(entries) for entries in self.by_kind.values())

    def add(self, revocation: Revocation) -> bool:
        """Whether that was news."""
        entries = self.by_kind[revocation.kind]
        up_to_s = math.floor(revocation.revoked_at.timestamp())
        entry = _Entry(
            math.inf if revocation.kind is RevocationKind.TOKEN else up_to_s,
            revocation.expires_at.timestamp(),
        )
        before = entries.get(revocation.subject_id)
        if before is not None:
            # Both hold: a later one covers what an earlier one refuses.
            merged = _Entry(max(before.up_to_s, entry.up_to_s), max(before.end_s, entry.end_s))
            if merged == before:
                return False
            entry = merged
        entries[revocation.subject_id] = entry
        if before is None or before.end_s != entry.end_s:
            heapq.heappush(self._ends, (entry.end_s, revocation.kind.value, revocation.subject_id))
            self._compact()
        if len(self) > self._max_entries:
            log.error("more than %d revocations: the one that ends first is forgotten", self._max_entries)
            self._drop_first()
        return True

    def prune(self, now_s: float) -> None:
        """Drops what has expired."""
        while self._ends and self._ends[0][0] <= now_s:
            self._drop_first()

    def _drop_first(self) -> None:
        while self._ends:
            end_s, kind, subject_id = heapq.heappop(self._ends)
            entries = self.by_kind[RevocationKind(kind)]
            found = entries.get(subject_id)
            if found is not None and found.end_s == end_s:  # else it was prolonged, and stands elsewhere
                del entries[subject_id]
                return

    def _compact(self) -> None:
        """An entry that is prolonged over and over must not fill the order with its past ends."""
        if len(self._ends) > 2 * len(self) + 64:
            self._ends = [
                (entry.end_s, kind.value, subject_id)
                for kind, entries in self.by_kind.items()
                for subject_id, entry in entries.items()
            ]
            heapq.heapify(self._ends)


class RevocationList:
    """Holds at most `max_entries`; past them, those that end first are forgotten, with an error in the log.

    A check costs a few look-ups, however long the list is.
    """

    def __init__(self, clock: Clock, *, max_entries: int = MAX_ENTRIES) -> None:
        self._clock = clock
        self._max_entries = max_entries
        self._table = _Table(max_entries)
        self._bind()
        self._coming: _Table | None = None
        self._news: list[Revocation] = []
        self._version = 0
        self._callbacks: list[Callable[[Revocation], None]] = []
        self.complete = False
        """Whether the whole of it has been received once."""

    def __len__(self) -> int:
        """How many revocations are held."""
        return len(self._table)

    @property
    def version(self) -> int:
        """Of the last answer that was applied."""
        return self._version

    def on_revoked(self, callback: Callable[[Revocation], None]) -> None:
        """`callback` is told of each revocation that is news, once it is in force. It must not raise."""
        self._callbacks.append(callback)

    def apply(self, snapshot: bool, version: int, revocations: Sequence[Revocation]) -> bool:
        """Takes over one answer of `WatchRevocations`; returns whether what came so far is whole.

        A snapshot replaces what was known. One that is too large for an answer goes on in the answers after
        it: it ends with the one whose last revocation is of the answer's `version`, or that has none. Until
        then what was known stays in force.
        """
        if snapshot:
            self._coming, self._news = _Table(self._max_entries), []
            if version < self._version:  # auth's database is another one, or an older state of it
                self._version = 0
        table = self._table if self._coming is None else self._coming
        for revocation in revocations:
            known = revocation.subject_id in self._table.by_kind[revocation.kind]
            added = table.add(revocation)
            if revocation.version > self._version or (added and not known):
                self._news.append(revocation)
        if self._coming is not None:
            if revocations and revocations[-1].version < version:
                return False
            self._table, self._coming = self._coming, None
            self._bind()
            self.complete = True
        self._table.prune(self._clock.now().timestamp())
        self._version = version
        news, self._news = self._news, []
        for revocation in news:
            for callback in self._callbacks:
                callback(revocation)
        return True

    def check(self, *, token_id: str, key_id: str, client_id: str, tenant_id: str, issued_at_s: int) -> None:
        """Raises CredentialRevoked. Empty ids are not looked up.

        `issued_at_s` is in seconds since the epoch; 0 is an identity of which nobody knows when it was
        proven, and counts as revoked as long as a revocation of its key, client or tenant lives.
        """
        if (entry := self._tokens.get(token_id)) is not None:
            self._refuse(RevocationKind.TOKEN, entry, 0)
        if (entry := self._keys.get(key_id)) is not None:
            self._refuse(RevocationKind.API_KEY, entry, issued_at_s)
        if (entry := self._clients.get(client_id)) is not None:
            self._refuse(RevocationKind.CLIENT, entry, issued_at_s)
        if (entry := self._tenants.get(tenant_id)) is not None:
            self._refuse(RevocationKind.TENANT, entry, issued_at_s)

    def check_identity(self, identity: Identity) -> None:
        """As `check`, for what is known of a caller."""
        self.check(
            token_id=identity.token_id,
            key_id=identity.key_id,
            client_id=identity.client_id,
            tenant_id=identity.tenant_id,
            issued_at_s=identity.issued_at_s,
        )

    def _refuse(self, kind: RevocationKind, entry: _Entry, issued_at_s: int) -> None:
        if issued_at_s <= entry.up_to_s and self._clock.now().timestamp() < entry.end_s:
            raise CredentialRevoked(_WHAT[kind])

    def _bind(self) -> None:
        """So that a check does not look for the dicts."""
        self._tokens = self._table.by_kind[RevocationKind.TOKEN]
        self._keys = self._table.by_kind[RevocationKind.API_KEY]
        self._clients = self._table.by_kind[RevocationKind.CLIENT]
        self._tenants = self._table.by_kind[RevocationKind.TENANT]
