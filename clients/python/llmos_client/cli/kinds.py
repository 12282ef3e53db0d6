"""Kinds of resources as arguments, and what is shown of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from llmos_client.admin_types import Resource, ResourceKind

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_kind(text: str) -> ResourceKind:
    """`client`, `clients`, `api-key`, `api_key`, `key`."""
    name = text.strip().lower().replace("_", "-").removesuffix("s")
    try:
        return ResourceKind("api-key" if name == "key" else name)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is none of {', '.join(ResourceKind)}") from None


def seconds(text: str) -> int:
    """`90s`, `10m`, `24h`, `7d`; `0`: none."""
    found = re.fullmatch(r"(\d{1,7})([smhd])", text)
    if text == "0":
        return 0
    if found is None:
        raise typer.BadParameter(f"{text!r} is no duration such as 10m, 24h or 7d")
    return int(found[1]) * _UNITS[found[2]]


Kind = Annotated[
    ResourceKind,
    typer.Argument(parser=parse_kind, metavar="KIND", help=f"One of {', '.join(ResourceKind)}."),
]
Id = Annotated[str, typer.Argument(metavar="ID", help="Its id.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, with all that is known.")]

Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="NAME=VALUE", help="A label. May be repeated.", show_default=False),
]


def labels(given: Sequence[str] | None) -> dict[str, str]:
    """Of `NAME=VALUE`s."""
    found: dict[str, str] = {}
    for label in given or ():
        name, equals, value = label.partition("=")
        if not equals:
            raise typer.BadParameter(f"{label!r} must be NAME=VALUE", param_hint="--label")
        found[name] = value
    return found


Columns = Mapping[str, Callable[[Any], str]]


def _joined(values: Sequence[str]) -> str:
    return " ".join(values) or "-"


def _state(message: Any) -> str:
    return "disabled" if message.disabled else "enabled"


def _time(message: Any, field: str) -> str:
    return getattr(message, field).ToJsonString() if message.HasField(field) else "-"


def _effect(message: Any) -> str:
    return {1: "allow", 2: "deny"}.get(message.effect, str(message.effect))


_COLUMNS: Mapping[ResourceKind, Columns] = {
    ResourceKind.TENANT: {
        "ID": lambda one: one.id,
        "PARENT": lambda one: one.parent_id or "-",
        "PLAN": lambda one: one.plan_id,
        "STATE": _state,
        "NAME": lambda one: one.display_name or "-",
    },
    ResourceKind.CLIENT: {
        "ID": lambda one: one.id,
        "TENANT": lambda one: one.tenant_id,
        "KIND": lambda one: "user" if one.kind == 2 else "service",
        "SCOPES": lambda one: _joined(one.scopes),
        "ROLES": lambda one: _joined(one.roles),
        "STATE": _state,
        "NAME": lambda one: one.display_name or "-",
    },
    ResourceKind.API_KEY: {
        "ID": lambda one: one.id,
        "CLIENT": lambda one: one.client_id,
        "PREFIX": lambda one: one.prefix,
        "SCOPES": lambda one: _joined(one.scopes),
        "MODELS": lambda one: _joined(one.models),
        "EXPIRES": lambda one: _time(one, "expire_time"),
        "LAST USED": lambda one: _time(one, "last_use_time"),
        "STATE": _state,
        "NAME": lambda one: one.display_name or "-",
    },
    ResourceKind.ROLE: {
        "ID": lambda one: one.id,
        "TENANT": lambda one: one.tenant_id or "-",
        "SCOPES": lambda one: _joined(one.scopes),
        "RULES": lambda one: str(len(one.rules)),
        "DESCRIPTION": lambda one: one.description or "-",
    },
    ResourceKind.PLAN: {
        "ID": lambda one: one.id,
        "LIMITS": lambda one: str(len(one.limits)),
        "DESCRIPTION": lambda one: one.description or "-",
    },
    ResourceKind.ADDRESS_RULE: {
        "ID": lambda one: one.id,
        "TENANT": lambda one: one.tenant_id or "-",
        "EFFECT": _effect,
        "CIDR": lambda one: one.cidr,
        "DESCRIPTION": lambda one: one.description or "-",
    },
    ResourceKind.IDENTITY_PROVIDER: {
        "ID": lambda one: one.id,
        "ISSUER": lambda one: one.issuer,
        "TENANT": lambda one: one.tenant_id,
        "STATE": _state,
    },
}


def table(kind: ResourceKind, resources: Sequence[Resource]) -> tuple[list[str], list[list[str]]]:
    """(headers, lines)."""
    columns = _COLUMNS[kind]
    messages = [getattr(resource, kind.field) for resource in resources]
    return list(columns), [[show(message) for show in columns.values()] for message in messages]
