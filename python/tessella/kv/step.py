"""One step of a cache: new tokens of several sequences, appended and attended layer by layer.

Prefill chunks, single tokens and trees of drafts stand side by side in one ragged batch, and each
layer makes one call of attention for all of them (two while some sequences are still young). Plans
are made once and serve every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tessella import ops
from tessella.formats_kv import MASKS, KVPages, MsmBatch
from tessella.formats_mla import MLACache

if TYPE_CHECKING:
    from tessella.kv.cache import PagedKVCache
    from tessella.kv.store import Store

BLOCKS_OF_TWO_SMS = 3
"""Workers of two multiprocessors of a GPU that plans are made for; each has two parts about, and a
multiprocessor takes two to four blocks at a time (measured on an H200: csrc/kv4/README.md)."""


EXPAND_TOKENS = 64
"""From so many new tokens of every sequence on, keys and values are made from latents: attention
in the space of latents takes about three times as many products for each pair."""


@dataclass
class _Crossing:
    """A sequence that has its first tokens together in this step and is coded from now on."""

    row: int
    young: int
    """Its sequence in the young table, which still holds the old tokens."""
    old: int
    """How many those are."""
    tokens: slice
    """Its new tokens in the step."""
    slots: Tensor
    """Of old and new tokens, in the coded pages."""


@dataclass
class _Group:
    """The requests of a step that live in one store."""

    store: Store
    tokens: Tensor | None
    """Their tokens in the step; None: all of them, in order."""
    slots: Tensor
    batch: MsmBatch
    rows: Tensor | None
    """int32 [B]: rows of factors and tails."""
    token_rows: Tensor | None
    has_trees: bool
    crossings: list[_Crossing] = field(default_factory=list)
    plans: dict = field(default_factory=dict)


class Step:
    """Made by :meth:`PagedKVCache.step`, which documents the arguments and has checked them."""

    def __init__(self, cache: PagedKVCache, entries, counts, trees, crossing):
        self.cache = cache
        self.counts = counts
        self.starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        self._entries = entries
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._groups: list[_Group] = []
        moved = {i: self._move(entries[i], counts[i]) for i, c in enumerate(crossing) if c}
        for store in (cache.main, cache.young):
            requests = [i for i, e in enumerate(entries) if e.store is store]
            if requests:
                self._groups.append(self._group(store, requests, trees, moved))

    @property
    def tokens(self) -> int:
        """New tokens of all sequences."""
        return self.starts[-1]

    @property
    def slots(self) -> Tensor:
        """Of all new tokens, where every sequence lives in one store."""
        (group,) = self._groups
        return group.slots

    def attend(
        self,
        layer: int,
        q_THD: Tensor,
        k_TJD: Tensor,
        v_TJD: Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Append the new keys and values, rotated already, and attend: [T, H, D].

        In a cache of latents queries are [T, H, L + R], in the space of latents; keys are latents
        [T, L] and values rope keys [T, R]; the result is [T, H, L].

        Raises ValueError, before anything is written, on shapes and dtypes that are not the
        cache's, and on a tree under a window that it reaches beyond.
        """
        self._check(layer, q_THD, k_TJD, v_TJD)
        if window and any(g.has_trees and int(g.batch.kv_len.max()) > window for g in self._groups):
            raise ValueError(
                "kv cache: tree: expected no sliding window shorter than the sequence, "
                f"got {window}"
            )
        if any(g.has_trees for g in self._groups):
            self._kept[layer] = (k_TJD, v_TJD)
        how = {"scale": scale, "softcap": softcap, "sinks": sinks}
        self.append(layer, k_TJD, v_TJD)
        whole = None
        for group in self._groups:
            pick = group.tokens
            q = q_THD if pick is None else q_THD[pick]
            out = self._attention(layer, group, q, window, how)
            if pick is None:
                return out
            whole = torch.empty_like(q_THD) if whole is None else whole
            whole[pick] = out
        return torch.empty_like(q_THD) if whole is None else whole

    def append(self, layer: int, k_TJD: Tensor, v_TJD: Tensor) -> None:
        """Append the new keys and values, rotated already."""
        for group in self._groups:
            pick = group.tokens
            k, v = (t if pick is None else t[pick] for t in (k_TJD, v_TJD))
            self._write(layer, group.store, k, v, group.slots, group.token_rows)
            for crossing in group.crossings:
                self._code(layer, crossing, k_TJD, v_TJD)

    def expandable(self) -> bool:
        """Whether every sequence gets so many tokens that its keys and values are worth making."""
        return not any(g.has_trees for g in self._groups) and min(self.counts) >= EXPAND_TOKENS

    def attend_expanded(
        self, layer: int, q_THD: Tensor, expand: Callable, *, scale: float, window: int = 0
    ) -> Tensor:
        """Attention over keys and values made from the latents of all sequences: [T, H, E].

        Args:
            q_THD: queries [T, H, D], whose tokens were appended.
            expand: (latents [S, L], rope keys [S, R]) -> keys [S, H, D], values [S, H, E], E <= D.
        """
        (group,) = self._groups
        store, B = group.store, len(self.counts)
        lengths = [int(n) for n in group.batch.kv_len]
        count = [-(-n // store.Z) for n in lengths]
        H, D, E = *q_THD.shape[1:], 0
        padded = -(-D // 16) * 16
        pages = q_THD.new_zeros(sum(count), H, 2, store.Z, padded)
        table = torch.zeros(B, max(count), dtype=torch.int32)
        at = 0
        for b, (entry, n) in enumerate(zip(self._entries, lengths)):
            k, v = expand(*store.read_latents(layer, entry.handle, n))
            E = v.shape[-1]
            own = pages[at : at + count[b]]
            rest = count[b] * store.Z - n
            for which, x in enumerate((k, v)):
                x = torch.nn.functional.pad(x.to(q_THD.dtype), (0, 0, 0, 0, 0, rest))
                own[:, :, which, :, : x.shape[-1]] = x.unflatten(0, (-1, store.Z)).transpose(1, 2)
            table[b, : count[b]] = torch.arange(at, at + count[b])
            at += count[b]
        mask = torch.full_like(group.batch.kv_len, MASKS["window"]) if window else None
        batch = replace(group.batch, block_table=table, mask=mask)
        q = torch.nn.functional.pad(q_THD, (0, padded - D))
        out = ops.msm_attn(q, KVPages(pages), self._on_device(batch), scale=scale, window=window)
        return out[..., :E]

    def keep(self, request: int, path: list[int]) -> None:
        """Of a request's new tokens keep those of `path`, in that order, and forget the others.

        What stood elsewhere is appended once more, at the place that it has now; so the position
        (and rotation) of a token in a tree is its depth, not its place. Call it once for a
        request, after the last layer.

        Raises ValueError for a codec that does not code each token by itself.
        """
        if not self.cache.codec.token_exact:
            raise ValueError(
                f"kv cache: keep: expected a codec that codes each token by itself, "
                f"got {self.cache.codec.name}"
            )
        entry, base = self._entries[request], self.starts[request]
        table = entry.store.table
        history = table[entry.handle].length - self.counts[request]
        moved = [i for i, token in enumerate(path) if token != i]
        if moved:
            (group,) = self._groups
            target = group.slots[[base + i for i in moved]]
            source = [base + path[i] for i in moved]
            for layer, (k, v) in self._kept.items():
                self._write(layer, group.store, k[source], v[source], target)
        table.truncate(entry.handle, history + len(path))

    def _move(self, entry, count: int) -> _Crossing:
        """Take a sequence out of the young pages: room for all its tokens in the coded ones."""
        young, handle = entry.store.table, entry.handle
        old = young[handle].length
        main = self.cache.main
        entry.store, entry.handle = main, main.table.open()
        slots = main.grow([entry.handle], [old + count])
        self.cache.retire(handle)
        return _Crossing(entry.row, handle, old, slice(0), self._tensor(slots, torch.int64))

    def _group(self, store: Store, requests: list[int], trees, moved) -> _Group:
        entries = [self._entries[i] for i in requests]
        counts = [self.counts[i] for i in requests]
        spans = [range(self.starts[i], self.starts[i + 1]) for i in requests]
        still = [(e.handle, n) for i, e, n in zip(requests, entries, counts) if i not in moved]
        grown = iter(store.grow(*map(list, zip(*still))) if still else [])
        slots: list[int] = []
        for i, n in zip(requests, counts):
            slots += [-1] * n if i in moved else [next(grown) for _ in range(n)]
            if i in moved:
                moved[i].tokens = slice(self.starts[i], self.starts[i + 1])
        everything = len(requests) == len(self.counts)
        by_row = store is self.cache.main and self.cache.has_rows
        rows = [e.row for e in entries]
        return _Group(
            store=store,
            tokens=None if everything else self._tensor([t for s in spans for t in s], torch.int64),
            slots=self._tensor(slots, torch.int64),
            batch=self._batch(store, entries, counts, [trees[i] for i in requests]),
            rows=self._tensor(rows, torch.int32) if by_row else None,
            token_rows=self._tensor(
                [r for r, n in zip(rows, counts) for _ in range(n)], torch.int32
            )
            if by_row
            else None,
            has_trees=any(trees[i] is not None for i in requests),
            crossings=[moved[i] for i in requests if i in moved],
        )

    def _batch(self, store: Store, entries, counts: list[int], trees) -> MsmBatch:
        """On the CPU; what a plan is made from."""
        sequences = [store.table[e.handle] for e in entries]
        table = torch.zeros(len(entries), max(len(s.blocks) for s in sequences), dtype=torch.int32)
        for row, seq in zip(table, sequences):
            row[: len(seq.blocks)] = torch.tensor(seq.blocks, dtype=torch.int32)
        cu_q = torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32)
        kv_len = torch.tensor([s.length for s in sequences], dtype=torch.int32)
        if all(tree is None for tree in trees):
            return MsmBatch(table, cu_q, kv_len)
        kinds = [MASKS["causal" if tree is None else "tree"] for tree in trees]
        words = max(-(-len(tree) // 64) for tree in trees if tree is not None)
        bits = [tree_bits(tree, words) for tree in trees if tree is not None]
        first = torch.tensor([0 if tree is None else len(tree) for tree in trees]).cumsum(0)
        tree_row = [-1 if t is None else int(end) - len(t) for t, end in zip(trees, first)]
        return MsmBatch(
            table,
            cu_q,
            kv_len,
            torch.tensor(kinds, dtype=torch.int32),
            torch.cat(bits),
            torch.tensor(tree_row, dtype=torch.int32),
        )

    def _write(
        self,
        layer: int,
        store: Store,
        k: Tensor,
        v: Tensor,
        slots: Tensor,
        rows: Tensor | None = None,
    ) -> None:
        pages = store.layers[layer]
        if isinstance(pages, MLACache):
            ops.mla_append(k, v, slots, pages)
            return
        if isinstance(pages, KVPages):
            ops.msm_append(k, v, slots, pages)
            return
        codec = self.cache.codec
        ops.kv4_append(
            k,
            v,
            slots,
            pages,
            factors=self.cache.factors[layer],
            rows=rows if codec.fit_tokens else None,
            tail_row=rows if codec.by_channel else None,
        )

    def _code(self, layer: int, crossing: _Crossing, k_TJD: Tensor, v_TJD: Tensor) -> None:
        """Fit a sequence's factors to its first tokens, and code all that it has."""
        cache = self.cache
        old = cache.young.read(layer, crossing.young, crossing.old)
        k, v = (torch.cat([a, b[crossing.tokens].to(a.dtype)]) for a, b in zip(old, (k_TJD, v_TJD)))
        n = cache.codec.fit_tokens
        fitted, table = cache.codec.fit(k[:n].float(), v[:n].float()), cache.factors[layer]
        for name, t in vars(fitted).items():
            if t is not None:
                getattr(table, name)[crossing.row] = t[0]
        rows = torch.full_like(crossing.slots, crossing.row, dtype=torch.int32)
        self._write(layer, cache.main, k, v, crossing.slots, rows)

    def _attention(self, layer: int, group: _Group, q: Tensor, window: int, how: dict) -> Tensor:
        pages = group.store.layers[layer]
        H, J = q.shape[1], self.cache.shape.J
        if (H, window) not in group.plans:
            batch = group.batch
            if window:
                kinds = torch.full_like(batch.kv_len, MASKS["window"])
                batch = replace(batch, mask=kinds)
            plan = ops.msm_plan(batch, H, J, window=window, units=workers(q.device))
            group.plans[H, window] = self._on_device(batch), plan.to(q.device)
        batch, plan = group.plans[H, window]
        if isinstance(pages, MLACache):
            q, q_rope = q[..., : pages.L], q[..., pages.L :]
            return ops.mla_decode(q, q_rope, pages, batch, window=window, plan=plan, **how)
        if isinstance(pages, KVPages):
            return ops.msm_attn(q, pages, batch, window=window, plan=plan, **how)
        codec = self.cache.codec
        return ops.kv4_attn(
            q,
            pages,
            batch,
            factors=self.cache.factors[layer],
            rows=group.rows if codec.fit_tokens else None,
            tail_row=group.rows if codec.by_channel else None,
            window=window,
            plan=plan,
            **how,
        )

    def _on_device(self, batch: MsmBatch) -> MsmBatch:
        device = self.cache.shape.device
        return MsmBatch(*(None if t is None else t.to(device) for t in vars(batch).values()))

    def _tensor(self, values: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.cache.shape.device)

    def _check(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        s = self.cache.shape
        shapes = {"k": (self.tokens, s.J, s.D), "v": (self.tokens, s.J, s.D)}
        if s.latents:
            shapes = dict(zip(shapes, ((self.tokens, n) for n in s.latents[layer])))
        for (name, shape), t in zip(shapes.items(), (k, v)):
            if tuple(t.shape) != shape or t.dtype != s.dtype:
                raise ValueError(
                    f"kv cache: {name}: expected {s.dtype} {shape}, got {t.dtype} {tuple(t.shape)}"
                )
        if s.latents:
            return
        if q.dim() != 3 or q.shape[0] != self.tokens or q.shape[2] != s.D or q.shape[1] % s.J:
            raise ValueError(
                f"kv cache: q: expected [{self.tokens}, a multiple of {s.J}, {s.D}], "
                f"got {tuple(q.shape)}"
            )


def workers(device: torch.device) -> int:
    """Blocks that work at a time on a GPU, for plans; 0 elsewhere: torch's threads."""
    if device.type != "cuda":
        return 0
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return BLOCKS_OF_TWO_SMS * sms // 2


def tree_bits(tree_NN: Tensor, words: int = 0) -> Tensor:
    """int64 [N, words]: bit j % 64 of word j // 64 of row i is ``tree[i, j]``."""
    N = len(tree_NN)
    bits = torch.zeros(N, max(words, -(-N // 64)), 64, dtype=torch.int64)
    bits.view(N, -1)[:, :N] = tree_NN
    return (bits << torch.arange(64)).sum(-1)
