"""`llmos admin create`: the common fields as options; everything else by `apply`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from llmos.auth.v1 import policy_pb2, resource_pb2

from llmos_client import documents
from llmos_client.admin_types import Resource
from llmos_client.cli import kinds
from llmos_client.cli.commands import Client, connected
from llmos_client.cli.kinds import Id
from llmos_client.cli.secrets import Keeper, SecretFile

Name = Annotated[str, typer.Option("--name", help="For a person to read.", show_default=False)]
Description = Annotated[str, typer.Option(help="For a person to read.", show_default=False)]
InTenant = Annotated[str, typer.Option("--tenant", help="The tenant that owns it.")]
OfTenant = Annotated[
    str, typer.Option("--tenant", help="Only for this tenant; otherwise for all.", show_default=False)
]
Scopes = Annotated[
    list[str] | None, typer.Option("--scope", help="A scope. May be repeated.", show_default=False)
]
Roles = Annotated[
    list[str] | None, typer.Option("--role", help="A role. May be repeated.", show_default=False)
]


@connected
async def tenant(
    client: Client,
    resource_id: Id,
    parent: Annotated[
        str, typer.Option(help="The organisation that it is a project of.", show_default=False)
    ] = "",
    plan: Annotated[str, typer.Option(help="Its plan.")] = "free",
    name: Name = "",
) -> None:
    """Make a tenant."""
    made = resource_pb2.Tenant(id=resource_id, parent_id=parent, plan_id=plan, display_name=name)
    await _make(client, Resource(tenant=made))


@connected
async def client(
    client: Client,
    resource_id: Id,
    tenant: InTenant,
    scopes: Scopes = None,
    roles: Roles = None,
    is_user: Annotated[bool, typer.Option("--user", help="It is a person, not a program.")] = False,
    jwks_file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Its public keys for private_key_jwt, a JWK Set.",
            show_default=False,
        ),
    ] = None,
    without_secret: Annotated[
        bool, typer.Option("--without-secret", help="Make no secret: it has API keys, or keys of its own.")
    ] = False,
    name: Name = "",
    secret_file: SecretFile = None,
) -> None:
    """Make a client, and its secret."""
    made = resource_pb2.Client(
        id=resource_id,
        tenant_id=tenant,
        kind=resource_pb2.CLIENT_KIND_USER if is_user else resource_pb2.CLIENT_KIND_SERVICE,
        scopes=scopes or (),
        roles=roles or (),
        jwks_json=jwks_file.read_text() if jwks_file is not None else "",
        display_name=name,
    )
    await _make(client, Resource(client=made), without_secret=without_secret, secret_file=secret_file)


@connected
async def api_key(
    client: Client,
    client_id: Annotated[str, typer.Option("--client", help="The client that it is for.")],
    resource_id: Annotated[
        str, typer.Option("--id", help="Its id; otherwise one is made.", show_default=False)
    ] = "",
    scopes: Scopes = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="A model that it may use, `*` for any characters. May be repeated.",
            show_default=False,
        ),
    ] = None,
    addresses: Annotated[
        list[str] | None,
        typer.Option(
            "--address", help="A CIDR block that it may be used from. May be repeated.", show_default=False
        ),
    ] = None,
    expires_in: Annotated[
        str, typer.Option(help="How long it works, such as 90d; otherwise for ever.", show_default=False)
    ] = "",
    name: Name = "",
    secret_file: SecretFile = None,
) -> None:
    """Make an API key, and show it this once."""
    made = resource_pb2.ApiKey(
        id=resource_id,
        client_id=client_id,
        scopes=scopes or (),
        models=models or (),
        addresses=addresses or (),
        display_name=name,
    )
    if expires_in:
        made.expire_time.FromDatetime(datetime.now(UTC) + timedelta(seconds=kinds.seconds(expires_in)))
    await _make(client, Resource(api_key=made), secret_file=secret_file)


@connected
async def role(
    client: Client,
    resource_id: Id,
    tenant: OfTenant = "",
    scopes: Scopes = None,
    rules: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            help="A rule in YAML, such as `{id: small, effect: allow, scopes: [generate]}`.",
            show_default=False,
        ),
    ] = None,
    description: Description = "",
) -> None:
    """Make a role."""
    made = Resource(
        role=policy_pb2.Role(id=resource_id, tenant_id=tenant, scopes=scopes or (), description=description)
    )
    if rules:
        documents.edit(made, {"rules": f"[{', '.join(rules)}]"})
    await _make(client, made)


@connected
async def plan(
    client: Client,
    resource_id: Id,
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            help="A limit in YAML: `{unit: requests_per_minute, scope: tenant, limit: 100}`.",
            show_default=False,
        ),
    ] = None,
    prices: Annotated[
        list[str] | None,
        typer.Option(
            "--price",
            help="A price in YAML, in millionths for a million tokens: `{model: a-model, prompt: 150000, "
            "completion: 600000}`; without `model` for all others.",
            show_default=False,
        ),
    ] = None,
    currency: Annotated[
        str, typer.Option(help="What the prices are in, such as EUR.", show_default=False)
    ] = "",
    description: Description = "",
) -> None:
    """Make a plan; without limits it is unlimited."""
    made = Resource(plan=policy_pb2.Plan(id=resource_id, description=description, currency=currency))
    if limits:
        documents.edit(made, {"limits": f"[{', '.join(limits)}]"})
    if prices:
        documents.edit(made, {"prices": f"[{', '.join(prices)}]"})
    await _make(client, made)


@connected
async def address_rule(
    client: Client,
    resource_id: Id,
    allow: Annotated[str, typer.Option(help="A CIDR block that is let in.", show_default=False)] = "",
    deny: Annotated[str, typer.Option(help="A CIDR block that is kept out.", show_default=False)] = "",
    tenant: OfTenant = "",
    description: Description = "",
) -> None:
    """Make an address rule."""
    if bool(allow) == bool(deny):
        raise typer.BadParameter("give either --allow or --deny")
    made = policy_pb2.AddressRule(
        id=resource_id,
        tenant_id=tenant,
        effect=policy_pb2.EFFECT_ALLOW if allow else policy_pb2.EFFECT_DENY,
        cidr=allow or deny,
        description=description,
    )
    await _make(client, Resource(address_rule=made))


@connected
async def identity_provider(
    client: Client,
    resource_id: Id,
    tenant: InTenant,
    issuer: Annotated[str, typer.Option(help="Its issuer, exactly as in its tokens.")],
    audience: Annotated[str, typer.Option(help="The `aud` that its tokens carry.")],
    roles: Annotated[
        list[str] | None,
        typer.Option("--role", help="A role that all its people get. May be repeated.", show_default=False),
    ] = None,
    claims: Annotated[
        list[str] | None,
        typer.Option(
            "--claim",
            metavar="CLAIM=VALUE:ROLE",
            help="A role for those with a claim: `groups=ml-team:user`. May be repeated.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a corporate identity provider known."""
    made = resource_pb2.IdentityProvider(
        id=resource_id, tenant_id=tenant, issuer=issuer, audience=audience, default_roles=roles or ()
    )
    for claim in claims or ():
        name, equals, rest = claim.partition("=")
        value, colon, role_id = rest.rpartition(":")
        if not equals or not colon:
            raise typer.BadParameter(f"{claim!r} must be CLAIM=VALUE:ROLE", param_hint="--claim")
        made.claim_rules.add(claim=name, value=value, role_id=role_id)
    await _make(client, Resource(identity_provider=made))


async def _make(
    client: Client, resource: Resource, *, without_secret: bool = False, secret_file: Path | None = None
) -> None:
    with Keeper(secret_file) as keeper:
        keeper.keep(await client.admin.create(resource, without_secret=without_secret))


COMMANDS = {
    "tenant": tenant,
    "client": client,
    "api-key": api_key,
    "role": role,
    "plan": plan,
    "address-rule": address_rule,
    "identity-provider": identity_provider,
}
"""By what is made."""
