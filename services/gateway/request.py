"""Parses a public message once, into a type that can only be valid.

Three kinds of rules, in this order: those of the protos (protovalidate), what this version does not offer
yet, and the deployment's own limits. What is not offered is refused by its field's name, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as ProtoMessage
from llmos.gateway.v1 import generation_pb2, generation_service_pb2, model_service_pb2

from services.gateway.generation import Message, Prompt, Role, Sampling, ValidGeneration, ValidPrompt
from services.mesh import validation
from services.mesh.errors import NotImplementedYet, RequestInvalid, Violation
from services.mesh.randomness import random_bytes

Spec = generation_pb2.GenerationSpec
_ROLES = {int(role): role for role in Role}
_SELDOM = frozenset({"tools", "tool_choice", "response_format"})
"""What may not be offered, of a spec."""
_NAMES: Mapping[FieldDescriptor, str] = {
    field: field.name
    for message in (Spec, generation_pb2.SamplingParams)
    for field in message.DESCRIPTOR.fields
}


def new_seed() -> int:
    """63 random bits: what a JSON client can hold in a signed number."""
    return int.from_bytes(random_bytes(8)) >> 1


class RequestParser:
    """Holds the deployment's limits."""

    def __init__(
        self,
        *,
        max_tokens_limit: int,
        max_total_tokens: int = 0,
        max_prompt_bytes: int = 0,
        max_messages: int = 0,
        assign_seed: Callable[[], int] = new_seed,
    ) -> None:
        """`settings.GatewaySettings` explains the limits; 0: none but those of the protos."""
        self._max_tokens_limit = max_tokens_limit
        self._max_total_tokens = max_total_tokens
        self._max_prompt_bytes = max_prompt_bytes
        self._max_messages = max_messages
        self._assign_seed = assign_seed

    def generation(
        self, message: generation_service_pb2.GenerateRequest | generation_service_pb2.StreamGenerateRequest
    ) -> ValidGeneration:
        """Raises RequestInvalid or NotImplementedYet, which name the fields."""
        validation.validate(message)
        spec = message.spec
        # Of two dozen fields few are there: to ask for each takes longer.
        there = {_NAMES[field]: value for field, value in spec.ListFields()}
        refuse_unoffered(
            [*_unoffered_beside(message, there), *_unoffered_in_prompt(spec.prompt, "spec.prompt")]
        )
        self._check_limits(spec)
        return ValidGeneration(
            model=spec.model,
            prompt=_prompt(spec.prompt),
            sampling=self._sampling(spec.sampling),
            max_tokens=there.get("max_tokens"),
            stop=tuple(there.get("stop", ())),
            stop_token_ids=tuple(there.get("stop_token_ids", ())),
            n=there.get("n", 1),
            logprobs=there.get("logprobs", False),
            top_logprobs=there.get("top_logprobs", 0),
            ignore_eos=there.get("ignore_eos", False),
            end_user=there.get("end_user", ""),
            labels=dict(there.get("labels", {})),
        )

    def count_tokens(self, message: generation_service_pb2.CountTokensRequest) -> ValidPrompt:
        """Raises RequestInvalid or NotImplementedYet, which name the fields."""
        validation.validate(message)
        refuse_unoffered(_unoffered_in_prompt(message.prompt, "prompt"))
        self._check_prompt(message.prompt, "prompt")
        return ValidPrompt(model=message.model, prompt=_prompt(message.prompt))

    def model(self, message: model_service_pb2.GetModelRequest) -> str:
        """The id of the model. Raises RequestInvalid."""
        validation.validate(message)
        return message.id

    def _check_limits(self, spec: Spec) -> None:
        if spec.max_tokens > self._max_tokens_limit:
            raise _above("spec.max_tokens", self._max_tokens_limit)
        choices = spec.n or 1
        total = choices * (spec.max_tokens or self._max_tokens_limit)
        if self._max_total_tokens and total > self._max_total_tokens:
            what = f"at most {self._max_total_tokens // choices} fit with {choices} choices"
            raise RequestInvalid(
                f"All choices together may have {self._max_total_tokens} tokens in this deployment, and "
                f"{total} are asked for.",
                violations=[Violation("spec.max_tokens", what)],
            )
        self._check_prompt(spec.prompt, "spec.prompt")

    def _check_prompt(self, prompt: generation_pb2.Prompt, path: str) -> None:
        if self._max_messages and len(prompt.chat.messages) > self._max_messages:
            raise _above(f"{path}.chat.messages", self._max_messages, "messages")
        if self._max_prompt_bytes and prompt.ByteSize() > self._max_prompt_bytes:
            kind = "text" if prompt.WhichOneof("kind") == "text" else "chat.messages"
            raise _above(f"{path}.{kind}", self._max_prompt_bytes, "bytes")

    def _sampling(self, given: generation_pb2.SamplingParams) -> Sampling:
        there = {_NAMES[field]: value for field, value in given.ListFields()}
        seed, bias = there.pop("seed", None), there.pop("logit_bias", None)
        return Sampling(
            seed=self._assign_seed() if seed is None else seed,
            seed_is_assigned=seed is None,
            logit_bias=tuple(sorted(bias.items())) if bias else (),
            **there,
        )


