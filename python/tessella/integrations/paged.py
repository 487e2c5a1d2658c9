"""The paged cache as transformers' `Cache`: ``model.generate(past_key_values=paged_cache(model))``.

transformers hands each layer's new keys and values to the cache and what the cache returns to the
attention. This cache returns them as they are, with a note of itself on the keys; attention
(:mod:`tessella.integrations.attention`) finds the note and calls back, and the tokens are appended
and attended over the pages in one go. No tensor of all keys ever exists.

Rows of a batch may be padded, on either side: padding is not stored, and its queries give zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from tessella.kv.cache import CacheShape, PagedKVCache
from tessella.kv.step import Step
from tessella.quant import kv

NOTE = "_tessella_cache_layer"
"""Attribute of a key tensor that says which layer of which cache it belongs to."""

PAGE_SIZE = 64


class PagedLength(int):
    """A number of keys that are in a paged cache, so no mask needs to be made for them."""


class PagedLayer(CacheLayerMixin):
    """One layer's view of a :class:`PagedCache`."""

    is_croppable = True
    is_sliding = False

    def __init__(self, cache: PagedCache, index: int):
        super().__init__()
        self.cache, self.index = cache, index
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the pages belong to the cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Keys [B, J, S, D] and values, noted as this layer's; attention will append them."""
        setattr(key_states, NOTE, self)
        return key_states, value_states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, **how):
        """Append and attend: [B, S, H, D] for queries [B, H, S, D]; `how` as in Step.attend."""
        step, real = self.cache.step_of(self.index, key, padding)
        rows = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]
        if real is not None:
            rows = [t[real] for t in rows]
        out = step.attend(self.index, *rows, **how)
        B, H, S, D = query.shape
        if real is not None:
            out = torch.zeros(B * S, H, D, dtype=out.dtype, device=out.device).index_copy(
                0, real, out
            )
        return out.view(B, S, H, D)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return PagedLength(self.cache.seen + query_length), 0

    def get_seq_length(self) -> int:
        return self.cache.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Nothing to do: the cache resets itself."""


class PagedCache(Cache):
    """A batch of sequences in a :class:`~tessella.kv.cache.PagedKVCache` that grows as needed.

    `pages` is made when the first keys come, since they tell batch, heads, dtype and device.
    """

    def __init__(self, layers: int, codec: str, page_size: int = PAGE_SIZE):
        super().__init__(layers=[PagedLayer(self, i) for i in range(layers)])
        self.codec = kv.parse(codec)
        self.page_size = page_size
        self.pages: PagedKVCache | None = None
        self.handles: list[int] = []
        self.seen = 0
        """Tokens of a row of the batch so far, padding included: what transformers counts."""
        self._real: list[list[bool]] = []  # per row: which of those are not padding
        self._step: Step | None = None
        self._used: set[int] = set()  # layers that have had this step

    @property
    def bytes_per_token(self) -> float | None:
        """In all layers; None as long as nothing is stored."""
        return None if self.pages is None else self.pages.bytes_per_token

    def step_of(
        self, layer: int, key: Tensor, padding: Tensor | None
    ) -> tuple[Step, Tensor | None]:
        """The step that this layer's call belongs to, and which of its B * S rows are no padding.

        The first layer to come again begins the next step.
        """
        B, J, S, D = key.shape
        if padding is not None and (padding.dim() != 2 or padding.shape[1] < S):
            raise ValueError(
                "tessella: attention over a paged cache: expected a padding mask [B, tokens] or "
                f"none, got one of shape {tuple(padding.shape)}"
            )
        if self._step is None or layer in self._used:
            self._begin(B, J, S, D, key, padding)
        self._used.add(layer)
        return self._step, self._rows

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Append keys and values [B, J, S, D] to a layer without attending."""
        step, _ = self.step_of(layer, key, None)
        step.append(layer, *(t.transpose(1, 2).flatten(0, 1) for t in (key, value)))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens of every row."""
        n = abs(tokens_to_remove)
        if tokens_to_remove > 0 or n > self.seen:
            raise ValueError(
                f"tessella: crop: expected 0 down to -{self.seen} tokens, got {tokens_to_remove}"
            )
        self._end()
        self.seen -= n
        for row, handle in enumerate(self.handles):
            del self._real[row][self.seen :]
            self.pages.truncate(handle, sum(self._real[row]))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was; pages are shared, not copied."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, each as often as it is named."""
        self._end()
        old, chosen = self.handles, torch.as_tensor(indices).tolist()
        self.handles = [self.pages.fork(old[i]) for i in chosen]
        self._real = [list(self._real[i]) for i in chosen]
        for handle in old:
            self.pages.free(handle)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.handles:
            rows = torch.arange(len(self.handles))
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything, and keep the pages."""
        self._end()
        if self.pages is not None:
            self.pages.clear()
        self.handles, self._real, self.seen = [], [], 0

    def _end(self) -> None:
        self._step = None
        self._used.clear()

    def _shape(self, J: int, D: int, key: Tensor) -> CacheShape:
        return CacheShape(len(self.layers), J, D, key.dtype, str(key.device))

    def _begin(self, B: int, J: int, S: int, D: int, key: Tensor, padding: Tensor | None) -> None:
        if self.pages is None:
            shape = self._shape(J, D, key)
            pages = B * -(-(S + self.page_size) // self.page_size)
            self.pages = PagedKVCache(
                shape,
                self.codec,
                pages=pages,
                page_size=self.page_size,
                sequences=4 * B,  # beams are forked before their parents are freed
                grows=True,
            )
        if not self.handles:
            self.handles = [self.pages.open() for _ in range(B)]
            self._real = [[] for _ in range(B)]
        if len(self.handles) != B:
            raise ValueError(
                f"tessella: kv cache: expected a batch of {len(self.handles)}, got {B}"
            )
        new = None if padding is None else padding[:, -S:].bool()
        counts = [S] * B if new is None else new.sum(1).tolist()
        self._end()
        self._step = self.pages.step(self.handles, counts)
        self._rows = None if new is None else new.flatten().nonzero()[:, 0]
        for row, real in enumerate(self._real):
            real += [True] * S if new is None else new[row].tolist()
        self.seen += S


def paged_cache(
    model: nn.Module, codec: str | None = None, *, page_size: int = PAGE_SIZE
) -> PagedCache:
    """An empty paged cache for a model of transformers, which attends over it from now on.

    Args:
        model: a causal LM whose attention is torch's or this package's; it is switched to this
            package's, which serves every other cache as before.
        codec: a name of :mod:`tessella.quant.kv` ("kv4", "int8", "bf16", "kv4-hadamard", ...);
            None: what the checkpoint was converted for, else
            :data:`tessella.quant.kv.DEFAULT`.
        page_size: tokens of a page.

    Raises:
        ValueError: no such codec, one that does not fit the heads, or an attention that cannot be
            switched.
    """
    from tessella.integrations import attention

    config = model.config.get_text_config()
    latents = latent_shapes(config)
    name = codec or checkpoint_codec(model) or (kv.LATENT_DEFAULT if latents else kv.DEFAULT)
    parsed = kv.parse(name)
    if not (latents and isinstance(parsed, kv.LatentCodec)):
        parsed.check(head_dim(config))
    attention.use(model)
    if config._attn_implementation != attention.NAME:
        raise ValueError(
            f"tessella: paged cache: expected a model with attention 'sdpa' or {attention.NAME!r}, "
            f"got {config._attn_implementation!r}"
        )
    if isinstance(parsed, kv.LatentCodec):
        from tessella.integrations.latent import LatentCache

        return LatentCache(latents, name, page_size)
    return PagedCache(config.num_hidden_layers, name, page_size)


def head_dim(config) -> int:
    """Channels of a head's keys."""
    if nope := getattr(config, "qk_nope_head_dim", 0):
        return nope + config.qk_rope_head_dim
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def latent_shapes(config) -> tuple[tuple[int, int], ...]:
    """(L, R) of each layer of a model with latent attention; empty for others."""
    if not getattr(config, "kv_lora_rank", None):
        return ()
    R = config.qk_rope_head_dim
    return tuple((config.rank(i), R) for i in range(config.num_hidden_layers))


def checkpoint_codec(model: nn.Module) -> str | None:
    """The codec that a converted checkpoint asks for, if it does."""
    quantization = getattr(model.config, "quantization_config", None)
    cache = getattr(quantization, "cache", None)
    return cache["codec"] if cache else None
