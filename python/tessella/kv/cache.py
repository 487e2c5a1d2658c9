"""PagedKVCache: keys and values of many sequences in pages, coded or not.

A step appends some tokens to some sequences and attends with their queries, layer by layer
(:mod:`tessella.kv.step`). Between steps sequences are opened (on the longest prefix that is there
already), forked, cut and freed.

Codecs that are fitted to a sequence (mean, DecoQuant) wait for its first 256 tokens: until then a
sequence is *young* and lives on uncoded pages. When it has them, its factors are fitted, frozen,
and all its tokens are coded in the same step. Such codecs, and those that code K by the page
(KIVI), share no prefixes between prompts; forks they share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tessella.formats_kv import KV_VERSION, KVFactors
from tessella.kv.blocks import CacheFullError
from tessella.kv.step import Step
from tessella.kv.store import CacheShape, Store
from tessella.layout_kv import unpack_page
from tessella.quant.kv import DEFAULT, CacheCodec, CodecError, LatentCodec, parse
from tessella.ref.kv4 import dequantise

__all__ = ["CacheFullError", "CacheShape", "PagedKVCache"]


@dataclass
class _Entry:
    """Where a sequence lives."""

    store: Store
    handle: int
    row: int
    """Of its factors and tail; 0 where the codec has neither."""


class PagedKVCache:
    """Pages for `shape.layers` layers, and the sequences in them."""

    def __init__(
        self,
        shape: CacheShape,
        codec: str | CacheCodec | LatentCodec = DEFAULT,
        *,
        pages: int,
        page_size: int = 64,
        sequences: int = 64,
        grows: bool = False,
        version: int = KV_VERSION,
    ):
        """
        Args:
            shape: layers, heads, head dim, dtype and device.
            codec: a name of :mod:`tessella.quant.kv`, or what its parser made.
            pages: of `page_size` tokens (a multiple of 16 up to 256) in every layer.
            sequences: most at a time, where the codec keeps something for each.
            grows: add pages instead of refusing when they run out.
            version: of the page layout that the caller expects.

        Raises:
            ValueError: a codec that does not exist or does not fit the head dim; a newer version;
                a page size that pages cannot have.
        """
        if version != KV_VERSION:
            raise ValueError(
                f"kv cache: codec version: expected {KV_VERSION}, got {version}: the cache was "
                "written for another layout of coded pages"
            )
        if page_size not in range(16, 257, 16):
            raise ValueError(
                f"kv cache: page_size: expected a multiple of 16 in 16..256, got {page_size}"
            )
        self.codec = parse(codec) if isinstance(codec, str) else codec
        self.shape = shape
        format_ = self.codec.pages
        if not shape.latents:
            self.codec.check(shape.D)
        elif not isinstance(self.codec, LatentCodec):
            raise CodecError(
                "kv codec: expected one of latents, such as mla-int4 or mla-bf16, "
                f"got {self.codec.name!r}"
            )
        fitted = self.codec.fit_tokens > 0
        rows = sequences if fitted or self.codec.by_channel else 1
        common = {"page_size": page_size, "sequences": rows, "grows": grows}
        dtype = self.codec.dtype or shape.dtype
        self.main = Store(shape, format_, pages=pages, dtype=dtype, **common)
        young = rows * -(-self.codec.fit_tokens // page_size)
        self.young = (
            Store(shape, None, pages=young, dtype=shape.dtype, **{**common, "grows": True})
            if fitted
            else None
        )
        self.factors: list[KVFactors | None] = [None] * shape.layers
        probe = torch.zeros(self.codec.fit_tokens, shape.J, shape.D, device=shape.device)
        if self.codec.parts and (constant := self.codec.fit(probe, probe)) is not None:
            self.factors = [_rows(constant, rows if fitted else 1) for _ in range(shape.layers)]
        self._entries: dict[int, _Entry] = {}
        self._rows = list(range(rows - 1, -1, -1)) if fitted or self.codec.by_channel else None
        self._retired: list[int] = []
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, young ones included."""
        return self.main.nbytes + (self.young.nbytes if self.young else 0)

    @property
    def bytes_per_token(self) -> float:
        """Of a token in all layers, scales included."""
        s = self.shape
        if s.latents:
            return sum(self.codec.bytes_per_token(L, R, self.main.Z) for L, R in s.latents)
        return s.layers * self.codec.bytes_per_token(s.J, s.D, self.main.Z)

    @property
    def has_rows(self) -> bool:
        """Whether each sequence has a row of factors, or of a tail."""
        return self._rows is not None

    def open(self, tokens: list[int] | None = None) -> int:
        """A new sequence; of its prompt `tokens` the longest known prefix is there already.

        Raises CacheFullError when the codec keeps something for each sequence and has no row left.
        """
        if not self.codec.token_exact:
            tokens = None
        store = self.young or self.main
        return self._add(_Entry(store, store.table.open(tokens), self._take_row()))

    def inner(self, handle: int) -> int:
        """A sequence's handle in the block table of its store."""
        return self._entry(handle).handle

    def length(self, handle: int) -> int:
        """Tokens of a sequence."""
        entry = self._entry(handle)
        return entry.store.table[entry.handle].length

    def fork(self, parent: int) -> int:
        """A second sequence with the same tokens, sharing pages until one of the two writes."""
        old = self._entry(parent)
        row = self._take_row()
        if row != old.row:
            self._copy_row(old.row, row)
        return self._add(_Entry(old.store, old.store.table.fork(old.handle), row))

    def truncate(self, handle: int, length: int) -> None:
        """Forget all tokens from `length` on. Raises ValueError on a length out of range."""
        entry = self._entry(handle)
        seq = entry.store.table[entry.handle]
        before, block = seq.length, length // self.main.Z
        restore = (
            self.codec.by_channel
            and entry.store is self.main
            and length % self.main.Z
            and block < before // self.main.Z
        )
        page = seq.blocks[block] if restore else None
        entry.store.table.truncate(entry.handle, length)
        if page is not None:
            self._restore_tail(entry.row, page)

    def publish(self, handle: int, tokens: list[int]) -> None:
        """Let later prompts begin with this sequence's `tokens`, one id for each stored token.

        Nothing happens with a codec whose pages cannot be shared between prompts.
        """
        entry = self._entry(handle)
        if self.codec.token_exact:
            entry.store.table.publish(entry.handle, tokens)

    def free(self, handle: int) -> None:
        """Forget a sequence."""
        entry = self._entry(handle)
        entry.store.table.free(entry.handle)
        if self._rows is not None:
            self._rows.append(entry.row)
        del self._entries[handle]

    def clear(self) -> None:
        """Forget everything."""
        for handle in list(self._entries):
            self.free(handle)
        self._retire()
        self.main.table.clear()

    def step(
        self, handles: list[int], counts: list[int], trees: list[Tensor | None] | None = None
    ) -> Step:
        """Room for `counts[i]` new tokens of sequence `handles[i]`, and how they attend.

        Args:
            handles: sequences, each once.
            counts: new tokens of each, 0 or more.
            trees: for some sequences bool [n, n], n = counts[i]: which of the new tokens each of
                them sees, itself included. Without one they are causal.

        Raises:
            CacheFullError: no room; nothing was changed.
            ValueError: an unknown sequence, a tree of another size.
        """
        self._retire()
        trees = trees or [None] * len(handles)
        entries = [self._entry(h) for h in handles]
        _check_trees(counts, trees)
        crossing = [
            e.store is self.young and e.store.table[e.handle].length + n >= self.codec.fit_tokens
            for e, n in zip(entries, counts, strict=True)
        ]
        for store in (self.main, self.young):
            if store is not None:
                self._make_room(store, entries, counts, crossing)
        return Step(self, entries, counts, trees, crossing)

    def retire(self, handle: int) -> None:
        """Free a young table's sequence once the step that reads it is over."""
        self._retired.append(handle)

    def _make_room(self, store: Store, entries: list, counts: list[int], crossing: list) -> None:
        needed = tokens = 0
        for e, n, moves in zip(entries, counts, crossing, strict=True):
            if moves and store is self.main:
                total = e.store.table[e.handle].length + n
                needed += -(-total // store.Z)
                tokens += total
            elif not moves and e.store is store:
                needed += store.table.needed([e.handle], [n])
                tokens += n
        store.make_room(needed, tokens)

    def _retire(self) -> None:
        for handle in self._retired:
            self.young.table.free(handle)
        self._retired.clear()

    def _entry(self, handle: int) -> _Entry:
        if handle not in self._entries:
            raise ValueError(f"kv cache: expected a live sequence, got {handle}")
        return self._entries[handle]

    def _add(self, entry: _Entry) -> int:
        handle = self._next
        self._next += 1
        self._entries[handle] = entry
        return handle

    def _take_row(self) -> int:
        if self._rows is None:
            return 0
        if not self._rows:
            raise CacheFullError(
                f"kv cache: full: expected at most {len(self._entries)} sequences with codec "
                f"{self.codec.name}"
            )
        return self._rows.pop()

    def _copy_row(self, source: int, target: int) -> None:
        """Factors and tail of one sequence to another."""
        for factors in self.factors if self.codec.fit_tokens else ():
            for t in vars(factors).values() if factors is not None else ():
                if t is not None:
                    t[target] = t[source]
        if self.codec.by_channel:
            for layer in self.main.layers:
                layer.k_tail[target] = layer.k_tail[source]

    def _restore_tail(self, row: int, page: int) -> None:
        """Keys of a page that was full, back into the tail: as they were coded."""
        for layer in self.main.layers:
            codes = unpack_page(layer.blob[page].cpu(), layer.codec, layer.Z, layer.D)
            layer.k_tail[row] = dequantise(codes, layer.codec, layer.D)[0]


def _rows(factors: KVFactors, rows: int) -> KVFactors:
    """`factors` with their one row repeated: a table to be written by row."""
    given = {n: t for n, t in vars(factors).items() if t is not None}
    return replace(factors, **{n: t.repeat(rows, *[1] * (t.dim() - 1)) for n, t in given.items()})


def _check_trees(counts: list[int], trees: list[Tensor | None]) -> None:
    for n, tree in zip(counts, trees, strict=True):
        if tree is not None and (tree.dtype != torch.bool or tuple(tree.shape) != (n, n)):
            raise ValueError(
                f"kv cache: tree: expected torch.bool {(n, n)} for {n} tokens, "
                f"got {tree.dtype} {tuple(tree.shape)}"
            )
