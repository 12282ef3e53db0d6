"""Resources as JSON, as the database keeps them. A field that a later version adds takes its default where
an older row lacks it; bytes are base64, moments ISO 8601.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from services.auth.store import ApiKey, Client, IdentityProvider, Kind, Resource, Tenant
from services.mesh.errors import DataCorrupt
from services.mesh.policy import AddressRule, Plan, Role

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BYTES = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_temporal="iso8601")


def _adapter(cls: type) -> TypeAdapter[tuple[Any]]:
    # a plain dataclass takes no configuration of its own: it follows that of what holds it
    held: Any = tuple.__class_getitem__(cls)
    return TypeAdapter(held, config=_BYTES)


_ADAPTERS: Mapping[Kind, TypeAdapter[tuple[Any]]] = {
    Kind.PLAN: _adapter(Plan),
    Kind.TENANT: _adapter(Tenant),
    Kind.ROLE: _adapter(Role),
    Kind.ADDRESS_RULE: _adapter(AddressRule),
    Kind.IDENTITY_PROVIDER: _adapter(IdentityProvider),
    Kind.CLIENT: _adapter(Client),
    Kind.API_KEY: _adapter(ApiKey),
}


def encode(kind: Kind, resource: Resource) -> str:
    """Its body; sets come in any order."""
    return _ADAPTERS[kind].dump_json((resource,)).decode()


def decode(kind: Kind, body: str) -> Resource:
    """Raises DataCorrupt."""
    try:
        (resource,) = _ADAPTERS[kind].validate_json(body)
    except ValidationError:
        raise DataCorrupt(f"The store of auth is damaged: {kind} that cannot be read.") from None
    return resource  # type: ignore[no-any-return]


def to_us(moment: datetime) -> int:
    """Microseconds since 1970, UTC."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def to_time(us: int) -> datetime:
    """What `to_us` came from."""
    return _EPOCH + timedelta(microseconds=us)
