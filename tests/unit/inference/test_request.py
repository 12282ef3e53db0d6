"""Messages to the engine's types and back."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message
from llmos.common.v1 import finish_reason_pb2
from llmos.gateway.v1 import generation_pb2, model_service_pb2
from llmos.inference.v1 import fleet_service_pb2, inference_service_pb2

from services.inference import request as requests
from services.inference.engine import port
from services.inference.engine.port import (
    Alternative,
    Capability,
    Delta,
    Finished,
    FinishReason,
    ModelInfo,
    Priority,
    Role,
    Started,
    TokenLogprob,
    Usage,
)
from services.mesh.errors import NotImplementedYet, RequestInvalid
from services.mesh.validation import validate

USER = generation_pb2.ROLE_USER


def spec(**fields: object) -> generation_pb2.GenerationSpec:
    prompt = generation_pb2.Prompt(text="Hello")
    return generation_pb2.GenerationSpec(**({"model": "m", "prompt": prompt} | fields))  # type: ignore[arg-type]


def parse(found: generation_pb2.GenerationSpec, **fields: object) -> requests.GenerationRequest:
    message = inference_service_pb2.GenerateRequest(request_id="req_1", spec=found, **fields)  # type: ignore[arg-type]
    return requests.parse_generate(message, tenant="acme", timeout_s=2.5)


def chat(*messages: generation_pb2.ChatMessage) -> generation_pb2.Prompt:
    return generation_pb2.Prompt(chat=generation_pb2.Chat(messages=messages))


def said(role: generation_pb2.Role.ValueType, *texts: str, **fields: object) -> generation_pb2.ChatMessage:
    parts = [generation_pb2.ContentPart(text=text) for text in texts]
    return generation_pb2.ChatMessage(role=role, content=parts, **fields)  # type: ignore[arg-type]


def test_what_is_not_set_is_left_to_the_model() -> None:
    parsed = parse(spec())
    assert (parsed.n, parsed.max_tokens, parsed.timeout_s, parsed.tenant) == (1, None, 2.5, "acme")
    assert parsed.delivered == ()
    sampling = parsed.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (None,) * 4
    assert sampling.repetition_penalty is None


def test_everything_that_is_set_arrives() -> None:
    sampling = generation_pb2.SamplingParams(
        temperature=0,
        top_p=0.5,
        top_k=0,
        min_p=0.25,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        seed=2**64 - 1,
        logit_bias={9: 2.0, 3: -1.5},
    )
    parsed = parse(
        spec(
            sampling=sampling,
            max_tokens=7,
            stop=["a", "b"],
            stop_token_ids=[5],
            n=3,
            logprobs=True,
            top_logprobs=2,
            ignore_eos=True,
        )
    )
    found = parsed.sampling
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.0, 0.5, 0, 0.25)
    assert (found.presence_penalty, found.frequency_penalty, found.repetition_penalty) == (0.5, -0.5, 1.5)
    assert found.seed == 2**64 - 1
    assert found.logit_bias == ((3, -1.5), (9, 2.0))
    assert (parsed.max_tokens, parsed.stop, parsed.stop_token_ids) == (7, ("a", "b"), (5,))
    assert (parsed.n, parsed.logprobs, parsed.top_logprobs, parsed.ignore_eos) == (3, True, 2, True)


def test_what_was_delivered_arrives() -> None:
    delivered = [{"token_ids": [5, 6]}, {}]
    assert parse(spec(n=2), delivered=delivered).delivered == ((5, 6), ())


def test_a_priority_arrives_and_none_is_interactive() -> None:
    """A gateway of the version before sends none."""
    assert parse(spec()).priority is Priority.INTERACTIVE
    given = inference_service_pb2.PRIORITY_INTERACTIVE, inference_service_pb2.PRIORITY_BATCH
    assert [parse(spec(), priority=each).priority for each in given] == [
        Priority.INTERACTIVE,
        Priority.BATCH,
    ]


@pytest.mark.parametrize(
    ("n", "entries", "fits"),
    [(0, 0, True), (0, 1, True), (1, 2, False), (2, 1, False), (2, 2, True), (8, 8, True)],
)
def test_delivered_has_an_entry_for_each_choice_or_none(n: int, entries: int, fits: bool) -> None:
    message = inference_service_pb2.GenerateRequest(request_id="r", spec=spec(n=n), delivered=[{}] * entries)
    if fits:
        validate(message)
    else:
        with pytest.raises(RequestInvalid, match="one entry for each choice"):
            validate(message)


@pytest.mark.parametrize(
    "message",
    [
        inference_service_pb2.GenerateRequest(request_id="r", spec=spec(), priority=9),  # type: ignore[arg-type]
        inference_service_pb2.GenerateRequest(request_id="r", spec=spec(), after_seq=2**63),
        fleet_service_pb2.WatchLoadRequest(min_interval_ms=9),
        fleet_service_pb2.WatchLoadRequest(heartbeat_ms=60_001),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_refused(message: Message) -> None:
    with pytest.raises(RequestInvalid):
        validate(message)


def test_the_pace_of_a_watch_has_defaults() -> None:
    assert requests.parse_watch(fleet_service_pb2.WatchLoadRequest()) == (0.1, 1.0)
    given = fleet_service_pb2.WatchLoadRequest(min_interval_ms=2000, heartbeat_ms=50)
    assert requests.parse_watch(given) == (2.0, 2.0)


def test_a_conversation_arrives_with_its_parts_joined() -> None:
    prompt = chat(
        said(generation_pb2.ROLE_SYSTEM, "Be brief."),
        said(USER, "What ", "is red?"),
        said(generation_pb2.ROLE_ASSISTANT, "A colour."),
    )
    assert parse(spec(prompt=prompt)).prompt.messages == (
        port.Message(Role.SYSTEM, "Be brief."),
        port.Message(Role.USER, "What is red?"),
        port.Message(Role.ASSISTANT, "A colour."),
    )


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tools": [generation_pb2.Tool(name="search")]}, "spec.tools"),
        (
            {"response_format": generation_pb2.ResponseFormat(json_object={})},
            "spec.response_format",
        ),
        ({"prompt": chat(said(USER, "a"), said(generation_pb2.ROLE_TOOL, "b"))}, "messages[1].tool_calls"),
        ({"prompt": chat(said(USER, "a", name="Ada"))}, "messages[0].name"),
    ],
)
def test_what_comes_later_is_refused_by_name(fields: dict[str, object], name: str) -> None:
    with pytest.raises(NotImplementedYet) as refused:
        parse(spec(**fields))
    assert refused.value.metadata["field"].endswith(name)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestInvalid):
        requests.parse_prompt(generation_pb2.Prompt(), "prompt")


def test_events_become_messages() -> None:
    started = requests.event_message(Started("rev", "num", True, 9, 4), seq=0, replica="inference-0").started
    assert (started.model_revision, started.numerics_id, started.exact_replay) == ("rev", "num", True)
    assert (started.prompt_tokens, started.cached_prompt_tokens) == (9, 4)
    assert started.replica == "inference-0"

    logprob = TokenLogprob(Alternative(5, b"a", -0.5), (Alternative(6, b"b", -1.5),))
    delta = requests.event_message(Delta(1, "a", (5,), (logprob,)), seq=4, replica="r").delta
    assert (delta.seq, delta.choice_index, delta.text, list(delta.token_ids)) == (4, 1, "a", [5])
    assert (delta.logprobs[0].chosen.token, delta.logprobs[0].top[0].token_id) == (b"a", 6)

    reasons = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.END_OF_SEQUENCE)
    finished = requests.event_message(Finished(reasons, Usage(9, 4)), seq=4, replica="r").finished
    assert [(end.index, end.finish_reason) for end in finished.choices] == [
        (0, finish_reason_pb2.FINISH_REASON_STOP),
        (1, finish_reason_pb2.FINISH_REASON_LENGTH),
        (2, finish_reason_pb2.FINISH_REASON_END_OF_SEQUENCE),
    ]
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (9, 4)


def test_a_model_is_described() -> None:
    info = ModelInfo("m", "rev", 512, (Capability.CHAT, Capability.GENERATE), ready=True)
    message = requests.model_message(info)
    assert (message.id, message.revision, message.context_tokens, message.ready) == ("m", "rev", 512, True)
    assert list(message.capabilities) == [
        model_service_pb2.MODEL_CAPABILITY_GENERATE,
        model_service_pb2.MODEL_CAPABILITY_CHAT,
    ]
