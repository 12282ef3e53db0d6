"""The load of the soak: clients of several tenants, all kinds of requests, all ways of leaving."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc
from llmos.gateway.v1 import generation_pb2, generation_service_pb2, generation_service_pb2_grpc

from tests.bench.work import prompt_of
from tests.framework.calls import reason_of, request_id_of
from tests.framework.mesh import MeshHarness

KINDS = {
    "whole": 30,
    "sampled": 15,
    "shared prefix": 15,
    "choices": 8,
    "stop": 8,
    "cancelled": 12,
    "deadline": 6,
    "too long": 2,
    "refused": 4,
}
"""What is sent, by weight."""
ENDS = {
    "deadline": {"finished", "DEADLINE_EXCEEDED"},
    "cancelled": {"finished", "cancelled"},
    "too long": {"CONTEXT_LENGTH_EXCEEDED"},
    "refused": {"NOT_IMPLEMENTED"},
}
"""How a kind may end, where that is not `finished`. OVERLOADED may come to any of them."""
PREFIXES = 12
PREFIX_WORDS = 150
LIMIT_S = 120.0


@dataclass(slots=True)
class Ended:
    """A request's end, as its client saw it."""

    kind: str
    request_id: str
    end: str
    """`finished`, `cancelled`, or the reason of the error."""
    tokens: int
    unbroken: bool
    """Each sequence number came once, and nothing after the end."""


@dataclass(slots=True)
class Load:
    """Keeps `clients` requests under way until it is told to stop."""

    mesh: MeshHarness
    model: str
    keys: dict[str, str]
    """By tenant."""
    clients: int
    seed: int
    too_long_words: int
    """A prompt of so many words is more than the context holds."""
    max_words: int = 400
    max_tokens: int = 64
    ended: list[Ended] = field(default_factory=list)
    tokens: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Returns when all have ended. Raises what a client does not understand."""
        chance = random.Random(self.seed)
        prefixes = [prompt_of(PREFIX_WORDS, chance, _words) for _ in range(PREFIXES)]
        async with asyncio.TaskGroup() as group:
            for number in range(self.clients):
                tenant = list(self.keys)[number % len(self.keys)]
                client = random.Random(f"{self.seed}/{number}")
                group.create_task(self._client(tenant, client, prefixes))

    async def _client(self, tenant: str, chance: random.Random, prefixes: list[str]) -> None:
        stub: Any = generation_service_pb2_grpc.GenerationServiceStub(self.mesh.channel())
        while not self.stop.is_set():
            kind = chance.choices(list(KINDS), weights=list(KINDS.values()))[0]
            ended = await self._one(stub, tenant, kind, chance, prefixes)
            self.ended.append(ended)
            self.tokens += ended.tokens

    async def _one(
        self, stub: Any, tenant: str, kind: str, chance: random.Random, prefixes: list[str]
    ) -> Ended:
        spec = self._spec(kind, chance, prefixes)
        leave_after = chance.randrange(1, 8) if kind == "cancelled" else -1
        timeout_s = chance.uniform(0.02, 0.4) if kind == "deadline" else LIMIT_S
        request_id, end = "", ""
        seqs: list[int] = []
        tokens = 0
        call = stub.StreamGenerate(
            generation_service_pb2.StreamGenerateRequest(spec=spec),
            metadata=self.mesh.bearer(self.keys[tenant]),
            timeout=timeout_s,
        )
        late = False
        try:
            async for response in call:
                late = late or end != ""
                match response.WhichOneof("event"):
                    case "started":
                        request_id = response.started.request_id
                    case "delta":
                        seqs.append(response.delta.seq)
                        tokens += len(response.delta.token_ids)
                    case "finished":
                        end = "finished"
                if leave_after == len(seqs):
                    end = "cancelled"
                    break
        except grpc.aio.AioRpcError as error:
            end = reason_of(error) or error.code().name
            if end != "DEADLINE_EXCEEDED":
                # A deadline that passes before anybody knows who asks is no authenticated request.
                request_id = request_id or request_id_of(error)
        finally:
            call.cancel()
        unbroken = seqs == list(range(1, len(seqs) + 1)) and not late
        return Ended(kind, request_id, end, tokens, unbroken)

    def _spec(self, kind: str, chance: random.Random, prefixes: list[str]) -> generation_pb2.GenerationSpec:
        # Mostly short, sometimes long: as people ask.
        words = min(self.max_words, int(chance.lognormvariate(3.5, 1.0)) + 12)
        text = prompt_of(self.too_long_words if kind == "too long" else words, chance, _words)
        if kind == "shared prefix":
            text = f"{chance.choice(prefixes)} {text}"
        spec = generation_pb2.GenerationSpec(
            model=self.model,
            prompt=generation_pb2.Prompt(text=text),
            sampling=generation_pb2.SamplingParams(temperature=0.0, seed=chance.randrange(2**63)),
            max_tokens=chance.randrange(1, self.max_tokens + 1),
            ignore_eos=chance.random() < 0.5,
        )
        match kind:
            case "sampled":
                spec.sampling.MergeFrom(
                    generation_pb2.SamplingParams(
                        temperature=chance.uniform(0.1, 1.5),
                        top_p=chance.uniform(0.5, 1.0),
                        top_k=chance.choice([0, 5, 50]),
                        repetition_penalty=chance.uniform(1.0, 1.3),
                    )
                )
                spec.logprobs = chance.random() < 0.5
                spec.top_logprobs = 5 if spec.logprobs else 0
            case "choices":
                spec.n = chance.randrange(2, 5)
                spec.sampling.temperature = 1.0
            case "stop":
                spec.stop.extend(["e", ". "])
            case "refused":
                spec.tools.add(name="search")
        return spec

    def ends(self) -> Counter[tuple[str, str]]:
        """How many of each kind ended how."""
        return Counter((each.kind, each.end) for each in self.ended)

    def complaints(self) -> list[str]:
        """What must not have been seen."""
        found = [
            f"{count} requests of the kind `{kind}` ended with {end or 'nothing'}"
            for (kind, end), count in sorted(self.ends().items())
            if end not in ENDS.get(kind, {"finished"}) | {"OVERLOADED"}
        ]
        broken = sum(not each.unbroken for each in self.ended)
        if broken:
            found.append(f"{broken} streams had a gap, a repetition, or something after their end")
        return found


def _words(text: str) -> int:
    return len(text.split())
