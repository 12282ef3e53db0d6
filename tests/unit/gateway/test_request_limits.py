"""The deployment's own limits on a request: each refused by its field's name, before anything is done."""

from __future__ import annotations

from typing import Any

import pytest
from llmos.gateway.v1 import generation_pb2, generation_service_pb2

from services.gateway.request import RequestParser
from services.gateway.settings import GatewaySettings
from services.mesh.errors import RequestInvalid

PARSER = RequestParser(max_tokens_limit=100, max_total_tokens=200, max_prompt_bytes=64, max_messages=2)


def request(messages: int = 1, text: str = "hi", **fields: Any) -> generation_service_pb2.GenerateRequest:
    spec = generation_pb2.GenerationSpec(model="m", **fields)
    for _ in range(messages):
        spec.prompt.chat.messages.add(role="ROLE_USER").content.add(text=text)
    return generation_service_pb2.GenerateRequest(spec=spec)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        pytest.param({"max_tokens": 101}, "spec.max_tokens", id="tokens of a choice"),
        pytest.param({"max_tokens": 67, "n": 3}, "spec.max_tokens", id="tokens of all choices"),
        pytest.param({"n": 3}, "spec.max_tokens", id="tokens that are not named"),
        pytest.param({"messages": 3}, "spec.prompt.chat.messages", id="messages"),
        pytest.param({"text": "x" * 64}, "spec.prompt.chat.messages", id="bytes"),
        pytest.param({"text": "é" * 32}, "spec.prompt.chat.messages", id="bytes of other scripts"),
    ],
)
def test_r16_beyond_a_limit(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestInvalid) as refused:
        PARSER.generation(request(**fields))
    assert [violation.field for violation in refused.value.violations] == [named]
    assert "deployment" in refused.value.message


@pytest.mark.parametrize(
    "fields", [{}, {"max_tokens": 66, "n": 3}, {"max_tokens": 100, "n": 2}, {"messages": 2}]
)
def test_within_the_limits(fields: dict[str, Any]) -> None:
    PARSER.generation(request(**fields))


def test_r16_a_prompt_to_be_counted_has_the_same_limits() -> None:
    counted = generation_service_pb2.CountTokensRequest(model="m", prompt={"text": "x" * 65})
    with pytest.raises(RequestInvalid) as refused:
        PARSER.count_tokens(counted)
    assert [violation.field for violation in refused.value.violations] == ["prompt.text"]


def test_limits_that_contradict_each_other_are_refused_at_start() -> None:
    with pytest.raises(ValueError, match="max_total_tokens"):
        GatewaySettings(max_tokens_limit=100, max_total_tokens=99)
