"""Papers' own cache methods, simulated: keys and values quantised and back as they were published.

For evaluation beside the codecs that run (:data:`tessella.quant.kv.PUBLISHED`); nothing is saved in
memory, and a text is scored in one piece, since some of the methods need all of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tessella.mla.lowrank import per_token
from tessella.quant.kv import PUBLISHED, CodecError

PREFIX = "paper:"
LATENT = "latent"
"""Method for models with latent attention: one scale a token, rope keys as they are."""


class PublishedLayer(DynamicLayer):
    """A layer whose first keys and values are replaced by what the method keeps of them."""

    def __init__(self, method: Callable, bits: int):
        super().__init__()
        self.method, self.bits = method, bits

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if self.get_seq_length():
            raise ValueError("tessella: a paper's cache is simulated for one piece of text only")
        pairs = [
            self.method(k.transpose(0, 1), v.transpose(0, 1), self.bits)
            for k, v in zip(key_states, value_states, strict=True)
        ]
        for b, (k, v) in enumerate(pairs):
            key_states[b], value_states[b] = k.transpose(0, 1), v.transpose(0, 1)
        return super().update(key_states, value_states, *args, **kwargs)


class LatentLayer(DynamicLayer):
    """A layer of latents that are rounded to `bits`; attention is expanded, in one piece."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def attend_latent(self, attention, q_nope, q_rope, latent, k_rope, mask) -> Tensor:
        """:func:`tessella.integrations.mla_model.latent_layer`'s protocol."""
        keys, values = attention.expand(per_token(latent, self.bits), k_rope)
        if self.get_seq_length():
            raise ValueError("tessella: a paper's cache is simulated for one piece of text only")
        self.update(k_rope[:, None], latent[:, None])
        query = torch.cat((q_nope, q_rope), -1)
        scaling = attention.scaling
        return sdpa_attention_forward(attention, query, keys, values, mask, scaling=scaling)[0]


def published_cache(model: nn.Module, name: str) -> DynamicCache:
    """An empty simulated cache; `name` is "paper:METHOD:BITS", such as "paper:deco-icl:4".

    Raises CodecError on other names.
    """
    m = re.fullmatch(rf"{PREFIX}([\w-]+):([2-8])", name)
    latents = model.config.model_type == "tessella_mla"
    methods = (LATENT,) if latents else tuple(PUBLISHED)
    if m is None or m[1] not in methods:
        raise CodecError(
            f"kv codec: expected {PREFIX}METHOD:BITS with a method of {', '.join(methods)} "
            f"and 2 to 8 bits, got {name!r}"
        )
    cache = DynamicCache()
    layers = model.config.get_text_config().num_hidden_layers
    bits = int(m[2])
    cache.layers = [
        LatentLayer(bits) if latents else PublishedLayer(PUBLISHED[m[1]], bits)
        for _ in range(layers)
    ]
    cache.layer_class_to_replicate = None
    return cache
