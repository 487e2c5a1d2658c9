"""What a cache codec is made of: grids and transforms behind one interface.

A *grid* says how codes and scales lie in a page (:class:`tessella.formats_kv.KVCodec`). A
*transform* changes keys and values, linearly and per head, before they are coded, such that
attention need not undo it token by token::

    k' = (k - mean) A      q . k  =  (q A^-T) . k' + q . mean
    v' = v C               sum p v = (sum p v') C^-1

The query is transformed once, the output once; the cache is never reconstructed. Transforms are
fitted to the first tokens of a sequence and then frozen for it, or are constant.

Letters: S tokens, J kv heads, D head dim, m size of a fold block (channels come in D/m blocks).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tessella.formats_kv import KVCodec, KVFactors
from tessella.ref.kv4 import quantise

FIT_TOKENS = 256
"""Tokens at the start of a sequence that a fitted codec looks at."""


class CodecError(ValueError):
    """A codec that does not exist or does not fit; the message is for the user."""


class Part:
    """One ingredient of a codec; its name in a codec's name is `word`."""

    word: str
    fit_tokens = 0
    """Tokens that :meth:`fit` needs; 0: what it returns does not depend on them."""

    def grid(self, pages: KVCodec) -> KVCodec:
        """The page format, changed by this part."""
        return pages

    def check(self, D: int) -> None:
        """Raise CodecError unless it can be done to heads of D channels."""

    def fit(self, k_SJD: Tensor, v_SJD: Tensor) -> KVFactors:
        """Factors [1, J, ...] of one sequence from its first tokens (fp32)."""
        return KVFactors()


def asymmetric(x: Tensor, bits: int) -> Tensor:
    """Quantised and back, over the last dimension, as coded pages do: ``real = (q - z) s``."""
    q, s, z = quantise(x, bits)
    return (q.float() - z.float()[..., None]) * s.float()[..., None]


def symmetric(x: Tensor, bits: int) -> Tensor:
    """Quantised and back, over the last dimension, ``real = q s``, q in -(2^(b-1)-1)..2^(b-1)-1."""
    qmax = 2 ** (bits - 1) - 1
    s = x.abs().amax(-1, keepdim=True).clamp_min(1e-5) / qmax
    return torch.round(x / s) * s


def fold(x_SJD: Tensor, factor_1Jbmm: Tensor | None) -> Tensor:
    """Each block of m channels times its matrix; heads that share a kv head are neighbours."""
    if factor_1Jbmm is None:
        return x_SJD
    S, H, D = x_SJD.shape
    _, J, b, m, _ = factor_1Jbmm.shape
    x = x_SJD.reshape(S, J, H // J, b, m)
    return torch.einsum("sjgbm,jbmn->sjgbn", x, factor_1Jbmm[0]).reshape(S, H, D)


def merge(first: KVFactors, then: KVFactors) -> KVFactors:
    """Both parts' factors; a second fold of the same tensor is refused by the parser."""
    given = {name: t for name, t in vars(then).items() if t is not None}
    return replace(first, **given)
