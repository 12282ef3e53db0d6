"""What is surely valid here is valid for protovalidate; what is sent all day is surely valid."""

from __future__ import annotations

import random
from typing import Any

import protovalidate
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st
from llmos.auth.v1 import token_service_pb2
from llmos.gateway.v1 import generation_pb2, generation_service_pb2, model_service_pb2
from llmos.inference.v1 import inference_service_pb2

from services.mesh.rules import surely_valid

FILES = (generation_service_pb2, generation_pb2, model_service_pb2, inference_service_pb2, token_service_pb2)
KINDS = [
    kind
    for file in (
        generation_service_pb2,
        generation_pb2,
        model_service_pb2,
        inference_service_pb2,
        token_service_pb2,
    )
    for kind in file.DESCRIPTOR.message_types_by_name.values()
]
TEXTS = ("", "a", "echo", "a b", "a\n", "x" * 64, "x" * 65, "\u00e4" * 128, "x" * 300, "y" * 1100)
NUMBERS = (0, 1, 2, 3, 4, 5, 8, 9, 10, 20, 21, 1_000_001)
FLOATS = (0.0, 0.1, 0.05, 1.0, -2.0, 2.0, 2.5, 11.0, 101.0, float("nan"), float("inf"), float("-inf"))


def value(field: FieldDescriptor, random_: random.Random) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        text = random_.choice(TEXTS)
        return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return random_.random() < 0.5
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return random_.choice(FLOATS)
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return random_.randrange(0, 6)
    return random_.choice(NUMBERS)


def filled(kind: Descriptor, random_: random.Random, depth: int = 0) -> Message:
    message: Any = GetMessageClass(kind)()
    share = random_.choice((0.2, 0.5, 0.9))
    for field in kind.fields:
        if random_.random() > share or depth > 4:
            continue
        inner = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            for _ in range(random_.choice((1, 2, 17))):
                key = value(inner.fields_by_name["key"], random_)
                getattr(message, field.name)[key] = value(inner.fields_by_name["value"], random_)
        elif inner is not None:
            for _ in range(random_.choice((1, 2)) if field.is_repeated else 1):
                made = filled(inner, random_, depth + 1)
                target = getattr(message, field.name)
                (target.add() if field.is_repeated else target).CopyFrom(made)
        elif field.is_repeated:
            getattr(message, field.name).extend(
                value(field, random_) for _ in range(random_.choice((1, 2, 17, 65)))
            )
        else:
            setattr(message, field.name, value(field, random_))
    return message


@given(seed=st.integers(0, 2**32))
@settings(max_examples=400, deadline=None)
def test_what_is_surely_valid_is_valid(seed: int) -> None:
    random_ = random.Random(seed)
    message = filled(random_.choice(KINDS), random_)
    if surely_valid(message):
        assert not protovalidate.collect_violations(message)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=400, deadline=None)
def test_a_valid_request_with_one_change(seed: int) -> None:
    random_ = random.Random(seed)
    request = usual()
    parts: list[Any] = [request.spec, request.spec.sampling, request.spec.prompt.chat.messages[0], request]
    part = random_.choice(parts)
    donor = filled(part.DESCRIPTOR, random_)
    for field, _ in donor.ListFields():
        if random_.random() < 0.3:
            part.ClearField(field.name)
            one = type(donor)()
            one.CopyFrom(donor)
            for other in donor.DESCRIPTOR.fields:
                if other.name != field.name:
                    one.ClearField(other.name)
            part.MergeFrom(one)
    if surely_valid(request):
        assert not protovalidate.collect_violations(request)


def usual() -> generation_service_pb2.GenerateRequest:
    spec = generation_pb2.GenerationSpec(model="echo", max_tokens=16, stop=["x"], labels={"team": "a"})
    message = spec.prompt.chat.messages.add(role=generation_pb2.ROLE_USER)
    message.content.add(text="Hello")
    spec.sampling.temperature = 0.5
    return generation_service_pb2.GenerateRequest(spec=spec)


def usual_inside() -> inference_service_pb2.GenerateWholeRequest:
    inner = inference_service_pb2.GenerateRequest(
        request_id="req_1", spec=usual().spec, priority=inference_service_pb2.PRIORITY_INTERACTIVE
    )
    return inference_service_pb2.GenerateWholeRequest(request=inner)


@pytest.mark.parametrize(
    "request_",
    [
        usual(),
        generation_service_pb2.StreamGenerateRequest(spec=usual().spec),
        usual_inside().request,
        usual_inside(),
    ],
    ids=lambda message: message.DESCRIPTOR.name,
)
def test_what_is_sent_all_day_is_surely_valid(request_: Message) -> None:
    assert surely_valid(request_)
    assert not protovalidate.collect_violations(request_)
