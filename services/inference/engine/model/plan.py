"""A step as index tensors: what is read from and written to the pool, and which rows attend together.

Made on the host once for a step, the same for all layers of one window. Attention goes over blocks of
BLOCK_TOKENS keys at fixed positions of the sequence, so a query's sums do not depend on how a prompt was cut;
what stands beside a row only decides how far it is padded, and padding adds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.inference.engine.model.weights import ModelShape
from services.inference.engine.step import PAGE_TOKENS, StepRow

BLOCK_TOKENS = 64
_BLOCK_PAGES = BLOCK_TOKENS // PAGE_TOKENS
_TILE_TOKENS = 64
"""Queries of one sequence that attend together, at most."""
_GROUP_FLOATS = 1 << 24
"""Scores, and keys, of one group at most, all heads together: 64 MiB each."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pool:
    """Where the pages that nobody owns stand."""

    pages: int

    @property
    def zeros(self) -> int:
        """Read where a sequence has no page; never written."""
        return self.pages

    @property
    def trash(self) -> int:
        """Written where nothing is to be kept; never read."""
        return self.pages + 1

    @property
    def total(self) -> int:
        return self.pages + 2


@dataclass(frozen=True, slots=True)
class Group:
    """Queries that attend in one go: `items` pieces of sequences, each padded to `rows` rows and `blocks`
    blocks of keys. A row is one token and one of the query heads that share a key head."""

    items: int
    blocks: int
    rows: int
    pages: Tensor
    """[items * blocks * pages of a block]."""
    queries: Tensor
    """[kv_heads * items * rows]: where each row's query stands in [tokens * heads]."""
    outputs: Tensor
    """The same, and one past the end for rows that only pad."""
    positions: Tensor
    """[items, 1, rows, 1]: of the rows' tokens."""
    first_keys: Tensor
    """[items, 1, 1, 1]: the position of the first key."""

    def tensors(self) -> tuple[Tensor, ...]:
        return self.pages, self.queries, self.outputs, self.positions, self.first_keys

    def to(self, device: torch.device) -> Group:
        """On the device."""
        pages, queries, outputs, positions, first_keys = (tensor.to(device) for tensor in self.tensors())
        return Group(self.items, self.blocks, self.rows, pages, queries, outputs, positions, first_keys)


@dataclass(frozen=True, slots=True)
class Plan:
    """One step."""

    tokens: Tensor
    """[tokens], padded."""
    positions: Tensor
    """[tokens]."""
    slots: Tensor
    """[tokens]: where in the pool (page * PAGE_TOKENS + place) keys and values go."""
    cleared: Tensor
    """Slots behind the end of each sequence that begins a page, up to the end of that page. They become zero:
    what another sequence left there cannot reach a sum, not even as NaN."""
    groups: dict[int, tuple[Group, ...]]
    """By window."""
    logits: Tensor
    """Which tokens' logits are wanted, padded."""
    logit_count: int

    def tensors(self) -> Iterator[Tensor]:
        """All of them, always in the same order."""
        yield from (self.tokens, self.positions, self.slots, self.cleared, self.logits)
        for groups in self.groups.values():
            for group in groups:
                yield from group.tensors()

    def key(self) -> tuple[object, ...]:
        """Equal for plans whose tensors have the same shapes."""
        return tuple(tuple(tensor.shape) for tensor in self.tensors())

    def to(self, device: torch.device) -> Plan:
        """On the device."""
        return Plan(
            tokens=self.tokens.to(device),
            positions=self.positions.to(device),
            slots=self.slots.to(device),
            cleared=self.cleared.to(device),
            groups={
                window: tuple(each.to(device) for each in groups) for window, groups in self.groups.items()
            },
            logits=self.logits.to(device),
            logit_count=self.logit_count,
        )