def _above(field: str, limit: int, unit: str = "") -> RequestInvalid:
    number = f"{limit} {unit}".strip()
    return RequestInvalid(
        f"`{field}` is above this deployment's limit of {number}.",
        violations=[Violation(field, f"must be at most {number}")],
    )


def validate(message: ProtoMessage) -> None:
    """The proto's own rules alone, for messages that are passed on as they are. Raises RequestInvalid."""
    validation.validate(message)


def refuse_unoffered(named: Sequence[str]) -> None:
    """Raises NotImplementedYet, which names the fields, where there are any."""
    if named:
        names = ", ".join(f"`{name}`" for name in named)
        raise NotImplementedYet(
            f"This version of the server does not offer {names}.",
            hint="Leave it out.",
            violations=[Violation(name, "is not offered by this version of the server") for name in named],
        )


def _unoffered_beside(
    message: generation_service_pb2.GenerateRequest | generation_service_pb2.StreamGenerateRequest,
    there: Mapping[str, object],
) -> Sequence[str]:
    """What is not in the prompt; `there` are the fields of the spec."""
    resumable = isinstance(message, generation_service_pb2.StreamGenerateRequest) and message.resumable
    if _SELDOM.isdisjoint(there) and not (resumable or message.idempotency_key):
        return ()
    found = []
    if message.idempotency_key:
        found.append("idempotency_key")
    if resumable:
        found.append("resumable")
    spec = message.spec
    if spec.tools:
        found.append("spec.tools")
    if spec.HasField("tool_choice") and (
        spec.tool_choice.tool_name or spec.tool_choice.mode == generation_pb2.ToolChoice.MODE_REQUIRED
    ):
        # The other modes change nothing where there are no tools.
        found.append("spec.tool_choice")
    if spec.HasField("response_format") and spec.response_format.WhichOneof("format"):
        found.append("spec.response_format")
    return found


def _unoffered_in_prompt(prompt: generation_pb2.Prompt, path: str) -> Sequence[str]:
    found: list[str] = []
    for index, message in enumerate(prompt.chat.messages):
        if message.role == generation_pb2.ROLE_TOOL:
            found.append(f"{path}.chat.messages[{index}].role")
        if message.tool_calls:
            found.append(f"{path}.chat.messages[{index}].tool_calls")
        if message.tool_call_id:
            found.append(f"{path}.chat.messages[{index}].tool_call_id")
    return found


def _prompt(prompt: generation_pb2.Prompt) -> Prompt:
    if prompt.WhichOneof("kind") == "text":
        return Prompt(text=prompt.text)
    return Prompt(
        # Lists, since a generator takes twice as long.
        messages=tuple(
            [
                Message(_ROLES[message.role], tuple([part.text for part in message.content]), message.name)
                for message in prompt.chat.messages
            ]
        )
    )
