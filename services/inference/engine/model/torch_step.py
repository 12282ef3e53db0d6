"""The step in torch: any device, any model of the table, and in float32 on a CPU the oracle for every other.

The residual stream, norms, rotations and attention's sums are float32 in any dtype; matrices, keys and
values have the model's. Only operations are used whose result for an element does not depend on its place in
the tensor: torch's silu and gelu are not among them (the ends of a tensor are computed by other code than its
middle), exp and tanh are. Whether it holds on this machine is tried when the step is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from services.inference.engine.model.attention import attend_blocks, attend_fused, gather, visible
from services.inference.engine.model.plan import Group, Plan, Planner, Pool
from services.inference.engine.model.prepared import Layer, prepare
from services.inference.engine.model.self_check import steps_agree
from services.inference.engine.model.weights import ModelShape, ModelWeights
from services.inference.engine.step import PAGE_TOKENS, Logits, StepRow, check_row

_ROW_MULTIPLES = (4, 8, 16)
"""Of queries that are multiplied together: kernels for fewer sum in another order."""


def page_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes of one page of keys and values over all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * PAGE_TOKENS * dtype.itemsize


class TorchStep:
    """`Step` over any model of the table."""

    def __init__(self, weights: ModelWeights[Tensor], *, pages: int, device: str = "cpu") -> None:
        """Allocates the pool: `pages` times `page_bytes`, and two pages more.

        Matrices may be copied; the caller lets go of `weights` afterwards. Raises RuntimeError where memory
        or the device is lacking.
        """
        self.shape = shape = weights.shape
        self.vocab_tokens = shape.vocab_tokens
        self.context_tokens = shape.context_tokens
        with torch.inference_mode():
            self._model = prepare(weights, torch.device(device))
            on_cpu = self._model.device.type == "cpu"
            # A GPU's own attention is quick, and does not know a cap on scores.
            self._attend = attend_blocks if on_cpu or shape.attention_softcap else attend_fused
            self._allocate(pages)
            threads = self._exact() if on_cpu else ()
        self.exact_replay = bool(threads)
        self.numerics = self._name(threads)

    def run(self, rows: Sequence[StepRow]) -> Logits:
        """See `Step`."""
        for row in rows:
            check_row(
                row, vocab_tokens=self.vocab_tokens, context_tokens=self.context_tokens, pages=self.pages
            )
        if not rows:
            return np.zeros((0, self.vocab_tokens), dtype=np.float32)
        with torch.inference_mode():
            logits: Logits = self._logits(rows).cpu().numpy()
        return logits

    def _allocate(self, pages: int) -> None:
        """Makes the pool, and the planner that knows it."""
        self.pages = pages
        shape, pool = self.shape, Pool(pages)
        # Keys, then values. Not touched before it is used: what has not been written is never summed.
        size = (shape.layers, 2 * shape.kv_heads, pool.total, PAGE_TOKENS * shape.head_dim)
        self._pool = torch.empty(size, dtype=self._model.dtype, device=self._model.device)
        self._pool[:, :, pool.zeros] = 0
        self._plan_with(_ROW_MULTIPLES[0])

    def _plan_with(self, row_multiple: int) -> None:
        pool, device = Pool(self.pages), self._model.device
        self._planner = Planner(self.shape, pool, row_multiple=row_multiple, device=device)

    def _logits(self, rows: Sequence[StepRow]) -> Tensor:
        plan = self._planner.plan(rows)
        return self._forward(plan)[: plan.logit_count]

    def _forward(self, plan: Plan) -> Tensor:
        """Logits of the plan's padded `logits`. Nothing in here waits for the device."""
        hidden = self._hidden(plan, range(self.shape.layers))
        if not plan.logit_count:
            return hidden.new_zeros((0, self.vocab_tokens))
        hidden = self._norm(hidden.index_select(0, plan.logits), self._model.final_norm)
        logits = self._model.head(hidden.to(self._model.dtype)).float()
        cap = self.shape.logit_softcap
        return torch.tanh(logits / cap) * cap if cap else logits

    def _hidden(self, plan: Plan, layers: Sequence[int]) -> Tensor:
        """The residual stream behind the last of `layers`, float32 [tokens, hidden]."""
        shape = self.shape
        hidden = functional.embedding(plan.tokens, self._model.embedding).float() * shape.embedding_scale
        turns = [self._turn(plan.positions, *rope) for rope in self._model.ropes]
        groups = {
            window: [(group, visible(group, window)) for group in groups]
            for window, groups in plan.groups.items()
        }
        for index in layers:
            layer, rope = self._model.layers[index], shape.ropes[index]
            queries = self._queries(
                index,
                layer,
                self._norm(hidden, layer.attention_norm),
                turns[rope] if rope >= 0 else None,
                plan,
            )
            attended = self._attended(index, queries, groups[shape.windows[index]])
            attended = layer.output(attended.to(self._model.dtype)).float()
            if layer.output_bias is not None:
                attended = attended + layer.output_bias
            if layer.post_attention_norm is not None:
                attended = self._norm(attended, layer.post_attention_norm)
            hidden = hidden + attended
            fed = self._feed_forward(layer, self._norm(hidden, layer.ffn_norm))
            if layer.post_ffn_norm is not None:
                fed = self._norm(fed, layer.post_ffn_norm)
            hidden = hidden + fed
        return hidden

    def _queries(
        self, index: int, layer: Layer, hidden: Tensor, turn: tuple[Tensor, Tensor] | None, plan: Plan
    ) -> Tensor:
        """Queries [tokens, heads, head_dim]; keys and values go to the pool."""
        shape = self.shape
        qkv = layer.qkv(hidden.to(self._model.dtype)).float()
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias
        qkv = qkv.view(len(qkv), -1, shape.head_dim)
        heads, values = torch.split(qkv, [shape.heads + shape.kv_heads, shape.kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            queries, keys = heads[:, : shape.heads], heads[:, shape.heads :]
            heads = torch.cat([self._norm(queries, layer.q_norm), self._norm(keys, layer.k_norm)], dim=1)
        if turn is not None:
            heads = _turned(heads, *turn)
        slots = self._pool[index].view(2 * shape.kv_heads, -1, shape.head_dim)
        kept = torch.cat([heads[:, shape.heads :], values], dim=1).transpose(0, 1)
        slots.index_copy_(1, plan.slots, kept.to(self._model.dtype))
        if len(plan.cleared):
            slots.index_fill_(1, plan.cleared, 0)
        return heads[:, : shape.heads] * shape.query_scale

    def _attended(self, index: int, queries: Tensor, groups: list[tuple[Group, Tensor]]) -> Tensor:
        """What the queries find, [tokens, heads * head_dim]."""
        head_dim = self.shape.head_dim
        by_head = queries.reshape(-1, head_dim)
        # One row more than there are heads: what only pads is put there.
        mixed = by_head.new_zeros((len(by_head) + 1, head_dim))
        for group, seen in groups:
            keys, values = gather(self._pool[index], group, head_dim)
            found = self._attend(
                by_head.index_select(0, group.queries), keys, values, seen, group, self.shape
            )
            mixed.index_copy_(0, group.outputs, found)
        return mixed[:-1].view(len(queries), -1)

    def _feed_forward(self, layer: Layer, hidden: Tensor) -> Tensor:
        gate, up = layer.gate_up(hidden.to(self._model.dtype)).float().chunk(2, dim=1)
        if self.shape.activation == "silu":
            gate = gate / torch.neg(gate).exp_().add_(1)
        else:
            inner = (gate + gate * gate * gate * 0.044715) * math.sqrt(2 / math.pi)
            gate = gate * 0.5 * (torch.tanh(inner) + 1)
        return layer.down((gate * up).to(self._model.dtype)).float()

    def _norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(rows, (rows.shape[-1],), weight, self.shape.norm_eps)

    def _turn(self, positions: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Cosine and sine, [tokens, 1, head_dim / 2]."""
        angles = positions.float().unsqueeze(1) * frequencies
        return (angles.cos() * scale).unsqueeze(1), (angles.sin() * scale).unsqueeze(1)

    def _exact(self) -> tuple[int, ...]:
        """The numbers of threads with which a row is the same in every step; empty where there are none.

        Sets the planner that makes it so.
        """
        for threads in dict.fromkeys((self._model.threads, self._model.threads[:1])):
            for multiple in _ROW_MULTIPLES:
                self._plan_with(multiple)
                if threads and self._agree(threads):
                    return threads
        return ()

    def _agree(self, threads: tuple[int, ...]) -> bool:
        kinds = zip(self.shape.windows, self.shape.ropes, strict=True)
        one_of_each = sorted({kind: layer for layer, kind in enumerate(kinds)}.values())

        def compute(rows: Sequence[StepRow]) -> Tensor:
            return self._hidden(self._planner.plan(rows), one_of_each)[: sum(len(row.tokens) for row in rows)]

        return steps_agree(
            compute,
            vocab_tokens=self.vocab_tokens,
            context_tokens=self.context_tokens,
            pages=self.pages,
            threads=threads,
        )

    def _name(self, threads: tuple[int, ...]) -> str:
        dtype = str(self._model.dtype).removeprefix("torch.")
        parts = [dtype, f"torch{torch.__version__}", self._model.form, f"rows{self._planner.row_multiple}"]
        if self._model.device.type == "cpu":
            parts.append(torch.backends.cpu.get_cpu_capability())
            if len(threads) == 1:
                # Not seen to be the same with another number.
                parts.append(f"{threads[0]}t")
        else:
            parts.append(torch.cuda.get_device_name(self._model.device).replace(" ", "-"))
        return "/".join(parts)


def _turned(rows: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates each head's halves."""
    left, right = rows.chunk(2, dim=-1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)
