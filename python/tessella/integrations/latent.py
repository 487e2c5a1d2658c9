"""The paged cache of models with latent attention, as transformers' `Cache`.

Their attention module asks its cache's layer to attend (:func:`mla_model.latent_layer`). Few new
tokens are attended in the space of latents, over the pages as they are; where every sequence gets
many, keys and values are made from its stored latents first. Both see what the pages hold.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessella.integrations.paged import PAGE_SIZE, PagedCache, PagedLayer
from tessella.kv.cache import CacheShape
from tessella.models.absorb import absorbed


class LatentLayer(PagedLayer):
    """One layer's view of a cache of latents."""

    def attend_latent(
        self,
        attention: nn.Module,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        padding: Tensor | None,
    ) -> Tensor:
        """Append and attend: [B, S, H, E].

        q_nope [B, H, S, D], q_rope [B, H, S, R], latent [B, S, L], k_rope [B, S, R], rotated.
        """
        step, real = self.cache.step_of(self.index, latent[:, None], padding)
        queries = [t.transpose(1, 2).flatten(0, 1) for t in (q_nope, q_rope)]
        new = [t.flatten(0, 1) for t in (latent, k_rope)]
        if real is not None:
            queries, new = [t[real] for t in queries], [t[real] for t in new]
        how = {"scale": attention.scaling, "window": attention.sliding_window or 0}
        if step.tokens and step.expandable():
            step.append(self.index, *new)
            out = step.attend_expanded(
                self.index, torch.cat(queries, -1), _expander(attention, latent.dtype), **how
            )
        else:
            heads = absorbed(attention, latent.dtype)
            q = torch.cat((heads.queries(queries[0]), queries[1]), -1)
            out = heads.outputs(step.attend(self.index, q, *new, **how))
        B, H, S, _ = q_nope.shape
        if real is not None:
            whole = out.new_zeros(B * S, *out.shape[1:])
            out = whole.index_copy(0, real, out)
        return out.view(B, S, H, -1)


def _expander(attention: nn.Module, dtype: torch.dtype):
    """Keys [S, H, D + R] and values [S, H, E] from stored latents [S, L] and rope keys [S, R]."""

    def expand(latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = attention.expand(latent.to(dtype)[None], rope.to(dtype)[None])
        return keys[0].transpose(0, 1), values[0].transpose(0, 1)

    return expand


class LatentCache(PagedCache):
    """A batch of sequences in pages of latents that grow as needed; `shapes` are (L, R)."""

    def __init__(self, shapes: tuple[tuple[int, int], ...], codec: str, page_size: int = PAGE_SIZE):
        super().__init__(len(shapes), codec, page_size)
        self.shapes = shapes
        self.layers = [LatentLayer(self, i) for i in range(len(shapes))]

    def _shape(self, J: int, D: int, key: Tensor) -> CacheShape:
        return CacheShape(len(self.shapes), 1, 0, key.dtype, str(key.device), self.shapes)
