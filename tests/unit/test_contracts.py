"""The contracts keep what they promise: limits on everything, no meaning in zeros, current documents."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import protovalidate
from buf.validate import validate_pb2
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, FileDescriptor

from services.mesh import errors

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"

UNLIMITED = {
    "llmos.gateway.v1.SamplingParams.seed": "every number is a seed",
    "llmos.gateway.v1.SamplingParams.logit_bias.key": "a token id; the engine knows its vocabulary",
    "llmos.gateway.v1.TaskOptions.seed": "every number is a seed",
    "llmos.gateway.v1.GenerationSpec.stop_token_ids": "token ids; the engine knows its vocabulary",
    "llmos.gateway.v1.TokenIds.ids": "token ids; the engine knows its vocabulary",
    "llmos.gateway.v1.ResumeGenerateRequest.after_seq": "a place; one after the end gives nothing",
    "llmos.inference.v1.DeliveredChoice.token_ids": "token ids; the engine knows its vocabulary",
    "llmos.logging.v1.TailRequest.after_position": "a place; one after the end gives nothing",
    "llmos.logging.v1.SyncProducerRequest.epoch": "counts lives of a spool, from 1",
    "llmos.logging.v1.EventPlace.epoch": "counts lives of a spool, from 1",
    "llmos.logging.v1.EventPlace.sequence": "counts events, from 1",
    "llmos.logging.v1.HeldEpoch.epoch": "counts lives of a spool, from 1",
    "llmos.logging.v1.HeldEpoch.floor_sequence": "counts events, from 1",
    "llmos.logging.v1.HeldEpoch.last_sequence": "counts events, from 1",
}
"""Fields of requests without an upper limit, each with the reason why it needs none."""

ZERO_IS_NOT_SET = {
    "llmos.auth.v1.Client.kind": "a client is a program where nothing else is said",
    "llmos.auth.v1.PlanLimit.period": "only budgets have one",
    "llmos.inference.v1.GenerateRequest.priority": "a gateway of before there were priorities sends none",
    "llmos.logging.v1.RequestFilter.outcome": "a filter's fields that are not set do not filter",
    "llmos.logging.v1.DeadLetterFilter.error_reason": "a filter's fields that are not set do not filter",
    "llmos.gateway.v1.DeadLetterFilter.error_reason": "a filter's fields that are not set do not filter",
    "llmos.gateway.v1.SubmitJobRequest.priority": "a job is as urgent as others where nothing else is said",
}
"""Enum fields of requests that do not refuse zero."""

INTEGERS = {
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
}
FLOATS = {FieldDescriptor.TYPE_FLOAT: "float", FieldDescriptor.TYPE_DOUBLE: "double"}
TIMES = {"google.protobuf.Timestamp": "timestamp", "google.protobuf.Duration": "duration"}


def load() -> list[FileDescriptor]:
    """The descriptors of all protos, by their generated modules."""
    files = sorted((PROTOS / "llmos").rglob("*.proto"))
    modules = [path.relative_to(PROTOS).with_suffix("").as_posix().replace("/", ".") for path in files]
    return [importlib.import_module(f"{module}_pb2").DESCRIPTOR for module in modules]


FILES = load()


def messages() -> Iterator[Descriptor]:
    def nested(message: Descriptor) -> Iterator[Descriptor]:
        yield message
        for inner in message.nested_types:
            yield from nested(inner)

    for file in FILES:
        for message in file.message_types_by_name.values():
            yield from nested(message)


def enums() -> Iterator[EnumDescriptor]:
    for file in FILES:
        yield from file.enum_types_by_name.values()
    for message in messages():
        yield from message.enum_types


def reachable(roots: list[Descriptor]) -> list[Descriptor]:
    """The messages of ours that a request can hold."""
    seen: dict[str, Descriptor] = {}
    queue = list(roots)
    while queue:
        message = queue.pop()
        if message.full_name in seen or message.file.package == "google.protobuf":
            continue
        seen[message.full_name] = message
        queue += [field.message_type for field in message.fields if field.message_type is not None]
    return [m for m in seen.values() if not m.GetOptions().map_entry]


def requests() -> list[Descriptor]:
    services = [service for file in FILES for service in file.services_by_name.values()]
    return reachable([method.input_type for service in services for method in service.methods])


def rules_of(field: FieldDescriptor) -> Any:
    return field.GetOptions().Extensions[validate_pb2.field]


def has_top(rules: Any) -> bool:
    return any(rules.HasField(name) for name in ("lt", "lte", "const"))


def bounded_pattern(pattern: str) -> bool:
    """Whether a pattern, which matches anywhere unless it is anchored, limits the length of a text."""
    if not (pattern.startswith("^") and pattern.endswith("$")):
        return False
    return re._parser.parse(pattern).getwidth()[1] < 10_000  # type: ignore[attr-defined]


def unlimited(field: FieldDescriptor, rules: Any) -> Iterator[str]:
    """What of a single value has no limit; `rules` are the field's, or those of its items."""
    if field.type == FieldDescriptor.TYPE_STRING:
        text = rules.string
        if not (text.HasField("max_len") or text.HasField("max_bytes") or bounded_pattern(text.pattern)):
            yield "needs max_len, max_bytes or a pattern with an end"
    elif field.type == FieldDescriptor.TYPE_BYTES:
        if not rules.bytes.HasField("max_len"):
            yield "needs max_len"
    elif field.type in INTEGERS:
        if not has_top(getattr(rules, INTEGERS[field.type])):
            yield "needs lte"
    elif field.type in FLOATS:
        number = getattr(rules, FLOATS[field.type])
        if not (number.finite and has_top(number)):
            yield "needs finite and lte"
    elif field.message_type is not None:
        kind = TIMES.get(field.message_type.full_name)
        if kind is not None and not has_top(getattr(rules, kind)):
            yield "needs lte"


