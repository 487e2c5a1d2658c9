"""Bands of frequencies for one layer: which neighbours FreqFold may treat as one, and which not.

A wide band gathers more of the keys' energy in the channels that keep RoPE, and its angles are
less exact. How much that costs depends on the frequency: over a window, the slow ones of a head
hardly differ, the fast ones do after a few tokens. So one width for all is a compromise; here a
layer's bands are chosen one by one, by what the attention's output of the layer loses.

Scores are sums over bands, so the error of a score is the sum of each band's own, and bands can be
split, merged and moved one at a time, against a sample of queries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tessella.mla.attention import GQA, Angles
from tessella.mla.rotate import band_components
from tessella.mla.shape import Fold, bands_of

SCORES = 1 << 20
"""Scores, over heads, queries and keys, that bands are judged by; more cost time and memory."""

WINDOWS = 16
"""Most windows of text that queries are taken from."""

GAIN = 2e-3
"""Least relative gain of a change: less is the noise of a sample."""

_MEMORY = 1 << 30
"""Bytes of errors of bands that are kept for when they are tried again."""


class BandSearch:
    """Chooses bands for one layer.

    Args:
        gqa: the layer's attention, fp32.
        x: [N, T, hidden], what it reads.
        angles: cos and sin [T, D / 2] of its RoPE.
        moments: fp64, :func:`tessella.mla.rotate.pair_moments` of its keys.
        collapse: c; bands are multiples of it.

    `at` has the windows and the positions [windows, queries] in them that losses are taken over.
    """

    def __init__(self, gqa: GQA, x: Tensor, angles: Angles, moments: Tensor, collapse: int):
        heads, T = gqa.heads, x.shape[1]
        self.heads, self.collapse, self.moments = heads, collapse, moments
        g = torch.Generator().manual_seed(0)
        windows = min(WINDOWS, x.shape[0])
        count = max(1, min(T, SCORES // (heads.H * T * windows)))
        chosen = torch.randperm(x.shape[0], generator=g)[:windows].to(x.device)
        at = torch.randint(T // 8, T, (windows, count), generator=g).to(x.device)
        self.at, x = (chosen, at), x[chosen]
        q = gqa.queries(x.gather(1, at[..., None].expand(-1, -1, x.shape[2])))
        k, v = gqa.keys_values(x).chunk(2, -1)
        J, half = heads.J, heads.D // 2
        self._q = _complex(q.view(windows, count, J, heads.H // J, 2, half))
        self._k = _complex(k.view(windows, T, J, 2, half))
        self._v = v.view(windows, T, J, heads.D)
        turns = torch.complex(*angles)
        self._turn_q, self._turn_k = turns[at], turns
        column = torch.arange(T, device=x.device)
        seen = column <= at[..., None]
        if gqa.window is not None:
            seen &= column > at[..., None] - gqa.window
        self._unseen = ~seen[:, :, None, None]
        self._o, self._kept = gqa.o, {}
        self._scores = self._exact(0, half)
        self._out = self._attend(self._scores)

    def _exact(self, first: int, end: int) -> Tensor:
        """Scores [windows, queries, J, H / J, T] of frequencies, before the scale."""
        band = slice(first, end)
        q = self._q[..., band] * self._turn_q[:, :, None, None, band]
        k = self._k[..., band] * self._turn_k[:, None, band]
        return torch.einsum("wqjgl,wtjl->wqjgt", q, k.conj()).real

    def _attend(self, scores: Tensor) -> Tensor:
        """The attention's output [windows, queries, hidden], without its bias."""
        p = (scores * self.heads.D**-0.5).masked_fill(self._unseen, -torch.inf).softmax(-1)
        return torch.einsum("wqjgt,wtjd->wqjgd", p, self._v).flatten(2) @ self._o.T

    def _error(self, first: int, count: int) -> Tensor:
        """What scores gain when `count` frequencies from `first` are one band."""
        if (first, count) in self._kept:
            return self._kept[first, count]
        keep, band = count // self.collapse, slice(first, first + count)
        rows = band_components(self.moments, first, count, keep).to(self._q.dtype)
        q = torch.einsum("wqjgl,cjl->wqjgc", self._q[..., band], rows)
        k = torch.einsum("wtjl,cjl->wtc", self._k[..., band], rows)
        angle = slice(first, first + count, self.collapse)
        q[..., :keep] *= self._turn_q[:, :, None, None, angle]
        k[..., :keep] *= self._turn_k[:, angle]
        made = torch.einsum("wqjgc,wtc->wqjgt", q, k.conj()).real
        made -= self._exact(first, first + count)
        if made.nbytes * (len(self._kept) + 1) > _MEMORY:
            self._kept.pop(next(iter(self._kept)))
        self._kept[first, count] = made
        return made

    def _errors(self, first: int, counts: tuple[int, ...]) -> Tensor:
        """Of neighbouring bands, the first of which starts at `first`."""
        total = torch.zeros_like(self._scores)
        for count in counts:
            total += self._error(first, count)
            first += count
        return total

    def _loss(self, errors: Tensor) -> float:
        """Error of the attention's output over the output itself, both squared and summed."""
        made = self._attend(self._scores + errors)
        whole = self._out.square().sum().clamp_min(torch.finfo(made.dtype).tiny)
        return float((made - self._out).square().sum() / whole)

    def loss(self, fold: Fold) -> float:
        """What the attention's output loses, relative and squared."""
        return self._loss(self._errors(0, bands_of(self.heads, fold)))

    def run(self, folds: list[int]) -> tuple[int, ...]:
        """Bands from those of the best of `folds`, changed one by one while that gains."""
        bands = bands_of(self.heads, min(folds, key=self.loss))
        errors = self._errors(0, bands)
        least, i, first, idle = self._loss(errors), 0, 0, 0
        while idle < len(bands):  # round and round, until every band was left as it is
            best = None
            for end, new in self._changes(bands, i):
                tried = errors - self._errors(first, bands[i:end]) + self._errors(first, new)
                if (found := self._loss(tried)) < least * (1 - GAIN):
                    best, least = (end, new, tried), found
            if best is not None:
                (end, new, errors), idle = best, 0
                bands = bands[:i] + new + bands[end:]
            else:
                first, i, idle = first + bands[i], i + 1, idle + 1
                if i == len(bands):
                    i = first = 0
        return bands

    def _changes(self, bands: tuple[int, ...], i: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(end, counts) that may stand for bands i to end: split, merged, one step moved."""
        c, mine = self.collapse, bands[i]
        for part in range(c, mine, c):
            yield i + 1, (part, mine - part)
        if i + 1 == len(bands):
            return
        both = mine + bands[i + 1]
        yield i + 2, (both,)
        for part in (mine - 2 * c, mine - c, mine + c, mine + 2 * c):
            if 0 < part < both:
                yield i + 2, (part, both - part)


def _complex(pairs: Tensor) -> Tensor:
    """[..., 2, D / 2] to complex [..., D / 2]."""
    return torch.complex(*pairs.unbind(-2))
