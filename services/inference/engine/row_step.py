"""The step: rows of (slot, tokens, position) in, logits out.

`Step` is what the loop asks of a model. Decode and a chunk of prefill are the same call with one or many
tokens. `TransformersStep` computes each row by itself with transformers' own modules, so a row's numbers
cannot depend on its neighbours: the oracle that faster steps are tested against.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StepRow:
    """One sequence's part in a step."""

    slot: int
    tokens: Sequence[int]
    position: int
    """Of the first of `tokens` in the sequence: how many came before."""
    wants_logits: bool
    """Whether the logits after the last token are needed."""


@dataclass(frozen=True, slots=True)
class StepFault:
    """The row failed; the others did not."""

    cause: Exception


class Step(Protocol):
    """A model with the KV entries of the sequences that run."""

    vocab_tokens: int
    context_tokens: int
    numerics: str
    """Names dtype, kernels and instruction set."""
    exact_replay: bool

    def open_slot(self) -> int:
        """A place for a sequence."""

    def fork_slot(self, slot: int) -> int:
        """Another place, with the same entries."""

    def close_slot(self, slot: int) -> None:
        """Forgets the sequence."""

    def run(self, rows: Sequence[StepRow]) -> Sequence[Logits | StepFault | None]:
        """One result for each row; None where no logits were asked for."""


class TransformersStep:
    """A causal language model of transformers, one row at a time."""

    exact_replay = True

    def __init__(self, model: Any) -> None:
        import torch

        self._torch = torch
        self._model = model.eval()
        self._caches: dict[int, Any] = {}
        self._next_slot = 0
        self.vocab_tokens = int(model.config.vocab_size)
        self.context_tokens = int(model.config.max_position_embeddings)
        dtype = str(model.dtype).removeprefix("torch.")
        capability = torch.backends.cpu.get_cpu_capability()
        self.numerics = (
            f"{dtype}/transformers-torch{torch.__version__}/{capability}/{torch.get_num_threads()}t"
        )

    @classmethod
    def load(cls, folder: Path, *, dtype: str) -> TransformersStep:
        """Loads safetensors from `folder`. No code of the model's own is ever run.

        `dtype`: `float32`, `bfloat16` or `auto`, which is bfloat16 where the CPU computes it.
        """
        import torch
        from transformers import AutoModelForCausalLM

        if dtype == "auto":
            native = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
            dtype = "bfloat16" if native else "float32"
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        return cls(model)

    def warm_up(self) -> None:
        """Computes one row: what is built on first use is built, and a model that cannot run is found out.

        Raises what the model raises.
        """
        slot = self.open_slot()
        (result,) = self.run([StepRow(slot, (0, 0), 0, wants_logits=True)])
        self.close_slot(slot)
        if isinstance(result, StepFault):
            raise result.cause

    def open_slot(self) -> int:
        from transformers import DynamicCache

        return self._keep(DynamicCache(config=self._model.config))

    def fork_slot(self, slot: int) -> int:
        return self._keep(copy.deepcopy(self._caches[slot]))

    def _keep(self, cache: Any) -> int:
        self._next_slot += 1
        self._caches[self._next_slot] = cache
        return self._next_slot

    def close_slot(self, slot: int) -> None:
        del self._caches[slot]

    def run(self, rows: Sequence[StepRow]) -> Sequence[Logits | StepFault | None]:
        results: list[Logits | StepFault | None] = []
        for row in rows:
            try:
                results.append(self._forward(row))
            except Exception as error:
                results.append(StepFault(error))
        return results

    def _forward(self, row: StepRow) -> Logits | None:
        torch = self._torch
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([row.tokens], dtype=torch.long),
                position_ids=torch.arange(row.position, row.position + len(row.tokens)).unsqueeze(0),
                past_key_values=self._caches[row.slot],
                use_cache=True,
                logits_to_keep=1,
            )
            if not row.wants_logits:
                return None
            logits: Logits = output.logits[0, -1].float().numpy()
            return logits
