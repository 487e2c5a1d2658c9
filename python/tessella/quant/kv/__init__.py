"""Codecs of the KV cache by name: a page format and what is done to keys and values before.

A name is a precision and any ingredients, joined by dashes: ``kv4``, ``kv4-g32``, ``kv4-mean``,
``kv2-hadamard``, ``k4v2-kivi``, ``k4v8-deco16``, ``kv4-mean-hadamard``.

======================== =========================================================================
``bf16 fp16 fp32 fp8``    uncoded pages; fp8 is E4M3 without a scale
``int8 kv8 kv4 kv2``      8, 4, 2 bits; ``k4v2`` and the like: K and V apart
``g16 g32 g64 ...``       a scale for so many channels of a (token, head), not for all D
``kivi``                  K per channel of a page, V in groups of 32
``mean``                  K without the mean of the sequence's first 256 tokens
``hadamard``              K and V rotated
``deco deco16 deco32``    DecoQuant factors from the first 256 tokens, of all D or so many channels
``mla-int4 mla-bf16 ...`` latents of a model that has them (:mod:`tessella.quant.kv.latent`)
======================== =========================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tessella.formats_kv import KVCodec, KVFactors, as_stored
from tessella.quant.kv import asym, deco, hadamard, kivi, latent, mean
from tessella.quant.kv.asym import Groups
from tessella.quant.kv.base import FIT_TOKENS, CodecError, Part, asymmetric, fold, merge
from tessella.quant.kv.deco import Deco
from tessella.quant.kv.hadamard import Hadamard
from tessella.quant.kv.kivi import Kivi
from tessella.quant.kv.latent import LatentCodec
from tessella.quant.kv.mean import Mean

__all__ = [
    "DEFAULT",
    "FIT_TOKENS",
    "LATENT_DEFAULT",
    "PUBLISHED",
    "CacheCodec",
    "CodecError",
    "LatentCodec",
    "parse",
]

DEFAULT = "kv4-hadamard"
"""The 4-bit codec where none is named: prompts share its pages, and it costs no bytes over kv4."""

LATENT_DEFAULT = "mla-bf16"
"""The codec of latents where none is named: converted models differ in what they tolerate."""

UNCODED = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}

PUBLISHED: dict[str, Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]] = {
    "qserve": asym.published,
    "sage": mean.published,
    "quarot": hadamard.published,
    "kivi": kivi.published,
    "deco-icl": deco.published,
    "deco-lm": deco.published_language_model,
    "rtn-token": deco.round_to_nearest,
}
"""Papers' own methods as references: (k, v [S, J, D], bits) -> the same, quantised and back."""


