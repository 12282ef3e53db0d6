"""Attention of a group of queries over keys and values gathered from the pool's pages.

Two forms of the same sum. `attend_blocks` fixes the order in which it is taken; `attend_fused` leaves that to
torch's kernels, and is what a GPU is quick at.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from services.inference.engine.model.plan import BLOCK_TOKENS, Group
from services.inference.engine.model.weights import ModelShape


def visible(group: Group, window: int) -> Tensor:
    """Bool [items, blocks, rows, BLOCK_TOKENS]: which keys each row sees."""
    keys = torch.arange(group.blocks * BLOCK_TOKENS, device=group.pages.device)
    keys = group.first_keys + keys.view(1, group.blocks, 1, BLOCK_TOKENS)
    seen = keys <= group.positions
    return seen & (keys > group.positions - window) if window else seen


def gather(pool: Tensor, group: Group, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values [kv_heads * items, length, head_dim], from a layer's [2 * kv_heads, pages, ...]."""
    pages = pool.index_select(1, group.pages)
    keys, values = pages.view(2, -1, group.blocks * BLOCK_TOKENS, head_dim)
    return keys, values


def attend_blocks(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, group: Group, shape: ModelShape
) -> Tensor:
    """[kv_heads * items * rows, head_dim] from queries of the same shape; float32 inside.

    The products are of one size whatever the step holds, each block is summed by itself and the blocks in the
    order of their positions. A block that a row does not see adds exact zeros.
    """
    heads, items, blocks, rows = shape.kv_heads, group.items, group.blocks, group.rows
    products, head_dim = heads * items * blocks, shape.head_dim
    repeated = queries.view(heads * items, 1, rows, head_dim).expand(-1, blocks, -1, -1)
    keys = keys.float().reshape(products, BLOCK_TOKENS, head_dim)
    scores = torch.bmm(repeated.reshape(products, rows, head_dim), keys.transpose(1, 2))
    if shape.attention_softcap:
        scores = torch.tanh(scores / shape.attention_softcap) * shape.attention_softcap
    scores = scores.view(heads, items, blocks, rows, BLOCK_TOKENS).masked_fill_(~seen, -math.inf)
    highest = scores.amax(dim=(2, 4), keepdim=True)
    shares = (scores - highest).exp_()
    totals = shares.sum(-1)
    values = values.float().reshape(products, BLOCK_TOKENS, head_dim)
    sums = torch.bmm(shares.view(products, rows, BLOCK_TOKENS), values)
    sums = sums.view(heads, items, blocks, rows, head_dim)
    total, mixed = totals[:, :, 0], sums[:, :, 0]
    for block in range(1, blocks):
        total = total + totals[:, :, block]
        mixed = mixed + sums[:, :, block]
    return (mixed / total.unsqueeze(-1)).view(heads * items * rows, head_dim)


def attend_fused(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, group: Group, shape: ModelShape
) -> Tensor:
    """The same with torch's own attention, in the dtype of the keys. Without a cap on the scores."""
    heads, items, rows, head_dim = shape.kv_heads, group.items, group.rows, shape.head_dim
    length = group.blocks * BLOCK_TOKENS
    mixed = torch.nn.functional.scaled_dot_product_attention(
        queries.view(heads, items, rows, head_dim).to(keys.dtype),
        keys.view(heads, items, length, head_dim),
        values.view(heads, items, length, head_dim),
        attn_mask=seen.transpose(1, 2).reshape(1, items, rows, length).expand(heads, -1, -1, -1),
        scale=1.0,
    )
    return mixed.float().reshape(heads * items * rows, head_dim)
