"""DecoQuant: each head's cache as a large narrow-ranged factor times a small exact one.

The paper writes a matrix W as a matrix product operator of two local tensors, W = T_L T_S, by an
SVD of W viewed as [., m] (m channels at a time), with the singular values shared evenly::

    W = U S V^T      T_L = U sqrt(S)  (quantised)      T_S = sqrt(S) V^T  (m x m, kept)

(DecoQuant, equations 3 to 6.) So T_L = W A with A = V / sqrt(S) = T_S^-1: a fixed change of basis
for every m channels. That needs no reconstruction: ``q K^T = (q T_S^T) T_L^T`` and
``p V = (p T_L) T_S``, once per query and once per output.

Here the factors belong to a (sequence, kv head) and are fitted to the first 256 tokens, then
frozen, so that later tokens are coded as they come; the paper waits for a thousand tokens in 16
bits. The SVD is one of the m x m Gram matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessella.formats_kv import KVFactors
from tessella.quant.kv.base import FIT_TOKENS, CodecError, Part, symmetric

LEAST = 1e-3
"""Singular values are raised to this share of the largest, so that A and its inverse stay tame."""


@dataclass(frozen=True)
class Deco(Part):
    """Half-whitened K and V, `m` channels at a time (0: the whole head)."""

    m: int = 0
    fit_tokens = FIT_TOKENS

    @property
    def word(self) -> str:
        """deco, deco16, deco32 or deco64."""
        return f"deco{self.m or ''}"

    def check(self, D: int) -> None:
        if D % (self.m or D):
            raise CodecError(f"kv codec: {self.word}: expected whole blocks of {self.m}, got D={D}")

    def fit(self, k_SJD: Tensor, v_SJD: Tensor) -> KVFactors:
        k_fold, q_fold = self._factors(k_SJD)
        v_fold, inverse = self._factors(v_SJD)
        o_fold = inverse.transpose(-1, -2).contiguous()
        return KVFactors(k_fold=k_fold, q_fold=q_fold, v_fold=v_fold, o_fold=o_fold)

    def _factors(self, x_SJD: Tensor) -> tuple[Tensor, Tensor]:
        """(A, A^-T = T_S^T) as fp32 [1, J, D/m, m, m], one matrix for all blocks of a head."""
        S, J, D = x_SJD.shape
        self.check(D)
        m = self.m or D
        x = x_SJD.double().transpose(0, 1).reshape(J, S * (D // m), m)
        squares, V = torch.linalg.eigh(x.transpose(1, 2) @ x)
        s = squares.clamp_min(0).sqrt()
        most = s.amax(-1, keepdim=True)
        s = torch.where(most > 0, s.clamp_min(LEAST * most), 1.0)
        # The scale of A is free; this one leaves a typical row of T_L as long as one of W.
        s = s / s.square().mean(-1, keepdim=True).sqrt()
        root = s.sqrt()[:, None, :]
        shape = (1, J, D // m, m, m)
        into, back = V / root, V * root
        return tuple(f.float()[:, None].expand(shape[1:])[None].contiguous() for f in (into, back))


def published(k_SJD: Tensor, v_SJD: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The released in-context-learning code: m = 16, one scale per token over all heads, T_S exact.

    The whole sequence is decomposed at once, K after RoPE; symmetric codes.
    """

    def coded(x_SJD: Tensor) -> Tensor:
        S, J, D = x_SJD.shape
        large, small = decompose(x_SJD.float().reshape(-1, 16))
        return (symmetric(large.reshape(S, J * D), bits).reshape(-1, 16) @ small).view(S, J, D)

    return coded(k_SJD), coded(v_SJD)


def published_language_model(k_SJD: Tensor, v_SJD: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The released LAMBADA code: SVD of K^T [J D, S], one scale per channel over all tokens."""

    def coded(x_SJD: Tensor) -> Tensor:
        S, J, D = x_SJD.shape
        large, small = decompose(x_SJD.float().reshape(S, J * D).T)
        return (symmetric(large, bits) @ small).T.reshape(S, J, D)

    return coded(k_SJD), coded(v_SJD)


def decompose(w: Tensor) -> tuple[Tensor, Tensor]:
    """(T_L, T_S) of a matrix by SVD: ``T_L T_S = w``, singular values shared evenly."""
    U, S, Vt = torch.linalg.svd(w.double(), full_matrices=False)
    root = S.sqrt()
    return (U * root).float(), (root[:, None] * Vt).float()


def round_to_nearest(k_SJD: Tensor, v_SJD: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The paper's baseline: symmetric, one scale per token over all heads."""
    S, J, D = k_SJD.shape
    return tuple(symmetric(x.float().reshape(S, J * D), bits).view(S, J, D) for x in (k_SJD, v_SJD))
