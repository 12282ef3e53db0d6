"""Resources as messages of llmos/auth/v1/resource.proto, and back."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from llmos.auth.v1 import admin_service_pb2, resource_pb2

from services.auth.administration.resources import Given
from services.auth.store import (
    ApiKey,
    Change,
    ClaimRule,
    Client,
    IdentityProvider,
    Kind,
    Resource,
    Stored,
    Tenant,
)
from services.auth.stores import shapes
from services.mesh import policy_codec
from services.mesh.errors import RequestInvalid, Violation
from services.mesh.policy import FREE_PLAN, AddressRule, Plan, Role

KINDS = {
    resource_pb2.RESOURCE_KIND_TENANT: Kind.TENANT,
    resource_pb2.RESOURCE_KIND_CLIENT: Kind.CLIENT,
    resource_pb2.RESOURCE_KIND_API_KEY: Kind.API_KEY,
    resource_pb2.RESOURCE_KIND_ROLE: Kind.ROLE,
    resource_pb2.RESOURCE_KIND_PLAN: Kind.PLAN,
    resource_pb2.RESOURCE_KIND_ADDRESS_RULE: Kind.ADDRESS_RULE,
    resource_pb2.RESOURCE_KIND_IDENTITY_PROVIDER: Kind.IDENTITY_PROVIDER,
}
_NUMBERS = {kind: number for number, kind in KINDS.items()}
_ETAG = re.compile(r"[0-9]{1,18}")
_DIGEST_BYTES = 32


# -- names, times, etags ---------------------------------------------------------------------------------


def key_of(name: admin_service_pb2.ResourceName) -> shapes.Key:
    return KINDS[name.kind], name.id


def name_message(key: shapes.Key) -> admin_service_pb2.ResourceName:
    return admin_service_pb2.ResourceName(kind=_NUMBERS[key[0]], id=key[1])


def version_of(etag: str, field: str = "resource.etag") -> int | None:
    """The version that an etag names; empty: any. Raises RequestInvalid."""
    if not etag:
        return None
    if _ETAG.fullmatch(etag) is None:
        raise RequestInvalid(
            "The etag is not one of ours.", violations=[Violation(field, "must be an etag as it was read")]
        )
    return int(etag)


def moment_of(timestamp: Timestamp, field: str) -> datetime:
    """Raises RequestInvalid."""
    try:
        return timestamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise RequestInvalid(
            f"`{field}` is out of range.", violations=[Violation(field, "must be a date")]
        ) from None


def paths_of(request: admin_service_pb2.UpdateResourceRequest) -> tuple[str, ...]:
    """The fields that an update changes; none: all. Raises RequestInvalid for a mask that is there and empty:
    it would change nothing, or everything."""
    paths = tuple(dict.fromkeys(request.update_mask.paths))
    if request.HasField("update_mask") and not paths:
        raise RequestInvalid(
            "The field mask names nothing.",
            hint="Name the fields to change, or leave the mask out to change all.",
            violations=[Violation("update_mask", "must name a field")],
        )
    return paths


# -- messages to resources -------------------------------------------------------------------------------


def given_of(message: resource_pb2.Resource, field: str = "resource") -> Given:
    """What an administrator gives; what is made by the server alone is passed over.

    Raises RequestInvalid with the path of the field.
    """
    kind = message.WhichOneof("kind") or ""
    path = f"{field}.{kind}"
    resource: Resource
    match kind:
        case "tenant":
            resource = _tenant_of(message.tenant)
        case "client":
            resource = _client_of(message.client, path)
        case "api_key":
            resource = _api_key_of(message.api_key, path)
        case "role":
            resource = policy_codec.role_of(message.role, path)
        case "plan":
            resource = policy_codec.plan_of(message.plan, path)
        case "address_rule":
            resource = policy_codec.address_rule_of(message.address_rule, path)
        case "identity_provider":
            resource = _provider_of(message.identity_provider)
        case _:
            raise RequestInvalid(
                "No resource was given.", violations=[Violation(field, "must have one of its kinds set")]
            )
    if not all(map(shapes.is_text, shapes.texts(resource))):
        raise RequestInvalid(
            "A text holds a character that cannot be kept.",
            violations=[Violation(path, "must hold no NUL character")],
        )
    return Given(resource, version_of(message.etag, f"{field}.etag"))


def _tenant_of(message: resource_pb2.Tenant) -> Tenant:
    return Tenant(
        tenant_id=message.id,
        parent_id=message.parent_id,
        display_name=message.display_name,
        plan_id=message.plan_id or FREE_PLAN,
        disabled=message.disabled,
    )


def _client_of(message: resource_pb2.Client, field: str) -> Client:
    return Client(
        client_id=message.id,
        tenant_id=message.tenant_id,
        is_user=message.kind == resource_pb2.CLIENT_KIND_USER,
        display_name=message.display_name,
        scopes=frozenset(message.scopes),
        roles=frozenset(message.roles),
        jwks_json=message.jwks_json,
        disabled=message.disabled,
        external_subject=message.external_subject,
        secret_digest=_digest(message.secret_sha256, field),
    )


def _api_key_of(message: resource_pb2.ApiKey, field: str) -> ApiKey:
    expires_at = None
    if message.HasField("expire_time"):
        expires_at = moment_of(message.expire_time, f"{field}.expire_time")
    return ApiKey(
        key_id=message.id,
        client_id=message.client_id,
        prefix=message.prefix,
        digest=_digest(message.secret_sha256, field),
        display_name=message.display_name,
        scopes=frozenset(message.scopes),
        models=tuple(message.models),
        addresses=policy_codec.networks_of(message.addresses, f"{field}.addresses"),
        expires_at=expires_at,
        disabled=message.disabled,
    )


def _provider_of(message: resource_pb2.IdentityProvider) -> IdentityProvider:
    return IdentityProvider(
        provider_id=message.id,
        issuer=message.issuer,
        audience=message.audience,
        tenant_id=message.tenant_id,
        default_roles=frozenset(message.default_roles),
        claim_rules=tuple(ClaimRule(rule.claim, rule.value, rule.role_id) for rule in message.claim_rules),
        disabled=message.disabled,
    )


def _digest(digest: bytes, field: str) -> bytes:
    if len(digest) not in (0, _DIGEST_BYTES):
        name = f"{field}.secret_sha256"
        raise RequestInvalid(
            "A digest is no SHA-256.", violations=[Violation(name, f"must have {_DIGEST_BYTES} bytes")]
        )
    return digest


# -- resources to messages -------------------------------------------------------------------------------


def stored_message(
    stored: Stored, *, is_built_in: bool = False, digests: bool = False
) -> resource_pb2.Resource:
    """As it is read, with its etag and times; without digests unless they are asked for."""
    message = resource_message(stored.resource, digests=digests)
    if is_built_in:
        message.built_in = True
        return message
    message.etag = str(stored.version)
    message.create_time.FromDatetime(stored.created_at)
    message.update_time.FromDatetime(stored.updated_at)
    if stored.last_used_at is not None and isinstance(stored.resource, ApiKey):
        message.api_key.last_use_time.FromDatetime(stored.last_used_at)
    return message


def exported_message(stored: Stored, *, digests: bool) -> resource_pb2.Resource:
    """Without etag and times, so that it can be applied to what has changed since, and elsewhere."""
    return resource_message(stored.resource, digests=digests)


def resource_message(resource: Resource, *, digests: bool = False) -> resource_pb2.Resource:
    """Without digests unless they are asked for."""
    message = resource_pb2.Resource()
    match resource:
        case Tenant():
            message.tenant.CopyFrom(_tenant_message(resource))
        case Client():
            message.client.CopyFrom(_client_message(resource, digests))
        case ApiKey():
            message.api_key.CopyFrom(_api_key_message(resource, digests))
        case Role():
            message.role.CopyFrom(policy_codec.role_message(resource))
        case Plan():
            message.plan.CopyFrom(policy_codec.plan_message(resource))
        case AddressRule():
            message.address_rule.CopyFrom(policy_codec.address_rule_message(resource))
        case IdentityProvider():
            message.identity_provider.CopyFrom(_provider_message(resource))
    return message


def change_message(change: Change) -> admin_service_pb2.ResourceChange:
    message = admin_service_pb2.ResourceChange(
        version=change.version,
        actor=change.actor,
        request_id=change.request_id,
        name=name_message((change.kind, change.resource_id)),
        tenant_id=change.tenant_id,
        note=change.note,
    )
    message.change_time.FromDatetime(change.at)
    if change.before is not None:
        message.before.CopyFrom(resource_message(change.before))
    if change.after is not None:
        message.after.CopyFrom(resource_message(change.after))
    return message


def _tenant_message(tenant: Tenant) -> resource_pb2.Tenant:
    return resource_pb2.Tenant(
        id=tenant.tenant_id,
        parent_id=tenant.parent_id,
        display_name=tenant.display_name,
        plan_id=tenant.plan_id,
        disabled=tenant.disabled,
    )


def _client_message(client: Client, digests: bool) -> resource_pb2.Client:
    return resource_pb2.Client(
        id=client.client_id,
        tenant_id=client.tenant_id,
        kind=resource_pb2.CLIENT_KIND_USER if client.is_user else resource_pb2.CLIENT_KIND_SERVICE,
        display_name=client.display_name,
        scopes=sorted(client.scopes),
        roles=sorted(client.roles),
        jwks_json=client.jwks_json,
        disabled=client.disabled,
        secret_sha256=client.secret_digest if digests else b"",
        external_subject=client.external_subject,
    )


def _api_key_message(key: ApiKey, digests: bool) -> resource_pb2.ApiKey:
    message = resource_pb2.ApiKey(
        id=key.key_id,
        client_id=key.client_id,
        display_name=key.display_name,
        scopes=sorted(key.scopes),
        models=key.models,
        addresses=[str(network) for network in key.addresses],
        disabled=key.disabled,
        prefix=key.prefix,
        secret_sha256=key.digest if digests else b"",
    )
    if key.expires_at is not None:
        message.expire_time.FromDatetime(key.expires_at)
    return message


def _provider_message(provider: IdentityProvider) -> resource_pb2.IdentityProvider:
    return resource_pb2.IdentityProvider(
        id=provider.provider_id,
        issuer=provider.issuer,
        audience=provider.audience,
        tenant_id=provider.tenant_id,
        default_roles=sorted(provider.default_roles),
        claim_rules=[
            resource_pb2.ClaimRule(claim=rule.claim, value=rule.value, role_id=rule.role_id)
            for rule in provider.claim_rules
        ],
        disabled=provider.disabled,
    )