def missing_limits(message: Descriptor) -> Iterator[tuple[str, str]]:
    for field in message.fields:
        rules, name = rules_of(field), field.full_name
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            if not rules.map.HasField("max_pairs"):
                yield name, "needs max_pairs"
            for part, inner in (("key", rules.map.keys), ("value", rules.map.values)):
                yield from ((f"{name}.{part}", text) for text in unlimited(entry[part], inner))
        elif field.is_repeated:
            if not rules.repeated.HasField("max_items"):
                yield name, "needs max_items"
            yield from ((name, text) for text in unlimited(field, rules.repeated.items))
        else:
            yield from ((name, text) for text in unlimited(field, rules))


def test_every_field_of_a_request_has_a_limit() -> None:
    found = dict(item for message in requests() for item in missing_limits(message))
    assert {name: text for name, text in found.items() if name not in UNLIMITED} == {}
    assert sorted(UNLIMITED) == sorted(found), "UNLIMITED lists what is limited, or gone"


def test_every_field_of_an_event_has_a_limit() -> None:
    envelope = importlib.import_module("llmos.events.v1.events_pb2").EventEnvelope.DESCRIPTOR
    kinds = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
    for message in reachable([envelope]):
        texts = {f.full_name for f in message.fields if f.type in kinds or f.is_repeated}
        assert [item for item in missing_limits(message) if item[0] in texts] == []


def test_the_limit_check_sees_what_is_missing() -> None:
    answer = importlib.import_module("llmos.gateway.v1.job_service_pb2").Job.DESCRIPTOR
    found = dict(missing_limits(answer))
    assert found["llmos.gateway.v1.Job.id"] == "needs max_len, max_bytes or a pattern with an end"
    assert found["llmos.gateway.v1.Job.attempts"] == "needs lte"
    assert found["llmos.gateway.v1.Job.create_time"] == "needs lte"
    assert found["llmos.gateway.v1.Job.labels.key"].startswith("needs max_len")
    vector = importlib.import_module("llmos.gateway.v1.embedding_service_pb2").Embedding.DESCRIPTOR
    assert [text for _, text in missing_limits(vector)] == [
        "needs lte",
        "needs max_items",
        "needs finite and lte",
    ]
    assert bounded_pattern("^a{0,5}$")
    assert not bounded_pattern("^a+$")
    assert not bounded_pattern("a")