def bucket(count: int) -> int:
    """`count` padded so that few sizes occur: kernels are built, and graphs captured, once for each."""
    if count <= 8:
        return 1 << max(0, count - 1).bit_length()
    return -(-count // 8) * 8


def _blocks_bucket(count: int) -> int:
    """A power of two, or one and a half of one."""
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


@dataclass(frozen=True, slots=True)
class _Item:
    """A piece of a row: `count` tokens from the flat index `first`."""

    pages: Ints
    first: int
    count: int
    position: int

    def first_block(self, window: int) -> int:
        return max(0, self.position - window + 1) // BLOCK_TOKENS if window else 0

    def blocks(self, window: int) -> int:
        return -(-(self.position + self.count) // BLOCK_TOKENS) - self.first_block(window)


class Planner:
    """Makes plans for one model and one pool."""

    def __init__(self, shape: ModelShape, pool: Pool, *, row_multiple: int, device: torch.device) -> None:
        """`row_multiple`: what a group's rows are padded to a multiple of."""
        self._shape = shape
        self._pool = pool
        self.row_multiple = row_multiple
        self._device = device
        self._group_heads = shape.heads // shape.kv_heads

    def plan(self, rows: Sequence[StepRow], *, static: bool = False) -> Plan:
        """`static`, for rows of one token each: shapes depend only on how many rows there are, and on the
        longest's blocks, both as `bucket` has them."""
        page_ids = [_ids(row.pages[: -(-(row.position + len(row.tokens)) // PAGE_TOKENS)]) for row in rows]
        counts = [len(row.tokens) for row in rows]
        starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
        tokens = bucket(starts[-1])
        positions = np.concatenate([np.arange(row.position, row.position + len(row.tokens)) for row in rows])
        slots = np.concatenate(
            [
                pages[own // PAGE_TOKENS] * PAGE_TOKENS + own % PAGE_TOKENS
                for pages, own in zip(page_ids, np.split(positions, starts[1:-1]), strict=True)
            ]
        )
        wanted = np.concatenate(
            [
                np.arange(end - row.logits, end, dtype=np.int64)
                for row, end in zip(rows, starts[1:], strict=True)
            ]
        )
        items = [
            _Item(pages, start + offset, min(tile, count - offset), row.position + offset)
            for row, pages, start, count in zip(rows, page_ids, starts, counts, strict=False)
            if (tile := self._tile(row.position + count))
            for offset in range(0, count, tile)
        ]
        padding = [_Item(_ids([]), 0, 1, 0)] * (tokens - len(rows)) if static else []
        return Plan(
            tokens=self._padded(np.concatenate([_ids(row.tokens) for row in rows]), tokens, 0),
            positions=self._padded(positions, tokens, 0),
            slots=self._padded(slots, tokens, self._pool.trash * PAGE_TOKENS),
            cleared=self._cleared(rows, slots[np.asarray(starts[1:]) - 1], tokens if static else None),
            groups={
                window: tuple(self._groups(items, padding, window, tokens, static=static))
                for window in sorted(set(self._shape.windows))
            },
            logits=self._padded(wanted, tokens if static else bucket(len(wanted)), 0),
            logit_count=len(wanted),
        )

    def _tile(self, end: int) -> int:
        """How many tokens of a sequence of `end` tokens attend together: so many that the scores fit."""
        fit = _GROUP_FLOATS // (self._shape.heads * end)
        return min(_TILE_TOKENS, 1 << max(0, fit.bit_length() - 1))

    def _cleared(self, rows: Sequence[StepRow], last_slots: Ints, padded_rows: int | None) -> Tensor:
        """`last_slots`: where each row's last token goes. `padded_rows`: where shapes are fixed."""
        begins = np.asarray(
            [len(row.tokens) > (row.position + len(row.tokens) - 1) % PAGE_TOKENS for row in rows]
        )
        behind = last_slots[:, None] + np.arange(1, PAGE_TOKENS)
        kept = begins[:, None] & (behind // PAGE_TOKENS == last_slots[:, None] // PAGE_TOKENS)
        if padded_rows is None:
            return self._tensor(behind[kept])
        trash = self._pool.trash * PAGE_TOKENS
        return self._padded(np.where(kept, behind, trash).ravel(), padded_rows * (PAGE_TOKENS - 1), trash)

    def _groups(
        self, items: list[_Item], padding: list[_Item], window: int, tokens: int, *, static: bool
    ) -> Iterator[Group]:
        """Items alike in length attend together; all of them where the plan is static."""
        alike: dict[tuple[int, int], list[_Item]] = {}
        longest = max(item.blocks(0) for item in items)
        if window:
            # So many at most, wherever in a block the window begins.
            longest = min(longest, (window - 1) // BLOCK_TOKENS + 2)
        for item in items:
            blocks = longest if static else item.blocks(window)
            alike.setdefault((bucket(item.count), _blocks_bucket(blocks)), []).append(item)
        for (count, blocks), members in alike.items():
            floats = (
                blocks
                * BLOCK_TOKENS
                * max(self._shape.heads * count, 2 * self._shape.kv_heads * self._shape.head_dim)
            )
            most = len(members) if static else max(1, _GROUP_FLOATS // floats)
            for start in range(0, len(members), most):
                part = members[start : start + most]
                yield self._group(part + padding, len(part), count, blocks, window, tokens)

    def _group(
        self, items: list[_Item], real: int, count: int, blocks: int, window: int, tokens: int
    ) -> Group:
        shape, group_heads = self._shape, self._group_heads
        rows = -(-count * group_heads // self.row_multiple) * self.row_multiple
        pages = np.full((len(items), blocks * _BLOCK_PAGES), self._pool.zeros, dtype=np.int64)
        for index, item in enumerate(items):
            # The last page that this piece sees: a page further on may be written in this very step.
            end = -(-(item.position + item.count) // PAGE_TOKENS)
            own = item.pages[item.first_block(window) * _BLOCK_PAGES : end]
            pages[index, : len(own)] = own
        # A padding row repeats the last token, or a head of it; nobody reads what it computes.
        row = np.arange(rows)
        place = np.minimum(row // group_heads, np.asarray([[item.count - 1] for item in items]))
        token = np.asarray([[item.first] for item in items]) + place
        position = np.asarray([[item.position] for item in items]) + place
        head = np.arange(shape.kv_heads)[:, None, None] * group_heads + row % group_heads
        queries = token * shape.heads + head
        outputs = queries.copy()
        outputs[:, row // group_heads != place] = tokens * shape.heads
        outputs[:, real:] = tokens * shape.heads
        first_keys = np.asarray([item.first_block(window) * BLOCK_TOKENS for item in items])
        return Group(
            items=len(items),
            blocks=blocks,
            rows=rows,
            pages=self._tensor(pages.ravel()),
            queries=self._tensor(queries.ravel()),
            outputs=self._tensor(outputs.ravel()),
            positions=self._tensor(position[:, None, :, None]),
            first_keys=self._tensor(first_keys[:, None, None, None]),
        )

    def _padded(self, values: Ints, size: int, filler: int) -> Tensor:
        return self._tensor(np.concatenate([values, np.full(size - len(values), filler, dtype=np.int64)]))

    def _tensor(self, values: Ints) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if self._device.type == "cpu":
            return tensor
        # Pinned, so that the copy does not wait for the device.
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _ids(values: Iterable[int]) -> Ints:
    return np.fromiter(values, dtype=np.int64)
