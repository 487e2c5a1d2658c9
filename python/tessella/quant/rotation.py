"""An orthogonal map that spreads every channel evenly over all others, for any number of them.

``turn(x) = (x * signs) (D x H)``: random signs, then for K = m * p, with p the largest power of two
in K, a Hadamard matrix of size p and the orthonormal cosine transform of size m. Every entry of the
matrix has magnitude 1/sqrt(K) (times at most sqrt(2) where m > 1). QuaRot section 4, QServe 4.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tessella.quant.kv.hadamard import block_of


@dataclass(frozen=True)
class Rotation:
    """The map for K channels; `seed` draws the signs, None leaves them out."""

    K: int
    seed: int | None = 0

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> the same shape and dtype, turned."""
        p = block_of(self.K)
        if self.seed is not None:
            g = torch.Generator().manual_seed(self.seed)
            signs = torch.randint(0, 2, (self.K,), generator=g) * 2 - 1
            x = x * signs.to(x)
        a = 1 << (p.bit_length() - 1) // 2  # H of p is the Kronecker product of two smaller ones
        y = x.reshape(*x.shape[:-1], self.K // p, p // a, a)
        y = y @ _hadamard(a).to(x)
        y = torch.einsum("...ij,ik->...kj", y, _hadamard(p // a).to(x))
        if p < self.K:
            y = torch.einsum("...mij,mn->...nij", y, _cosine(self.K // p).to(x))
        return y.reshape(x.shape)


def _hadamard(m: int) -> Tensor:
    """Orthonormal Sylvester-Hadamard matrix fp64 [m, m]."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < m:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h * m**-0.5


def _cosine(m: int) -> Tensor:
    """Orthonormal DCT-II matrix fp64 [m, m]."""
    i = torch.arange(m, dtype=torch.float64)
    c = torch.cos(math.pi / m * (i + 0.5)[:, None] * i) * (2 / m) ** 0.5
    c[:, 0] = m**-0.5
    return c