def test_a_zero_means_nothing() -> None:
    for enum in enums():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED"), enum.full_name
    loose = set()
    for message in requests():
        for field in message.fields:
            if field.enum_type is not None:
                rules = rules_of(field)
                rules = rules.repeated.items.enum if field.is_repeated else rules.enum
                assert rules.defined_only, field.full_name
                if 0 not in rules.not_in:
                    loose.add(field.full_name)
    assert loose == set(ZERO_IS_NOT_SET)


def test_the_rules_of_each_message_compile() -> None:
    for message in messages():
        protovalidate.collect_violations(message_factory.GetMessageClass(message)())


def comments_of(enum: str) -> dict[str, str]:
    """The comments of an enum's values, from the image."""
    image = descriptor_pb2.FileDescriptorSet.FromString((PROTOS / "gen" / "llmos.binpb").read_bytes())
    for file in image.file:
        for index, candidate in enumerate(file.enum_type):
            if f"{file.package}.{candidate.name}" == enum:
                at = {tuple(where.path): where.leading_comments for where in file.source_code_info.location}
                return {
                    value.name: at[5, index, 2, place].strip() for place, value in enumerate(candidate.value)
                }
    raise KeyError(enum)


def test_the_error_tree_is_that_of_the_contract() -> None:
    comments = comments_of("llmos.common.v1.ErrorReason")
    prefix = "ERROR_REASON_"
    reasons = {name.removeprefix(prefix): text for name, text in comments.items()}
    del reasons["UNSPECIFIED"]
    leaves = list(errors.leaves())
    assert sorted(leaf.reason for leaf in leaves) == sorted(reasons), "one class for each reason"
    for leaf in leaves:
        text = reasons[leaf.reason]
        assert text.startswith(f"{leaf.status.name}: "), f"{leaf.__name__} and its comment differ in status"
        if "RetryInfo" in text:
            assert leaf.default_retry_after_s is not None, f"{leaf.__name__} needs RetryInfo"


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


def test_the_reference_is_current(tmp_path: Path) -> None:
    checked = run("protos/reference.py", "--check")
    assert checked.returncode == 0, checked.stderr
    pages = shutil.copytree(ROOT / "docs" / "api", tmp_path / "api")
    (pages / "llmos.common.v1.md").write_text("old")
    (pages / "gone.md").write_text("old")
    stale = run("protos/reference.py", "--check", "--out", str(pages))
    assert stale.returncode != 0
    assert "gone.md, llmos.common.v1.md" in stale.stderr
    assert "make proto" in stale.stderr


def test_the_style_is_checked(tmp_path: Path) -> None:
    assert run("protos/check.py", "lint").returncode == 0
    shutil.copytree(PROTOS / "llmos", tmp_path / "llmos")
    usage = tmp_path / "llmos/common/v1/usage.proto"
    usage.write_text(usage.read_text().replace("uint64 prompt_tokens", "uint64 promptTokens"))
    linted = run("protos/check.py", "lint", "--root", str(tmp_path))
    assert linted.returncode != 0
    assert "promptTokens" in linted.stdout


def test_a_removed_field_is_seen_as_breaking(tmp_path: Path) -> None:
    shutil.copytree(PROTOS / "llmos", tmp_path / "llmos")
    same = run("protos/check.py", "breaking", "--against", "HEAD", "--root", str(tmp_path))
    assert same.returncode == 0, same.stdout
    usage = tmp_path / "llmos/common/v1/usage.proto"
    usage.write_text(re.sub(r"\n  uint64 cached_prompt_tokens = 3;", "", usage.read_text()))
    broken = run("protos/check.py", "breaking", "--against", "HEAD", "--root", str(tmp_path))
    assert broken.returncode != 0
    assert "cached_prompt_tokens" in broken.stdout


def test_a_ref_without_protos_breaks_nothing() -> None:
    empty_tree = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
    subprocess.run(["git", "mktree"], cwd=ROOT, input=b"", check=True, capture_output=True)
    checked = run("protos/check.py", "breaking", "--against", empty_tree)
    assert checked.returncode == 0, checked.stderr
    assert "has no protos" in checked.stdout
