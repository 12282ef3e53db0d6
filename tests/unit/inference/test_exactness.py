"""The torch backend against transformers' own `generate`, on the real model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from services.inference.engine.port import GenerationRequest, Message, Prompt, Role, Sampling
from tests.framework.engines import START_TIMEOUT_S, embedded_engine, gather_answers

MAX_TOKENS = 12
MODEL_ID = "smollm2-135m-instruct"
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Count from one to ten.",
    "Explain photosynthesis to a child.",
    "Translate 'good morning' into Spanish.",
    "Name three primes.",
    "Was ist ein Apfel?",
    "Why is the sky blue? Answer in one sentence.",
    "List the planets, in order, separated by commas.",
    "What is 17 + 25?",
    "Tell me about 日本 and its 🗻.",
    "Say 'naïve café' twice.",
)
TEXTS = (
    "Once upon a time",
    "def fibonacci(n):\n    ",
    "The quick brown fox jumps over the lazy dog. " * 8,
    "1, 2, 3, 4,",
    "Dear Sir or Madam,",
    '{"name": "',
    "To be, or not to be",
    "E = mc",
)


def reference(folder: Path, prompts: list[Prompt]) -> list[list[int]]:
    """Greedy ids of `generate` in float32, an end-of-sequence token included."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    outputs = []
    for prompt in prompts:
        if prompt.messages:
            messages = [{"role": each.role.value, "content": each.content} for each in prompt.messages]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = prompt.text
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        output = model.generate(ids, do_sample=False, max_new_tokens=MAX_TOKENS)
        outputs.append(output[0, ids.shape[1] :].tolist())
    return outputs


@pytest.mark.slow
async def test_greedy_equals_generate_of_transformers(smollm2: Path) -> None:
    """All 20 at once on our side, in joins and leaves; one after the other on theirs."""
    prompts = [Prompt(messages=(Message(Role.USER, question),)) for question in QUESTIONS]
    prompts += [Prompt(text=text) for text in TEXTS]
    assert len(prompts) == 20
    # Beside each other, on a core each.
    expected = asyncio.create_task(asyncio.to_thread(reference, smollm2, prompts))
    engine = embedded_engine(smollm2, MODEL_ID, threads=1, max_waiting=20)
    await engine.start()
    try:
        await engine.wait_healthy(START_TIMEOUT_S)
        greedy = Sampling(seed=1, temperature=0.0)
        requests = [
            GenerationRequest(f"req_{n}", MODEL_ID, prompt, greedy, max_tokens=MAX_TOKENS)
            for n, prompt in enumerate(prompts)
        ]
        answers = await gather_answers(engine, requests)
    finally:
        await engine.stop()
    assert [whole.tokens[0] for whole in answers] == await expected
