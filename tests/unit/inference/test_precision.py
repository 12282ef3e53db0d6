"""What rounding costs on the real model, against float32: on text that is given, and on 40 prompts.

The packaged weights come in Q4_1 and Q8_0: in float32 they are what those stand for, and Q4_1 of them changes
nothing. Q8_0 and Q4_0 have other steps, and round anew.

`make precision` takes 5,000 tokens of text and 40 prompts; without it both are a part of that.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch

from services.inference.engine.kv_cache import pages_for
from services.inference.engine.model.loader import load_stored, load_weights
from services.inference.engine.native.parts import Weights
from services.inference.engine.native.step import NativeStep
from services.inference.engine.port import Message, Prompt, Role
from services.inference.engine.step import StepRow
from services.inference.engine.tokenizer import PromptTokenizer
from services.inference.quantise.folder import write_blocks
from services.inference.quantise.precision import (
    WINDOW_TOKENS,
    Predictions,
    agreement,
    predict,
    windows,
)
from tests.framework.models import real_model_in_blocks
from tests.framework.native import native_library
from tests.unit.inference.test_exactness import EOS, MAX_TOKENS, QUESTIONS, TEXTS

ROOT = Path(__file__).parents[3]
TEXT_TOKENS = int(os.environ.get("LLMOS_PRECISION_TOKENS", "512"))
PROMPTS = int(os.environ.get("LLMOS_PRECISION_PROMPTS", "8"))

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Measured:
    """What one precision says of the same tokens."""

    text: Predictions
    prompts: Predictions
    """Of the prompts and what float32 answers, each beginning of a prompt once: half of them begin with the
    chat template, where one chance would count twenty times."""


@dataclass
class Bench:
    """One model in memory at a time."""

    text: list[list[int]]
    prompts: list[list[int]]
    answers: list[list[int]]

    def measure(self, weights: Weights, windows: int | None = None) -> Measured:
        """`windows`: how many of the text."""
        step = make_step(weights)
        try:
            whole = [prompt + answer for prompt, answer in zip(self.prompts, self.answers, strict=True)]
            return Measured(predict(step, self.text[:windows]), once(predict(step, whole), whole))
        finally:
            step.close()

    def answered(self, weights: Weights, keys_and_values: torch.dtype | None = None) -> list[list[int]]:
        """Greedily, all prompts beside each other, each to its end."""
        counts = [pages_for(len(prompt) + MAX_TOKENS) for prompt in self.prompts]
        ends = list(accumulate(counts))
        pages = [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
        step = make_step(weights, keys_and_values, pages=ends[-1])
        answers: list[list[int]] = [[] for _ in self.prompts]
        going = list(range(len(self.prompts)))
        try:
            while going:
                rows = [
                    StepRow(
                        answers[index][-1:] or self.prompts[index],
                        len(self.prompts[index]) + len(answers[index]) - 1 if answers[index] else 0,
                        pages[index],
                        1,
                    )
                    for index in going
                ]
                for index, token in zip(going, step.run(rows).argmax(axis=1), strict=True):
                    answers[index].append(int(token))
                going = [
                    index for index in going if len(answers[index]) < MAX_TOKENS and answers[index][-1] != EOS
                ]
        finally:
            step.close()
        return answers


def once(found: Predictions, pieces: list[list[int]]) -> Predictions:
    """Without what is predicted of the same tokens again."""
    seen: set[tuple[int, ...]] = set()
    first = []
    for piece in pieces:
        for end in range(2, len(piece) + 1):
            first.append(tuple(piece[:end]) not in seen)
            seen.add(tuple(piece[:end]))
    kept = np.array(first)
    return Predictions(found.likeliest[kept], found.log_probabilities[kept])


def make_step(
    weights: Weights, keys_and_values: torch.dtype | None = None, *, pages: int = pages_for(WINDOW_TOKENS)
) -> NativeStep:
    return NativeStep(weights, native_library(), pages=pages, keys_and_values=keys_and_values)


@pytest.fixture(scope="module")
def bench(smollm2: Path, tokenizer: PromptTokenizer) -> Bench:
    """This repository's own guides, and the prompts that transformers is compared on; float32's answers."""
    text = "\n".join(file.read_text() for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    tokens = tokenizer.encode(Prompt(text=text))[:TEXT_TOKENS]
    assert len(tokens) == TEXT_TOKENS
    prompts = [Prompt(messages=(Message(Role.USER, question),)) for question in QUESTIONS]
    prompts += [Prompt(text=text) for text in TEXTS]
    prompts = prompts[:: len(prompts) // PROMPTS][:PROMPTS]
    made = Bench(windows(tokens), [tokenizer.encode(prompt) for prompt in prompts], [])
    assert len(made.prompts) == PROMPTS
    made.answers = made.answered(load_weights(smollm2, "float32"))
    return made


@pytest.fixture(scope="module")
def float32(bench: Bench, smollm2: Path) -> Measured:
    return bench.measure(load_weights(smollm2, "float32"))


def check(measured: Measured, float32: Measured, *, top_1: float, perplexity: float) -> None:
    """`top_1`: at least, of 1; `perplexity`: how far off at most, of 1. For text and prompts alike."""
    for name in ("text", "prompts"):
        found, whole = getattr(measured, name), getattr(float32, name)
        count = len(found.likeliest)
        expected = Predictions(whole.likeliest[:count], whole.log_probabilities[:count])
        share, off = agreement(found, expected), found.perplexity / expected.perplexity - 1
        print(f"{name}: top-1 {share:.4f}, perplexity {expected.perplexity:.4f} {off:+.4%}")
        assert share >= top_1, name
        assert abs(off) <= perplexity, name


def test_bfloat16_agrees_with_float32(bench: Bench, float32: Measured, smollm2: Path) -> None:
    measured = bench.measure(load_weights(smollm2, "bfloat16"))
    check(measured, float32, top_1=0.98, perplexity=0.01)


def test_the_packaged_blocks_are_the_dequantised_weights(bench: Bench, float32: Measured) -> None:
    """Only keys and values, which are bfloat16 beside blocks, differ; in float32 nothing does."""
    weights = load_stored(real_model_in_blocks())
    check(bench.measure(weights), float32, top_1=0.98, perplexity=0.01)
    assert bench.answered(weights, torch.float32) == bench.answers
    step = make_step(weights, torch.float32)
    try:
        some = predict(step, bench.text[:1])
    finally:
        step.close()
    count = len(some.likeliest)
    assert (some.likeliest == float32.text.likeliest[:count]).all()
    assert (some.log_probabilities == float32.text.log_probabilities[:count]).all()


def test_8_bits_agree_with_float32(bench: Bench, float32: Measured, smollm2: Path, tmp_path: Path) -> None:
    write_blocks(smollm2, tmp_path, "Q8_0", lambda percent, text: None)
    check(bench.measure(load_stored(tmp_path)), float32, top_1=0.95, perplexity=0.01)


def test_4_bits_know_the_language(bench: Bench, float32: Measured, smollm2: Path, tmp_path: Path) -> None:
    """Measured with all: top-1 0.70 and perplexity +23 % of the text, 0.71 and +35 % of the prompts."""
    write_blocks(smollm2, tmp_path, "Q4_0", lambda percent, text: None)
    check(bench.measure(load_stored(tmp_path), windows=4), float32, top_1=0.60, perplexity=0.5)


def test_4_bits_of_what_4_bits_stand_for_change_nothing(smollm2: Path, tmp_path: Path) -> None:
    written = write_blocks(smollm2, tmp_path, "Q4_1", lambda percent, text: None)
    assert {each.format for each in written if each.matrix} == {"Q4_1", "Q8_0"}
    assert {each.error for each in written if each.matrix} == {0.0}
