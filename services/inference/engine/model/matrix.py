"""Products with a model's matrices, in the quickest form whose rows do not depend on their neighbours.

Which form that is depends on the machine's kernels, so it is tried: `choose` takes the first form that
computes every row alike in every batch it is tried in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""From [rows, inputs] to [rows, outputs], both in the matrix's dtype."""

_TRIED_ROWS = (1, 2, 5, 8)
_REFERENCE_ROWS = 16


@dataclass(frozen=True, slots=True)
class Form:
    """A way to multiply."""

    name: str
    """Part of `numerics`."""
    prepare: Callable[[Tensor], Product]
    """From the matrix [outputs, inputs]. Raises RuntimeError where the machine cannot."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The form to use."""

    form: Form
    exact: bool
    """Rows are the same in every batch."""
    ready: dict[int, Product]
    """By `id`: matrices that were prepared to be tried."""


def forms(dtype: torch.dtype, device: torch.device) -> Sequence[Form]:
    """The quickest first."""
    if device.type != "cpu":
        return (Form("linear", _linear(1)),)
    padded = tuple(Form(f"linear{rows}", _linear(rows)) for rows in (4, 16, 32))
    # Packed weights in float32 are as quick as any; in bfloat16 they need instructions for it.
    return (Form("packed", _packed), Form("linear", _linear(1)), *padded)


def choose(matrices: Sequence[Tensor], threads: Sequence[int]) -> Choice:
    """The form for these matrices, tried on one of each shape, with each number of threads."""
    distinct = list({tuple(matrix.shape): matrix for matrix in matrices}.values())
    possible = [form for form in forms(distinct[0].dtype, distinct[0].device) if _works(form, distinct[0])]
    for form in possible:
        ready = {id(matrix): form.prepare(matrix) for matrix in distinct}
        if all(_exact(ready[id(matrix)], matrix, threads) for matrix in distinct):
            return Choice(form, exact=True, ready=ready)
    return Choice(possible[0], exact=False, ready={})


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Runs the body with so many threads of torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _works(form: Form, matrix: Tensor) -> bool:
    try:
        form.prepare(matrix)(matrix[:1])
    except RuntimeError:
        return False
    return True


def _exact(product: Product, matrix: Tensor, threads: Sequence[int]) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_REFERENCE_ROWS, matrix.shape[1], generator=generator).to(matrix)
    reference = product(rows)
    for count in threads:
        with thread_count(count):
            tried = [(0, size) for size in _TRIED_ROWS] + [(_REFERENCE_ROWS - 3, 3)]
            if count != threads[0]:
                tried.append((0, _REFERENCE_ROWS))
            for start, size in tried:
                # A batch of its own: how memory is aligned must not matter.
                alone = product(rows[start : start + size].clone())
                if not torch.equal(alone, reference[start : start + size]):
                    return False
    return True


def _packed(matrix: Tensor) -> Product:
    """oneDNN with weights in its own order."""
    operations = torch.ops.mkldnn
    packed = operations._reorder_linear_weight(matrix, None)

    def product(rows: Tensor) -> Tensor:
        out: Tensor = operations._linear_pointwise(rows, packed, None, "none", [], "")
        return out

    return product


def _linear(multiple: int) -> Callable[[Tensor], Product]:
    """torch's own, with rows padded to a multiple: kernels for few rows sum in another order."""

    def prepare(matrix: Tensor) -> Product:
        def product(rows: Tensor) -> Tensor:
            missing = -len(rows) % multiple
            if missing:
                padded = torch.nn.functional.pad(rows, (0, 0, 0, missing))
                return torch.nn.functional.linear(padded, matrix)[: len(rows)]
            return torch.nn.functional.linear(rows, matrix)

        return product

    return prepare
