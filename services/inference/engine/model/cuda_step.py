"""The torch step on a GPU: decode steps are CUDA graphs, the pool is sized by what steps were seen to need.

A graph is captured once for each number of rows and of blocks of the longest sequence, both in buckets; a
step then is a few small copies, one launch, and the copy of the logits, which is the only thing the host
waits for. Steps that hold a chunk of a prompt are launched operation by operation. cuBLAS chooses its kernels
by the size of the batch, so equal bits in every batch are not promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from services.inference.engine.model.plan import Plan, Planner, Pool
from services.inference.engine.model.torch_step import TorchStep, page_bytes
from services.inference.engine.model.weights import ModelWeights
from services.inference.engine.step import PAGE_TOKENS, Logits, StepRow, check_row

_MOST_GRAPHS = 64
"""Beyond them steps are launched operation by operation."""
_GRAPH_NUMBERS = 1 << 28
"""Keys that a captured step gathers for one layer, at most."""
_SHARE = 0.9
"""Of the device's memory that this process may take."""


@dataclass(frozen=True, slots=True)
class _Graph:
    """A captured step: its inputs are overwritten, then it is replayed."""

    graph: torch.cuda.CUDAGraph
    plan: Plan
    logits: Tensor


class CudaStep(TorchStep):
    """`Step` on one GPU."""

    def __init__(self, weights: ModelWeights[Tensor], *, pages: int, device: str = "cuda") -> None:
        """See TorchStep. Raises RuntimeError where there is no such device."""
        super().__init__(weights, pages=pages, device=device)
        self.numerics += "/graphs"
        self._host = torch.empty((0, self.vocab_tokens))

    @classmethod
    def sized(
        cls,
        weights: ModelWeights[Tensor],
        *,
        max_pages: int,
        max_step_tokens: int,
        max_rows: int,
        device: str = "cuda",
    ) -> CudaStep:
        """With as many pages, up to `max_pages`, as the device holds beside the largest steps.

        Those are tried: a chunk of `max_step_tokens`, and `max_rows` sequences of the whole context. Raises
        RuntimeError where not one page fits.
        """
        step = cls(weights, pages=1, device=device)
        needed = step._peak_bytes(max_step_tokens, max_rows)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(step._model.device)
        allowed = free - int(total * (1 - _SHARE)) - needed
        # The pool has two pages that nobody owns.
        pages = min(max_pages, allowed // page_bytes(step.shape, step._model.dtype) - 2)
        if pages < 1:
            raise RuntimeError(
                f"{free} bytes are free on {device}, and a step needs {needed} without any page"
            )
        with torch.inference_mode():
            step._allocate(pages)
        return step

    def run(self, rows: Sequence[StepRow]) -> Logits:
        """See `Step`."""
        for row in rows:
            check_row(
                row, vocab_tokens=self.vocab_tokens, context_tokens=self.context_tokens, pages=self.pages
            )
        count = sum(row.logits for row in rows)
        if count > len(self._host):
            self._host = torch.empty((count, self.vocab_tokens), pin_memory=True)
        if rows:
            with torch.inference_mode(), torch.cuda.device(self._model.device):
                self._host[:count].copy_(self._logits(rows), non_blocking=True)
                torch.cuda.current_stream().synchronize()
        logits: Logits = self._host[:count].numpy()
        return logits

    def _allocate(self, pages: int) -> None:
        super()._allocate(pages)
        self._graphs: dict[object, _Graph] = {}
        """They know the pool by its address."""
        self._graph_pool = torch.cuda.graph_pool_handle()
        # Copied to the device only where a graph's inputs already are.
        self._host_planner = Planner(
            self.shape,
            Pool(pages),
            row_multiple=self._planner.row_multiple,
            device=torch.device("cpu"),
        )

    def _logits(self, rows: Sequence[StepRow]) -> Tensor:
        if any(len(row.tokens) > 1 for row in rows):
            return super()._logits(rows)
        longest = max(row.position for row in rows) + 1
        # A graph's rows are all as long as the longest.
        if len(rows) * longest * self.shape.kv_heads * self.shape.head_dim > _GRAPH_NUMBERS:
            return super()._logits(rows)
        plan = self._host_planner.plan(rows, static=True)
        key = plan.key()
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) >= _MOST_GRAPHS:
                return super()._logits(rows)
            graph = self._graphs[key] = self._captured(plan)
        for captured, given in zip(graph.plan.tensors(), plan.tensors(), strict=True):
            captured.copy_(given.pin_memory(), non_blocking=True)
        graph.graph.replay()
        return graph.logits[: plan.logit_count]

    def _captured(self, plan: Plan) -> _Graph:
        own = plan.to(self._model.device)
        # What is not wanted this time may be wanted when it is replayed.
        own = replace(own, logit_count=len(own.logits))
        # Once outside: what libraries allocate on first use must not be captured.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward(own)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graph_pool):
            logits = self._forward(own)
        return _Graph(graph, own, logits)

    def _peak_bytes(self, max_step_tokens: int, max_rows: int) -> int:
        """What the largest steps were seen to allocate beside weights and pool.

        All their pages are the first: nobody reads what they compute.
        """
        device = self._model.device
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        last = self.context_tokens - 1
        pages = [0] * (last // PAGE_TOKENS + 1)
        chunk = min(max_step_tokens, self.context_tokens)
        self.run([StepRow([0] * chunk, self.context_tokens - chunk, pages, 1)])
        self.run([StepRow([0], last, pages, 1)] * max_rows)
        return torch.cuda.max_memory_allocated(device) - before
