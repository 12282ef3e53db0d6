"""`llmos admin`: what is there, and changing it."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from llmos.auth.v1 import admin_service_pb2 as pb

from llmos_client import documents
from llmos_client.admin_calls import GENERATE
from llmos_client.admin_types import Resource, ResourceKind
from llmos_client.cli import kinds, terminal
from llmos_client.cli.commands import Client, connected
from llmos_client.cli.kinds import Id, Json, Kind, Labels
from llmos_client.cli.secrets import Keeper, SecretFile

Cut = Annotated[bool, typer.Option("--cut-streams", help="Also end the streams that run with it.")]


@connected
async def get(
    client: Client,
    kind: Kind,
    resource_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Only this one, in full.", show_default=False)
    ] = None,
    tenant: Annotated[str, typer.Option(help="Only of this tenant.", show_default=False)] = "",
    client_id: Annotated[
        str, typer.Option("--client", help="Only keys of this client.", show_default=False)
    ] = "",
    prefix: Annotated[
        str,
        typer.Option(
            help="Only the key with this prefix, the 8 characters after `llmos_`: finds a leaked key.",
            show_default=False,
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Show what there is of a kind, or one resource."""
    if resource_id is not None:
        found = await client.admin.get(kind, resource_id)
        terminal.write(_json(found) if as_json else documents.write([found]))
        return
    resources = await client.admin.list(
        kind, tenant_id=tenant, client_id=client_id, prefix=prefix.removeprefix("llmos_")[:8]
    )
    if as_json:
        for resource in resources:
            terminal.write(_json(resource))
        return
    terminal.rows(*kinds.table(kind, resources))


@connected
async def edit(
    client: Client,
    kind: Kind,
    resource_id: Id,
    changes: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="A field and its new value, in YAML: `--set 'scopes=[generate]'`. May be repeated.",
        ),
    ],
) -> None:
    """Change fields. What another has changed meanwhile is not overwritten."""
    fields: dict[str, str] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or name in fields:
            raise typer.BadParameter(f"{change!r} must be FIELD=VALUE, each field once", param_hint="--set")
        fields[name] = value
    found = await client.admin.get(kind, resource_id)
    paths = documents.edit(found, fields)
    terminal.write(documents.write([await client.admin.update(found, paths)]))


@connected
async def delete(client: Client, kind: Kind, resource_id: Id) -> None:
    """Delete something: a client with its keys; a tenant, role or plan only while nothing refers to it."""
    await client.admin.delete(kind, resource_id)
    terminal.note(f"{kind} {resource_id} was deleted")


@connected
async def disable(client: Client, kind: Kind, resource_id: Id) -> None:
    """Disable a tenant, a client, a key or an identity provider, until it is enabled again."""
    await _set_disabled(client, kind, resource_id, True)


@connected
async def enable(client: Client, kind: Kind, resource_id: Id) -> None:
    """Enable what was disabled or revoked."""
    await _set_disabled(client, kind, resource_id, False)


async def _set_disabled(client: Client, kind: ResourceKind, resource_id: str, disabled: bool) -> None:
    resource = await client.admin.get(kind, resource_id)
    message = getattr(resource, kind.field)
    if "disabled" not in message.DESCRIPTOR.fields_by_name:
        raise typer.BadParameter(f"a {kind} cannot be disabled; delete it", param_hint="KIND")
    message.disabled = disabled
    await client.admin.update(resource, ["disabled"])
    terminal.note(f"{kind} {resource_id} is {'disabled' if disabled else 'enabled'}")


@connected
async def revoke(
    client: Client,
    kind: Annotated[
        ResourceKind | None,
        typer.Argument(
            parser=kinds.parse_kind, metavar="[KIND", help="tenant, client or api-key.", show_default=False
        ),
    ] = None,
    resource_id: Annotated[
        str | None, typer.Argument(metavar="ID]", help="Its id.", show_default=False)
    ] = None,
    token_id: Annotated[
        str | None, typer.Option("--token-id", help="One access token, by its `jti`.", show_default=False)
    ] = None,
    cut_streams: Cut = False,
) -> None:
    """Refuse a tenant, a client, a key or a token from now on, everywhere within seconds."""
    if (kind is None or resource_id is None) == (token_id is None):
        raise typer.BadParameter("name either KIND and ID, or --token-id")
    if token_id is not None:
        await client.admin.revoke_token(token_id, cut_streams=cut_streams)
        terminal.note("the token is refused from now on")
    elif kind is not None and resource_id is not None:
        await client.admin.revoke(kind, resource_id, cut_streams=cut_streams)
        terminal.note(f"{kind} {resource_id} is disabled, and its tokens are refused")


