"""Resources as YAML documents, and back: what `llmos admin export` writes and `apply` reads.

A file is a list, or several documents, of mappings such as

    kind: client
    id: app
    tenant_id: acme
    scopes: [generate]

Fields have the names of llmos/auth/v1/resource.proto, save that a client's own `kind` is `client_kind`; enums
are written short: `allow`. The reader is strict, since a misspelt field would silently grant more or
less than was meant: unknown fields, fields that come twice, and YAML's surprises (`yes`, `18:00` as a number,
dates, aliases) are refused or read as text.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message

from llmos_client.admin_types import Resource, ResourceKind
from llmos_client.errors import ConfigurationError

MAX_BYTES = 16 * 1024 * 1024
_MADE_BY_SERVER = {"last_use_time"}
_CLIENT_KIND = "client_kind"


@dataclass(frozen=True)
class Document:
    """A resource, and where it stands."""

    resource: Resource
    line: int
    """From 1."""


def write(resources: Iterable[Resource]) -> str:
    """YAML, one list of all of them."""
    entries = [_entry(resource) for resource in resources]
    if not entries:
        return "[]\n"
    text: str = yaml.dump(entries, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    # a blank line between resources: a person is to read it
    return re.sub(r"\n- kind:", "\n\n- kind:", text)


def read(text: str, source: str) -> list[Document]:
    """Raises ConfigurationError, which names the line, and the resource where it is known."""
    try:
        return [_document(entry, line, source) for entry, line in _entries(text)]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark is not None else source
        raise ConfigurationError(f"{where}: {getattr(error, 'problem', None) or 'this is no YAML'}") from None
    except RecursionError:
        raise ConfigurationError(f"{source}: it is nested too deeply") from None


class _Dumper(yaml.SafeDumper):
    """Escapes line ends that YAML knows and people do not see."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if _LINE_ENDS.search(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_LINE_ENDS = re.compile("[\x85\u2028\u2029\ufeff]")
_Dumper.add_representer(str, _text)


# -- writing ---------------------------------------------------------------------------------------------


def _entry(resource: Resource) -> dict[str, Any]:
    kind = ResourceKind.of(resource)
    message: Message = getattr(resource, kind.field)
    fields = _shortened(MessageToDict(message, preserving_proto_field_name=True), message.DESCRIPTOR)
    for name in _MADE_BY_SERVER:
        fields.pop(name, None)
    if kind is ResourceKind.CLIENT:
        own = fields.pop("kind", "service")
        if own != "service":
            fields[_CLIENT_KIND] = own
    return {"kind": kind.value, **fields}


def _shortened(fields: dict[str, Any], descriptor: Any) -> dict[str, Any]:
    return {name: _short(value, descriptor.fields_by_name[name]) for name, value in fields.items()}


def _short(value: Any, field: FieldDescriptor) -> Any:
    if _is_map(field):
        return value
    if isinstance(value, list):
        return [_short(one, field) for one in value]
    if field.enum_type is not None:
        return value.removeprefix(_prefix(field)).lower()
    if field.message_type is not None and isinstance(value, dict):
        return _shortened(value, field.message_type)
    if field.cpp_type in _INTEGERS:
        return int(value)  # JSON has 64 bits as text
    return value


# -- reading ---------------------------------------------------------------------------------------------


def _document(entry: Any, line: int, source: str) -> Document:
    where = f"{source}, line {line}"
    if not isinstance(entry, dict):
        raise ConfigurationError(f"{where}: a resource is a mapping that begins with `kind`")
    given = entry.pop("kind", None)
    try:
        kind = ResourceKind(str(given).replace("_", "-"))
    except ValueError:
        kinds = ", ".join(kind.value for kind in ResourceKind)
        raise ConfigurationError(
            f"{where}: `kind` must be one of {kinds}" + (f", not {given!r}" if given is not None else "")
        ) from None
    where = f"{where} ({kind.value} {entry.get('id', '')!s})".replace(" )", ")")
    resource = Resource()
    getattr(resource, kind.field).SetInParent()
    _fill(resource, entry, where)
    return Document(resource, line)


