"""KIVI: keys per channel over the tokens of a page, values per token.

An outlier channel of K then has a scale of its own. A page can only be coded when it is full; K of
the last page stays in the tail, in 16 bits or more. (KIVI, section 3: keys per channel, values per
token, groups of 32, the newest tokens in full precision. There the residual has 128 tokens; here
it is the unfinished page.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from tessella.formats_kv import KVCodec
from tessella.quant.kv.base import Part, asymmetric

GROUP, RESIDUAL = 32, 128


@dataclass(frozen=True)
class Kivi(Part):
    """Scales of K per channel of a page; V in groups of 32 channels of a token."""

    word = "kivi"

    def grid(self, pages: KVCodec) -> KVCodec:
        return replace(pages, k_axis="channel", group=GROUP)


def published(k_SJD: Tensor, v_SJD: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """KIVI as published: groups of 32 tokens (K) and 32 channels (V), the last 128 tokens exact."""
    S, J, D = k_SJD.shape
    k, v = k_SJD.float().clone(), v_SJD.float().clone()
    n = max(0, S - RESIDUAL) // GROUP * GROUP
    if n:
        by_channel = k[:n].view(n // GROUP, GROUP, J, D).movedim(1, -1)
        k[:n] = asymmetric(by_channel, bits).movedim(-1, 1).reshape(n, J, D)
    if old := max(0, S - RESIDUAL):
        groups = v[:old].view(old, J, -1, GROUP if D % GROUP == 0 else D)
        v[:old] = asymmetric(groups, bits).view(old, J, D)
    return k, v
