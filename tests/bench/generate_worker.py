"""transformers' `generate` in a process of its own: a static batch, as fast as its options make it.

Arguments: model folder, dtype, device. JSON lines in, `{"prompts": […], "max_tokens": …}`, JSON lines out;
the first one tells what was chosen. Prompts are padded on the left; greedy, past the end of sequence.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

ATTENTION = ("sdpa", "eager")
NEVER = -1
"""As the end-of-sequence token: no token has this id."""


class Worker:
    def __init__(self, folder: str, dtype: str, device: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self._device = device
        torch.set_grad_enabled(False)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True
        )
        self._model.train(False)
        self._model.to(device)  # type: ignore[arg-type]
        self.attention = ""

    def tune(self) -> dict[str, float]:
        """Takes the attention that is fastest here; tells what each took, in seconds."""
        took_s: dict[str, float] = {}
        prompts = ["one two three four five six seven eight nine ten " * 10] * 8
        for attention in ATTENTION:
            self._model.set_attn_implementation(attention)
            self.answer(prompts, 2)
            took_s[attention] = min(self.answer(prompts, 12)["last_s"] for _ in range(2))
        self.attention = min(took_s, key=took_s.__getitem__)
        self._model.set_attn_implementation(self.attention)
        return took_s

    def answer(self, prompts: list[str], max_tokens: int) -> dict[str, Any]:
        from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

        first_s: list[float] = []

        class Watch(StoppingCriteria):
            """Asked after each token; stops nothing."""

            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                if not first_s:
                    input_ids[0, -1].item()  # a GPU has not computed it before somebody looks
                    first_s.append(time.perf_counter() - begun_s)
                return never

        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=NEVER,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        never = self._torch.zeros(len(prompts), dtype=self._torch.bool, device=self._device)
        begun_s = time.perf_counter()
        batch = self._tokenizer(prompts, return_tensors="pt", padding=True).to(self._device)
        with self._torch.inference_mode():
            found = self._model.generate(  # type: ignore[misc]
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([Watch()]),
            )
        token_ids = found[:, batch["input_ids"].shape[1] :].tolist()
        last_s = time.perf_counter() - begun_s
        return {"first_s": first_s[0], "last_s": last_s, "token_ids": token_ids}


def main() -> None:
    folder, dtype, device = sys.argv[1:4]
    # Whatever a library prints must not be taken for an answer.
    out, sys.stdout = sys.stdout, sys.stderr
    worker = Worker(folder, dtype, device)
    tuned = worker.tune()
    import torch

    hello = {"attention": worker.attention, "tuned_s": tuned, "threads": torch.get_num_threads()}
    print(json.dumps(hello), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(worker.answer(request["prompts"], request["max_tokens"])), file=out, flush=True)


if __name__ == "__main__":
    main()
