"""What a run of `make bench-engine` is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import report
from tests.bench.figures import rounds_from

FLOATS = ("float32", "bfloat16")
BLOCKS = ("q8", "q4")
"""Quantised blocks: 8 bits are Q8_0, 4 bits what the packaged GGUF file holds."""
SUBJECTS_OF_FLOATS = ("platform", "grpc", "alone", "generate", "serve")
VLLM = "vllm"
"""A subject of floats as well, where it is asked for: it takes minutes to start."""
SUBJECTS_OF_BLOCKS = ("platform", "grpc", "alone", "llama")


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for."""

    model: Path | None
    """None: the packaged one."""
    precision: str
    """One of `FLOATS` or `BLOCKS`."""
    device: str
    levels: tuple[int, ...]
    rounds: int
    prompt_tokens: int
    max_tokens: int
    budget_s: float
    subjects: frozenset[str]

    @property
    def blocks(self) -> bool:
        """Whether the weights are quantised blocks."""
        return self.precision in BLOCKS


def arguments(argv: Sequence[str]) -> Options:
    """Ends the program where they make no sense."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.engine", description="Measures engines.")
    parser.add_argument("--rounds", type=rounds_from, default=5)
    parser.add_argument("--streams", default="1,8,32", help="how many at once, with commas")
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--minutes", type=float, default=12, help="no round begins that would end after it")
    parser.add_argument("--subjects", help="with commas; the one that answers are compared with comes always")
    parser.add_argument("--vllm", action="store_true", help="vLLM as well, on the CPU")
    parser.add_argument("--model", type=Path, help="a folder of safetensors; not given: the packaged model")
    parser.add_argument("--dtype", choices=("auto", *FLOATS, *BLOCKS), default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args(argv)
    precision = _precision(given.dtype, given.device)
    blocks = precision in BLOCKS
    if blocks and (given.model or given.device != "cpu"):
        parser.error(f"{precision} is of the packaged model on the CPU")
    if given.vllm and (blocks or given.device != "cpu"):
        parser.error("vLLM is measured with numbers on the CPU")
    known = SUBJECTS_OF_BLOCKS if blocks else SUBJECTS_OF_FLOATS
    subjects = frozenset(given.subjects.split(",") if given.subjects else known)
    if unknown := subjects - set(known):
        parser.error(
            f"no subject {', '.join(sorted(unknown))} with {precision}; there are {', '.join(known)}"
        )
    return Options(
        model=given.model,
        precision=precision,
        device=given.device,
        levels=tuple(int(level) for level in given.streams.split(",")),
        rounds=given.rounds,
        prompt_tokens=given.prompt_tokens,
        max_tokens=given.max_tokens,
        budget_s=given.minutes * 60,
        subjects=subjects | {"llama" if blocks else "generate"} | ({VLLM} if given.vllm else set()),
    )


def _precision(name: str, device: str) -> str:
    """What `auto` is here: what transformers is fast with. All subjects are told the same."""
    if name != "auto":
        return name
    quick = device == "cuda" or "avx512f" in report.machine()["instructions"]
    return "bfloat16" if quick else "float32"
