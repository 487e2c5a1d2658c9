"""Keys without their mean: channels with a constant offset cost nothing any more.

Key channels of many models sit far from zero for all tokens alike. Softmax does not see a vector
that is subtracted from all keys of a sequence, so it need not be added back; only the range of the
codes shrinks (SageAttention's smoothing of K, here with the mean of the first tokens, frozen).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tessella.formats_kv import KVFactors
from tessella.quant.kv.base import FIT_TOKENS, Part, symmetric


@dataclass(frozen=True)
class Mean(Part):
    """Subtract from K the mean over the first :data:`~tessella.quant.kv.base.FIT_TOKENS` tokens."""

    word = "mean"
    fit_tokens = FIT_TOKENS

    def fit(self, k_SJD: Tensor, v_SJD: Tensor) -> KVFactors:
        return KVFactors(k_mean=k_SJD.float().mean(0)[None].contiguous())


def published(k_SJD: Tensor, v_SJD: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """SageAttention: K minus its mean over all tokens, symmetric per token; V untouched."""
    k = k_SJD.float()
    mean = k.mean(0, keepdim=True)
    return symmetric(k - mean, bits) + mean, v_SJD.float()