def edit(resource: Resource, fields: Mapping[str, str]) -> list[str]:
    """Sets fields of the resource to what is written in YAML (texts as they are), and returns their names for
    an update. Raises ConfigurationError."""
    message: Message = getattr(resource, ResourceKind.of(resource).field)
    entry: dict[str, Any] = {}
    for given, text in fields.items():
        name = "kind" if given == _CLIENT_KIND else given
        field = message.DESCRIPTOR.fields_by_name.get(name)
        is_text = field is not None and field.cpp_type == FieldDescriptor.CPPTYPE_STRING
        if field is not None and is_text and not field.is_repeated:
            entry[given] = text
            continue
        try:
            entry[given] = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader, only stricter)
        except yaml.YAMLError:
            raise ConfigurationError(f"`{given}`: {text!r} is no YAML") from None
    _fill(resource, entry, str(ResourceKind.of(resource)))
    return ["kind" if name == _CLIENT_KIND else name for name in fields]


def _fill(resource: Resource, entry: dict[Any, Any], where: str) -> None:
    kind = ResourceKind.of(resource)
    message: Message = getattr(resource, kind.field)
    allowed = set(message.DESCRIPTOR.fields_by_name) - _MADE_BY_SERVER
    if kind is ResourceKind.CLIENT:
        allowed = allowed - {"kind"} | {_CLIENT_KIND}
    _require_known(entry, allowed, where)
    given = {"kind" if name == _CLIENT_KIND else name: value for name, value in entry.items()}
    for name in given:
        message.ClearField(name)
    try:
        ParseDict(_lengthened(given, message.DESCRIPTOR, where), message)
    except ParseError as error:
        raise ConfigurationError(f"{where}: {error}") from None


def _lengthened(entry: dict[Any, Any], descriptor: Any, where: str) -> dict[str, Any]:
    _require_known(entry, set(descriptor.fields_by_name), where)
    return {
        name: _long(value, descriptor.fields_by_name[name], f"{where}: `{name}`")
        for name, value in entry.items()
        if value is not None
    }


def _require_known(entry: dict[Any, Any], names: set[str], where: str) -> None:
    unknown = sorted(str(name) for name in entry if name not in names)
    if unknown:
        raise ConfigurationError(
            f"{where}: there is no field `{unknown[0]}`; there are "
            + ", ".join(f"`{name}`" for name in sorted(names))
        )


def _long(value: Any, field: FieldDescriptor, where: str, *, is_entry: bool = False) -> Any:
    if _is_map(field):
        if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
            raise ConfigurationError(f"{where} must be a mapping of texts to texts; quote numbers")
        return value
    if field.is_repeated and not is_entry:
        if not isinstance(value, list):
            raise ConfigurationError(f"{where} must be a list")
        return [_long(one, field, f"{where}[{place}]", is_entry=True) for place, one in enumerate(value)]
    if field.enum_type is not None:
        names = {name.removeprefix(_prefix(field)).lower(): name for name in field.enum_type.values_by_name}
        names.pop("unspecified", None)
        if value not in names:
            raise ConfigurationError(f"{where} must be one of {', '.join(names)}")
        return names[value]
    if field.message_type is not None and field.message_type.full_name != "google.protobuf.Timestamp":
        if not isinstance(value, dict):
            raise ConfigurationError(f"{where} must be a mapping")
        return _lengthened(value, field.message_type, where)
    _check_scalar(value, field, where)
    return value


def _check_scalar(value: Any, field: FieldDescriptor, where: str) -> None:
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        if not isinstance(value, bool):
            raise ConfigurationError(f"{where} must be true or false")
    elif field.cpp_type in _INTEGERS:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigurationError(f"{where} must be a whole number")
    elif not isinstance(value, str):
        raise ConfigurationError(f"{where} must be a text; put it in quotes")
    elif field.type == FieldDescriptor.TYPE_BYTES:
        try:
            base64.b64decode(value, validate=True)
        except ValueError:
            raise ConfigurationError(f"{where} must be base64") from None


_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
}


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _prefix(field: Any) -> str:
    """What all values of an enum begin with: `CLIENT_KIND_` of ClientKind."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", field.enum_type.name).upper() + "_"


class _Loader(yaml.SafeLoader):
    """YAML as its core schema has it (1.2, section 10.3), without aliases, and with each key once."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "aliases are not read here: write it out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, "a field's name must be a text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the field `{key}` comes twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _entries(text: str) -> Iterator[tuple[Any, int]]:
    """(resource, line), of a list or of several documents."""
    if len(text) > MAX_BYTES:
        raise ConfigurationError(f"The file is larger than {MAX_BYTES} bytes")
    loader = _Loader(text)
    try:
        while loader.check_node():
            node: Any = loader.get_node()
            nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
            for one in nodes:
                if isinstance(one, yaml.ScalarNode) and one.value in ("", "~", "null"):
                    continue  # an empty document
                yield loader.construct_object(one, deep=True), one.start_mark.line + 1
    finally:
        loader.dispose()
