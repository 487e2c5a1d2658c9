"""Keys and values rotated by a Hadamard matrix, which spreads outlier channels over all of them.

A head dim that is no power of two is rotated in blocks of the largest one that divides it. The
rotation is orthogonal and constant: queries take the same one, outputs its transpose (QuaRot,
section 4; there the one of V is folded into the weights).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessella.formats_kv import KVFactors
from tessella.quant.kv.base import Part, asymmetric, fold

CLIP = 0.95
"""QuaRot's share of the range of a group that its codes span."""


def matrix(m: int) -> Tensor:
    """Orthonormal Sylvester-Hadamard matrix fp32 [m, m], symmetric; m is a power of two."""
    h = torch.ones(1, 1)
    while h.shape[0] < m:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h * m**-0.5


def block_of(D: int) -> int:
    """Channels rotated together: the largest power of two that divides D."""
    return D & -D


@dataclass(frozen=True)
class Hadamard(Part):
    """Rotate the channels of K and V within a head."""

    word = "hadamard"

    def fit(self, k_SJD: Tensor, v_SJD: Tensor) -> KVFactors:
        _, J, D = k_SJD.shape
        m = block_of(D)
        h = matrix(m).expand(1, J, D // m, m, m).contiguous().to(k_SJD.device)
        return KVFactors(k_fold=h, q_fold=h, v_fold=h, o_fold=h)


def published(k_SJD: Tensor, v_SJD: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """QuaRot: rotated heads, asymmetric in groups of up to 128, ranges clipped to 95 %."""

    def coded(x: Tensor) -> Tensor:
        S, J, D = x.shape
        rotation = Hadamard().fit(x, x).k_fold
        groups = fold(x.float(), rotation).view(S, J, -1, 128 if D % 128 == 0 else D)
        lo, hi = (CLIP * x for x in groups.aminmax(dim=-1, keepdim=True))
        return fold(asymmetric(groups.clamp(lo, hi), bits).view(S, J, D), rotation)

    return coded(k_SJD), coded(v_SJD)