@connected
async def rotate(
    client: Client,
    kind: Kind,
    resource_id: Id,
    overlap: Annotated[
        str, typer.Option(help="How long the old secret works on, such as 24h; 0: not at all.")
    ] = "24h",
    secret_file: SecretFile = None,
) -> None:
    """Make a new secret of a client, or a new key in the place of one."""
    overlap_s = kinds.seconds(overlap)
    with Keeper(secret_file) as keeper:
        keeper.keep(await client.admin.rotate(kind, resource_id, overlap_s=overlap_s))


@connected
async def changes(
    client: Client,
    kind: Annotated[
        ResourceKind | None,
        typer.Argument(
            parser=kinds.parse_kind, metavar="[KIND", help="Only changes of this one.", show_default=False
        ),
    ] = None,
    resource_id: Annotated[
        str | None, typer.Argument(metavar="ID]", help="Its id.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=100_000, help="So many at most.")] = 50,
    as_json: Json = False,
) -> None:
    """Show who has changed what, newest first."""
    found = await client.admin.changes(kind, resource_id or "", limit=limit)
    if as_json:
        for change in found:
            terminal.write(_json(change))
        return
    terminal.rows(
        ("VERSION", "TIME", "WHO", "WHAT", "CHANGE", "REQUEST"), [_change_cells(change) for change in found]
    )


@connected
async def explain(
    client: Client,
    client_id: Annotated[str, typer.Option("--client", help="Whose request it is.", show_default=False)] = "",
    api_key: Annotated[
        str, typer.Option("--api-key-id", help="The id of the key that it is made with.", show_default=False)
    ] = "",
    method: Annotated[str, typer.Option(help="The full gRPC method name.")] = GENERATE,
    model: Annotated[str, typer.Option(help="The model.", show_default=False)] = "",
    task: Annotated[str, typer.Option(help="The task.", show_default=False)] = "",
    address: Annotated[str, typer.Option(help="The caller's address.", show_default=False)] = "",
    at: Annotated[
        datetime | None, typer.Option("--time", help="When; otherwise now.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="How many tokens it asks for.")] = 0,
    labels: Labels = None,
) -> None:
    """Say what policy decides for a request, and by which rule. Nothing is done."""
    if bool(client_id) == bool(api_key):
        raise typer.BadParameter("name either --client or --api-key-id")
    found = await client.admin.explain(
        ResourceKind.CLIENT if client_id else ResourceKind.API_KEY,
        client_id or api_key,
        method=method,
        model=model,
        task=task,
        address=address,
        time=at.astimezone() if at is not None else None,
        max_tokens=max_tokens,
        labels=kinds.labels(labels),
    )
    verdict = "allowed" if found.allowed else "denied"
    terminal.write(f"{verdict} by {found.rule}: {found.explanation}\n")


def _change_cells(change: pb.ResourceChange) -> tuple[str, ...]:
    kind = ResourceKind.named(change.name)
    return (
        str(change.version),
        change.change_time.ToJsonString(),
        change.actor,
        f"{kind} {change.name.id}",
        _summary(change),
        change.request_id or "-",
    )


def _summary(change: pb.ResourceChange) -> str:
    """`created`, `deleted`, or the fields that changed, with what was before and after."""
    if not change.HasField("before"):
        said = "created"
    elif not change.HasField("after"):
        said = "deleted"
    else:
        before, after = _fields(change.before), _fields(change.after)
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        said = ", ".join(f"{name}: {_short(before.get(name))} -> {_short(after.get(name))}" for name in names)
    return ", ".join(part for part in (said, change.note) if part) or "-"


def _fields(resource: Resource) -> dict[str, object]:
    message = getattr(resource, ResourceKind.of(resource).field)
    return dict(MessageToDict(message, preserving_proto_field_name=True))


def _short(value: object) -> str:
    text = "-" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _json(message: Message) -> str:
    return json.dumps(MessageToDict(message, preserving_proto_field_name=True), ensure_ascii=False) + "\n"
