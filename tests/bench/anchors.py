"""Which engines of others a run measures the platform beside."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from deploy.dev.ports import PortReservations
from tests.bench.generate import Generate
from tests.bench.llama_cpp import LlamaLoop, LlamaServer, require
from tests.bench.options import VLLM, Options
from tests.bench.progress import Progress
from tests.bench.serve import Serve
from tests.bench.subject import Subject
from tests.bench.vllm import Vllm
from tests.bench.weights import Weights

CHECK_PROMPTS = 4
"""How many streams the comparison of answers asks for at once."""


@dataclass(slots=True)
class Anchors:
    """What the platform is measured beside."""

    reference: Generate | LlamaLoop
    """Whose answers the others' are compared with."""
    always: list[Subject] = field(default_factory=list)
    """Measured at each number of streams."""
    vllm: Vllm | None = None
    """One of those, where it is measured."""
    ways: list[Subject] = field(default_factory=list)
    """Ways to do the same: the faster one is measured."""

    @property
    def others(self) -> list[Subject]:
        """All but the reference."""
        return [each for each in (*self.always, *self.ways) if each is not self.reference]


def anchors(
    options: Options,
    given: Weights,
    tokenizer: Tokenizer,
    folder: Path,
    ports: PortReservations,
    say: Progress,
) -> Anchors:
    """Raises CannotMeasure where llama.cpp is asked for and is not there; says that vLLM is left out."""
    most = max(CHECK_PROMPTS, *options.levels)
    # A page more than what is asked for: the prompts are only about as long.
    context = -(-(options.prompt_tokens + options.max_tokens + 64) // 256) * 256

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    def port(name: str) -> int:
        return ports.take([name])[name]

    if given.gguf is not None:
        require()
        loop = LlamaLoop(given.gguf, encode, levels=sorted({*options.levels, most}), context=context)
        servers = [
            LlamaServer(
                given.gguf,
                encode,
                slots=most,
                context=context,
                port=port(f"llama.cpp {guessing}"),
                log_file=folder / "llama.log",
                guessing=guessing,
            )
            for guessing in (False, True)
        ]
        return Anchors(loop, ways=[loop, *servers])
    generate = Generate(given.folder, given.dtype, options.device)
    found = Anchors(generate, always=[generate])
    if VLLM in options.subjects:
        found.vllm = Vllm(
            given.folder,
            given.dtype,
            encode,
            streams=most,
            context=context,
            port=port("vllm"),
            log_file=folder / "vllm.log",
        )
        found.always.append(found.vllm)
    elif options.device == "cpu":
        say("vLLM is not measured: `make bench-engine VLLM=1` installs it, about 6 GB, and measures it")
    if "serve" in options.subjects:
        found.ways = [
            Serve(
                given.folder,
                given.dtype,
                options.device,
                port=port(f"serve {batching}"),
                log_file=folder / "serve.log",
                batching=batching,
            )
            for batching in (False, True)
        ]
    return found
