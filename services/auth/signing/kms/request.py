"""The messages of the plugin protocol KMS v2 of Kubernetes (`k8s.io/kms/apis/v2/api.proto`)."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "v2.KeyManagementService"
_Field = descriptor_pb2.FieldDescriptorProto
_FIELDS: dict[str, tuple[tuple[str, int], ...]] = {
    "EncryptRequest": (("plaintext", _Field.TYPE_BYTES), ("uid", _Field.TYPE_STRING)),
    "EncryptResponse": (("ciphertext", _Field.TYPE_BYTES), ("key_id", _Field.TYPE_STRING)),
    "DecryptRequest": (
        ("ciphertext", _Field.TYPE_BYTES),
        ("uid", _Field.TYPE_STRING),
        ("key_id", _Field.TYPE_STRING),
    ),
    "DecryptResponse": (("plaintext", _Field.TYPE_BYTES),),
}
"""By message; the numbers of the fields count from 1."""
_ANNOTATED = ("EncryptResponse", "DecryptRequest")
"""These have `map<string, bytes> annotations` after that."""


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="kms_v2.proto", package="v2", syntax="proto3")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields, start=1):
            message.field.add(name=field, number=number, type=kind, label=_Field.LABEL_OPTIONAL)
        if name in _ANNOTATED:
            entry = message.nested_type.add(name="AnnotationsEntry")
            entry.options.map_entry = True
            entry.field.add(name="key", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
            entry.field.add(name="value", number=2, type=_Field.TYPE_BYTES, label=_Field.LABEL_OPTIONAL)
            message.field.add(
                name="annotations",
                number=len(fields) + 1,
                type=_Field.TYPE_MESSAGE,
                label=_Field.LABEL_REPEATED,
                type_name=f".v2.{name}.AnnotationsEntry",
            )
    return file


# a pool of our own: another library of this process may have registered the same names
_pool = descriptor_pool.DescriptorPool()
_pool.Add(_file())


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"v2.{name}"))


EncryptRequest = _message("EncryptRequest")
EncryptResponse = _message("EncryptResponse")
DecryptRequest = _message("DecryptRequest")
DecryptResponse = _message("DecryptResponse")
