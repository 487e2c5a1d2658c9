"""The pages of all layers under one block table."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tessella import _native
from tessella.formats_kv import KV4Pages, KVCodec, KVPages
from tessella.formats_mla import MLACache, MLACodec
from tessella.kv.blocks import BlockTable
from tessella.layout_mla import unpack_latents
from tessella.ref.mla import dequantise


@dataclass(frozen=True)
class CacheShape:
    """What a model asks of its cache."""

    layers: int
    J: int
    """Heads of keys and values."""
    D: int
    """Channels of a head."""
    dtype: torch.dtype = torch.bfloat16
    """Of the model's keys and values."""
    device: str = "cpu"
    latents: tuple[tuple[int, int], ...] = ()
    """Of each layer the rank L and the rope dim R, where the cache is of latents; J and D then
    are 1 and 0."""


class Store:
    """Pages of one format, the same blocks in every layer."""

    def __init__(
        self,
        shape: CacheShape,
        codec: KVCodec | MLACodec | None,
        *,
        pages: int,
        page_size: int,
        sequences: int,
        grows: bool,
        dtype: torch.dtype,
    ):
        """`codec` None: uncoded pages of `dtype`. `sequences`: rows of tails, where there are any.

        `grows`: add pages instead of refusing when they run out.
        """
        self.grows = grows
        self.table = BlockTable(pages, page_size)
        J, Z, D, device = shape.J, page_size, shape.D, shape.device
        self.layers: list[KVPages | KV4Pages | MLACache] = []
        for L, R in shape.latents:
            size = (pages, codec.page_bytes(Z, L, R))
            blob = _native.empty_pages(size, torch.uint8, device)
            self.layers.append(MLACache(blob, codec, Z, L, R))
        for _ in range(0 if shape.latents else shape.layers):
            if codec is None:
                empty = _native.empty_pages((pages, J, 2, Z, D), dtype, device)
                self.layers.append(KVPages(empty))
                continue
            blob = _native.empty_pages((pages, J, codec.page_bytes(Z, D)), torch.uint8, device)
            channel = codec.k_axis == "channel"
            tail = torch.zeros(sequences, J, Z, D, device=device) if channel else None
            self.layers.append(KV4Pages(blob, codec, Z, D, tail))

    @property
    def Z(self) -> int:
        """Tokens of a page."""
        return self.table.Z

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(_memory(layer).nbytes for layer in self.layers)

    def make_room(self, blocks: int, tokens: int) -> None:
        """See that `blocks` can be had. Raises CacheFullError, with nothing changed."""
        short = blocks - self.table.available
        if short > 0 and self.grows:
            more = max(short, len(self.table.pool.holders) // 2)
            self.table.pool.extend(more)
            self.layers = [_longer(layer, more) for layer in self.layers]
        self.table.reserve(blocks, tokens)

    def grow(self, handles: list[int], counts: list[int]) -> list[int]:
        """Slots of new tokens, for which there is room; shared pages are copied first."""
        growth = self.table.grow(handles, counts)
        if growth.copies:
            source, target = torch.tensor(growth.copies).T
            for layer in self.layers:
                memory = _memory(layer).view(torch.uint8)  # torch indexes no E4M3 numbers
                memory[target.to(memory.device)] = memory[source.to(memory.device)]
        return growth.slots

    def read_latents(self, layer: int, handle: int, length: int) -> tuple[Tensor, Tensor]:
        """Latents [length, L] and rope keys [length, R] in fp32, as they are stored."""
        pages = self.layers[layer]
        blob = pages.blob[self.table[handle].blocks]
        codes = unpack_latents(blob, pages.codec, pages.Z, pages.L, pages.R)
        latents, rope = dequantise(codes, torch.float32)
        return latents.flatten(0, 1)[:length], rope.flatten(0, 1)[:length]

    def read(self, layer: int, handle: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [length, J, D] of uncoded pages."""
        seq = self.table[handle]
        pages = self.layers[layer].pages[seq.blocks]  # n, J, 2, Z, D
        k, v = pages.permute(2, 0, 3, 1, 4).flatten(1, 2)[:, :length]
        return k, v


def _memory(layer: KVPages | KV4Pages | MLACache) -> Tensor:
    return layer.pages if isinstance(layer, KVPages) else layer.blob


def _longer(layer: KVPages | KV4Pages | MLACache, more: int) -> KVPages | KV4Pages | MLACache:
    old = _memory(layer)
    new = _native.empty_pages((len(old) + more, *old.shape[1:]), old.dtype, old.device)
    new[: len(old)] = old
    return KVPages(new) if isinstance(layer, KVPages) else replace(layer, blob=new)