@dataclass(frozen=True)
class CacheCodec:
    """How a cache keeps keys and values; made by :func:`parse`."""

    name: str
    dtype: torch.dtype | None
    """Of uncoded pages; None: the pages are coded."""
    pages: KVCodec | None
    """Of coded pages."""
    parts: tuple[Part, ...] = ()

    @property
    def fit_tokens(self) -> int:
        """Tokens that a sequence must have before it can be coded; 0: none."""
        return max((p.fit_tokens for p in self.parts), default=0)

    @property
    def token_exact(self) -> bool:
        """Whether a page may be shared up to any of its tokens: each token is coded by itself."""
        return self.fit_tokens == 0 and not self.by_channel

    @property
    def by_channel(self) -> bool:
        """Whether K is coded a full page at a time."""
        return self.pages is not None and self.pages.k_axis == "channel"

    def check(self, D: int) -> None:
        """Raise CodecError unless heads of D channels can be coded this way."""
        if self.pages is None:
            return
        try:
            self.pages.groups(D)
        except ValueError as e:
            raise CodecError(f"kv codec {self.name}: {e}") from None
        for part in self.parts:
            part.check(D)

    def fit(self, k_SJD: Tensor, v_SJD: Tensor) -> KVFactors | None:
        """Factors [1, J, ...] from a sequence's first tokens; None when the codec has none."""
        factors = KVFactors()
        for part in self.parts:
            k = k_SJD if factors.k_mean is None else k_SJD.float() - factors.k_mean
            factors = merge(factors, part.fit(k, v_SJD))
        return factors if any(t is not None for t in vars(factors).values()) else None

    def bytes_per_token(self, J: int, D: int, Z: int) -> float:
        """Bytes of one token in one layer, scales included."""
        if self.pages is None:
            return 2.0 * J * D * self.dtype.itemsize
        return J * self.pages.page_bytes(Z, D) / Z

    def roundtrip(self, k_SJD: Tensor, v_SJD: Tensor, Z: int) -> tuple[Tensor, Tensor]:
        """Keys and values fp32 [S, J, D] as attention sees them: coded and back.

        The slow and obvious version of what pages of Z tokens and their kernels do, for tests.
        """
        if self.pages is None:
            return tuple(as_stored(x, self.dtype).float() for x in (k_SJD, v_SJD))
        S, J, D = k_SJD.shape
        if self.fit_tokens > S:
            return k_SJD.float(), v_SJD.float()
        factors = self.fit(k_SJD[: self.fit_tokens], v_SJD[: self.fit_tokens]) or KVFactors()
        shift = 0.0 if factors.k_mean is None else factors.k_mean
        k, v = fold(k_SJD.float() - shift, factors.k_fold), fold(v_SJD.float(), factors.v_fold)
        G = self.pages.group or D
        if self.by_channel:
            full = S // Z * Z
            pages = k[:full].view(-1, Z, J, D).movedim(1, -1)
            coded = asymmetric(pages, self.pages.k_bits).movedim(-1, 1).reshape(full, J, D)
            k = torch.cat([coded, k[full:]])
        else:
            k = asymmetric(k.view(S, J, -1, G), self.pages.k_bits).view(S, J, D)
        v = asymmetric(v.view(S, J, -1, G), self.pages.v_bits).view(S, J, D)
        k_back = None if factors.q_fold is None else factors.q_fold.transpose(-1, -2)
        return fold(k, k_back) + shift, fold(v, factors.o_fold)


def parse(name: str) -> CacheCodec | LatentCodec:
    """A codec by its name. Raises CodecError, saying what a name is made of."""
    if name.startswith(latent.PREFIX):
        return latent.parse(name)
    precision, *words = name.split("-")
    if precision in UNCODED and not words:
        return CacheCodec(name, UNCODED[precision], None)
    bits = re.fullmatch(r"kv([248])|k([248])v([248])", "kv8" if precision == "int8" else precision)
    if bits is None:
        raise CodecError(
            f"kv codec: expected bf16, fp16, fp32, fp8, int8, kv8, kv4, kv2 or k4v2 and the like, "
            f"with ingredients such as kv4-g32 or kv4-hadamard, got {name!r}"
        )
    parts = tuple(_part(name, word) for word in words)
    kinds = [_kind(p) for p in parts]
    if len(set(kinds)) < len(kinds):
        raise CodecError(f"kv codec: {name!r}: expected ingredients that can be combined")
    pages = KVCodec(int(bits[1] or bits[2]), int(bits[1] or bits[3]))
    for part in parts:
        pages = part.grid(pages)
    # the mean comes off before anything is fitted to what remains
    return CacheCodec(name, None, pages, tuple(sorted(parts, key=lambda p: p.word != "mean")))


def _kind(part: Part) -> str:
    """Of two parts of a kind the second would undo the first."""
    if isinstance(part, Deco | Hadamard):
        return "fold"
    return "grid" if isinstance(part, Groups | Kivi) else part.word


def _part(name: str, word: str) -> Part:
    plain = {"mean": Mean, "hadamard": Hadamard, "kivi": Kivi, "deco": Deco}
    if word in plain:
        return plain[word]()
    if m := re.fullmatch(r"(g|deco)(16|32|48|64|80|96|128)", word):
        return Groups(int(m[2])) if m[1] == "g" else Deco(int(m[2]))
    raise CodecError(
        f"kv codec: {name!r}: expected ingredients of g32, kivi, mean, hadamard, deco and the "
        f"like, got {word!r}"
    )
