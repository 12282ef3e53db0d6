"""What administration is about: kinds of resources, and resources with the secret that was made for them.

The resources themselves are the messages of llmos/auth/v1/resource.proto.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from llmos.auth.v1 import admin_service_pb2, resource_pb2

Resource = resource_pb2.Resource


class ResourceKind(StrEnum):
    """What can be administered."""

    TENANT = "tenant"
    CLIENT = "client"
    API_KEY = "api-key"
    ROLE = "role"
    PLAN = "plan"
    ADDRESS_RULE = "address-rule"
    IDENTITY_PROVIDER = "identity-provider"

    @property
    def field(self) -> str:
        """The field of Resource that holds it."""
        return self.value.replace("-", "_")

    @classmethod
    def of(cls, resource: Resource) -> ResourceKind:
        """Raises ValueError where the resource has nothing set."""
        return cls((resource.WhichOneof("kind") or "nothing").replace("_", "-"))

    @classmethod
    def named(cls, name: admin_service_pb2.ResourceName) -> str:
        """The kind of a name, as a text; also of one of a later version of the server."""
        number = name.kind
        found = {to_number(kind): kind.value for kind in cls}
        return found.get(number, f"kind {number}")


def to_number(kind: ResourceKind) -> resource_pb2.ResourceKind.ValueType:
    """As the protocol has it."""
    return resource_pb2.ResourceKind.Value(f"RESOURCE_KIND_{kind.name}")


def name_of(kind: ResourceKind, resource_id: str) -> admin_service_pb2.ResourceName:
    return admin_service_pb2.ResourceName(kind=to_number(kind), id=resource_id)


def id_of(resource: Resource) -> str:
    """The id of what the resource holds."""
    found: str = getattr(resource, ResourceKind.of(resource).field).id
    return found


@dataclass(frozen=True)
class MadeResource:
    """A resource, with what was made for it."""

    resource: Resource
    secret: str = field(repr=False)
    """The secret of a client, or the API key; it cannot be read again. Empty: none was made."""
