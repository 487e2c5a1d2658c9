"""A cache of keys and values with room to grow, so that a new token does not copy all old ones.

transformers' default cache concatenates: each step allocates and copies the keys and values of the
whole context. Here a layer writes into spare room, which is added in proportion to its length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

LEAST_ROOM = 256
"""Tokens that a new buffer has room for beyond those it must hold, at least."""


class GrowingLayer(DynamicLayer):
    """One layer's cache; keys and values are views of the used part of larger buffers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._buffers: list[Tensor | None] = [None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append [B, J, S, D] keys and values; returns all of them, views [B, J, T, D]."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._buffers = [None, None]

    def _append(self, which: int, used: Tensor, new: Tensor) -> Tensor:
        """`used` and `new` along the tokens, in the buffer if `used` still is its beginning."""
        T = used.shape[-2] if used.numel() else 0
        total = T + new.shape[-2]
        buffer = self._buffers[which]
        if buffer is None or not _begins(used, buffer) or total > buffer.shape[-2]:
            shape = [*new.shape[:-2], total + max(LEAST_ROOM, total // 2), new.shape[-1]]
            buffer = self._buffers[which] = new.new_empty(shape)
            if T:
                buffer[..., :T, :] = used
        buffer[..., T:total, :] = new
        return buffer[..., :total, :]


def _begins(used: Tensor, buffer: Tensor) -> bool:
    """Whether `used` is the first tokens of `buffer`, and not a copy (of some of its rows, say)."""
    return (
        used.data_ptr() == buffer.data_ptr()
        and used.shape[:-2] == buffer.shape[:-2]
        and used.stride() == buffer.stride()
    )


def growing_cache(config) -> DynamicCache:
    """An empty cache for a model's configuration, growing where its layers keep all tokens."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache
