"""Ragged batches over poisoned caches, shared by tests and benches of attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessella.formats_kv import MASKS, MsmBatch

ABSURD_PAGE = 2**31 - 7
"""What stands in unused entries of a block table."""


def make_batch(
    q_len: Sequence[int],
    kv_len: Sequence[int],
    Z: int,
    generator: torch.Generator,
    mask: Sequence[str] | None = None,
    shared_pages: int = 0,
) -> tuple[MsmBatch, int]:
    """(batch, pages it needs): shuffled pages, absurd unused entries, random trees.

    The first `shared_pages` pages of every request are those of request 0.
    """
    B = len(q_len)
    pages = [-(-n // Z) for n in kv_len]
    order = torch.randperm(sum(pages) + 2, generator=generator, dtype=torch.int32)
    table = torch.full((B, max([*pages, 1]) + 2), ABSURD_PAGE, dtype=torch.int32)
    at = 0
    for b, n in enumerate(pages):
        table[b, :n] = order[at : at + n]
        at += n
        k = min(shared_pages, n, pages[0])
        table[b, :k] = table[0, :k]
    cu_q = torch.tensor([0, *q_len]).cumsum(0).int()
    codes, bits, rows = None, None, None
    if mask is not None:
        codes = torch.tensor([MASKS[m] for m in mask], dtype=torch.int32)
        if "tree" in mask:
            bits, rows = make_trees(q_len, mask, generator)
    lengths = torch.tensor(list(kv_len), dtype=torch.int32)
    return MsmBatch(table, cu_q, lengths, codes, bits, rows), sum(pages) + 2


def make_trees(
    q_len: Sequence[int], mask: Sequence[str], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(tree_bits, tree_row): every token of a tree sees itself and its ancestors."""
    words = -(-max(q_len) // 64)
    rows, first, bits = [], [], []
    for n, kind in zip(q_len, mask, strict=True):
        first.append(len(rows) if kind == "tree" else -1)
        if kind != "tree":
            continue
        seen: list[int] = []
        for i in range(n):
            parent = int(torch.randint(-1, i, (1,), generator=generator)) if i else -1
            seen.append((seen[parent] if parent >= 0 else 0) | 1 << i)
        rows += seen
    for value in rows:
        row = [value >> (64 * w) & (2**64 - 1) for w in range(words)]
        bits.append([x - 2**64 if x >= 2**63 else x for x in row])
    return torch.tensor(bits, dtype=torch.int64).view(-1, words), torch.tensor(
        first, dtype=torch.int32
    )


def poison_unused(pages: Tensor, batch: MsmBatch, Z: int) -> None:
    """Set what no request may read in float pages [P, J, 2, Z, D] to NaN: tails and whole pages."""
    used = torch.zeros(pages.shape[0], Z, dtype=torch.bool)
    for b, n in enumerate(batch.kv_len.tolist()):
        for i in range(-(-n // Z)):
            used[int(batch.block_table[b, i]), : min(Z, n - i * Z)] = True
    pages.permute(0, 3, 1, 2, 4)[~used] = float("nan")
