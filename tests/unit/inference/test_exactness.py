"""The embedded engine against transformers' own `generate`, on the real model."""

from __future__ import annotations

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
    "Who wrote Faust?",
    "How does a bicycle stay upright?",
    "Give me a recipe for pancakes.",
    "What rhymes with orange?",
    "Summarise the plot of Hamlet.",
    "Is a tomato a fruit?",
    "Write an SQL query that counts users.",
    "Explain TCP to a grandmother.",
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
    "The capital of Italy is",
    "<html>\n<body>\n",
    "import numpy as np\n",
    "In the beginning",
    "x",
    "SELECT * FROM",
    "Roses are red,",
    "The three laws of robotics are:",
    "Ingredients:\n- flour\n-",
    "A B C D E F",
    "It was the best of times,",
    "Q: What is the largest planet?\nA:",
)
BATCH = 10
EOS = 2


def prompt_ids(folder: Path, prompts: list[Prompt]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        text = prompt.text
        if prompt.messages:
            messages = [{"role": each.role.value, "content": each.content} for each in prompt.messages]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        found.append(tokenizer.encode(text, add_special_tokens=False))
    return found


def reference(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy ids of `generate` in float32, an end-of-sequence token included.

    In batches of like lengths, padded on the left.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # Two would wait for each other, spinning, wherever other tests run beside.
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"do_sample": False, "max_new_tokens": MAX_TOKENS, "pad_token_id": EOS}
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    outputs: dict[int, list[int]] = {}
    for start in range(0, len(order), BATCH):
        numbers = order[start : start + BATCH]
        longest = len(prompts[numbers[-1]])
        pads = [longest - len(prompts[number]) for number in numbers]
        ids = torch.tensor([[EOS] * pad + prompts[number] for number, pad in zip(numbers, pads, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        output = model.generate(ids, attention_mask=mask, **settings)[:, longest:].tolist()
        for number, row in zip(numbers, output, strict=True):
            outputs[number] = row[: row.index(EOS) + 1] if EOS in row else row
    return [outputs[number] for number in range(len(prompts))]


@pytest.mark.slow
async def test_greedy_equals_generate_of_transformers(smollm2: Path) -> None:
    """40 prompts at once on our side, in joins, leaves and chunks beside each other."""
    prompts = [Prompt(messages=(Message(Role.USER, question),)) for question in QUESTIONS]
    prompts += [Prompt(text=text) for text in TEXTS]
    assert len(prompts) == 40
    expected = reference(smollm2, prompt_ids(smollm2, prompts))
    engine = embedded_engine(smollm2, MODEL_ID, max_waiting=40)
    await engine.start()
    try:
        await engine.wait_healthy(START_TIMEOUT_S)
        (model,) = engine.models()
        assert "float32" in model.numerics_id
        assert model.exact_replay
        greedy = Sampling(seed=1, temperature=0.0)
        requests = [
            GenerationRequest(f"req_{n}", MODEL_ID, prompt, greedy, max_tokens=MAX_TOKENS)
            for n, prompt in enumerate(prompts)
        ]
        answers = await gather_answers(engine, requests)
    finally:
        await engine.stop()
    assert [whole.tokens[0] for whole in answers] == expected
