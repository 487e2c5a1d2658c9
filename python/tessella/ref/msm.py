"""Reference of msm: attention over paged keys and values, one request after another, in fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tessella.formats_kv import MASKS, MsmBatch, as_stored

TILES = (16, 32, 64, 128)
"""Packed rows (tokens times query heads of a kv head) of a task."""

HEADER, TASK, MERGE = 16, 8, 5
"""int32 words of a plan's header, of a task and of a merge (csrc/msm/plan.h)."""

MAGIC = 0x6D736D31
"""First word of every plan."""


def visible(batch: MsmBatch, b: int, window: int) -> Tensor:
    """Which of request b's keys each of its query tokens sees: bool [q_len, kv_len]."""
    q_len, kv_len = int(batch.cu_q[b + 1] - batch.cu_q[b]), int(batch.kv_len[b])
    kind = MASKS["causal"] if batch.mask is None else int(batch.mask[b])
    pos = torch.arange(kv_len - q_len, kv_len)[:, None]
    key = torch.arange(kv_len)[None]
    if kind == MASKS["full"]:
        return torch.ones(q_len, kv_len, dtype=torch.bool)
    if kind == MASKS["causal"]:
        return key <= pos
    if kind == MASKS["window"]:
        return (key <= pos) & (key > pos - window)
    seen = (key < kv_len - q_len).repeat(q_len, 1)
    row = int(batch.tree_row[b])
    for i in range(q_len):
        for j in range(q_len):
            word = int(batch.tree_bits[row + i, j // 64])
            seen[i, kv_len - q_len + j] = bool(word >> (j % 64) & 1)
    return seen


def attend(
    q_THD: Tensor,
    batch: MsmBatch,
    keys_values: Callable[[int], tuple[Tensor, Tensor]],
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every request in fp64: (out [T, H, D], lse [T, H]).

    ``keys_values(b)`` gives the keys and values [kv_len, J, D] of request b. A row that sees no key
    gives 0, and lse -inf, or the sink.
    """
    T, H, D = q_THD.shape
    out = torch.zeros(T, H, D, dtype=torch.float64)
    lse = torch.full((T, H), -torch.inf, dtype=torch.float64)
    for b in range(len(batch.kv_len)):
        lo, hi = int(batch.cu_q[b]), int(batch.cu_q[b + 1])
        if lo == hi:
            continue
        k, v = (t.double() for t in keys_values(b))
        G, seen = H // k.shape[1], visible(batch, b, window)
        for h in range(H):
            score = q_THD[lo:hi, h].double() @ k[:, h // G].T * scale
            if softcap > 0:
                score = softcap * torch.tanh(score / softcap)
            score = score.masked_fill(~seen, -torch.inf)
            if sinks is not None:
                sink = sinks[h].double().expand(hi - lo, 1)
                score = torch.cat([score, sink], 1)
            total = torch.logsumexp(score, 1)
            p = torch.exp(score - total.masked_fill(total == -torch.inf, 0.0)[:, None])
            out[lo:hi, h] = p[:, : len(k)] @ v[:, h // G]
            lse[lo:hi, h] = total
    return out, lse


def gather(pages_PJ2ZD: Tensor, batch: MsmBatch, b: int) -> tuple[Tensor, Tensor]:
    """Keys and values [kv_len, J, D] of request b."""
    Z, kv_len = pages_PJ2ZD.shape[3], int(batch.kv_len[b])
    page = batch.block_table[b, : -(-kv_len // Z)].long()
    both = _pages(pages_PJ2ZD, page).permute(2, 0, 3, 1, 4).flatten(1, 2)[:, :kv_len]
    return both[0], both[1]


def _pages(pages: Tensor, index: Tensor) -> Tensor:
    """Some pages; torch indexes bytes, but no E4M3 numbers, and does not multiply them."""
    if pages.dtype != torch.float8_e4m3fn:
        return pages[index]
    return pages.view(torch.uint8)[index].view(pages.dtype).float()


def msm_attn(q_THD: Tensor, pages_PJ2ZD: Tensor, batch: MsmBatch, **how) -> tuple[Tensor, Tensor]:
    """Attention over pages of plain numbers in fp64; `how` as for :func:`attend`."""
    return attend(q_THD, batch, lambda b: gather(pages_PJ2ZD, batch, b), **how)


def rotate(x_TJD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding by halves (RoFormer, section 3.2.2) of R channels, in fp32.

    cos and sin are [T, R/2]; products and sums are rounded one by one.
    """
    half = cos.shape[1]
    x = x_TJD.float()
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos[:, None], sin[:, None]
    return torch.cat([a * c - b * s, b * c + a * s, rest], -1)


def msm_append(
    k_TJD: Tensor,
    v_TJD: Tensor,
    slots: Tensor,
    pages_PJ2ZD: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """Write keys (rotated) and values to their slots; slots outside the cache are skipped."""
    P, _, _, Z, _ = pages_PJ2ZD.shape
    k = k_TJD if cos is None else rotate(k_TJD, cos, sin)
    for t, slot in enumerate(slots.tolist()):
        if 0 <= slot < P * Z:
            for half, x in enumerate((k, v_TJD)):
                kept = as_stored(x[t], pages_PJ2ZD.dtype)
                pages_PJ2ZD[slot // Z, :, half, slot % Z].copy_(kept)


def plan(batch: MsmBatch, H: int, J: int, window: int = 0) -> Tensor:
    """The simplest plan: every request in tiles, nothing split, in the order of the batch."""
    G, rows = H // J, []
    for b in range(len(batch.kv_len)):
        n = int(batch.cu_q[b + 1] - batch.cu_q[b]) * G
        tile = next((t for t in TILES if n <= t), TILES[-1])
        for row0 in range(0, n, tile):
            count = min(tile, n - row0)
            rows.append([b, tile, row0, count, 0, int(batch.kv_len[b]), -1, 0])
    words = HEADER + TASK * len(rows)
    T = int(batch.cu_q[-1])
    header = [MAGIC, words, len(batch.kv_len), T, H, J, len(rows), 0, 0, 1, 0, window]
    flat = header + [0] * (HEADER - len(header)) + [x for r in rows for x in r]
    return torch.tensor(flat, dtype=torch.int32)
