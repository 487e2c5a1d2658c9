"""Sizes of a conversion, and what they must satisfy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

COLLAPSES = (1, 2, 4)
"""How many times narrower than a head the shared rope key may be."""

Fold = int | tuple[int, ...]
"""How many neighbouring frequencies count as one: everywhere, or band by band from the fastest."""


class MLAError(ValueError):
    """A conversion that cannot be done; the message gives the number and its limit."""


@dataclass(frozen=True)
class Heads:
    """H query heads on J key/value heads of D channels each."""

    H: int
    J: int
    D: int

    @property
    def width(self) -> int:
        """Channels of all keys of a token, and of all its values."""
        return self.J * self.D

    def group(self, h: int) -> slice:
        """Channels of the merged keys that query head h reads."""
        j = h // (self.H // self.J)
        return slice(j * self.D, (j + 1) * self.D)


def collapse_of(heads: Heads, rope: int) -> int:
    """c = D / R. Raises MLAError unless it is 1, 2 or 4."""
    widths = [heads.D // c for c in COLLAPSES if heads.D % (2 * c) == 0]
    if rope not in widths:
        raise MLAError(
            f"rope: expected head_dim / 1, 2 or 4 = {', '.join(map(str, widths))} with a head_dim "
            f"of {heads.D}, got {rope}"
        )
    return heads.D // rope


def folds_of(heads: Heads, collapse: int) -> list[int]:
    """Legal folds, ascending: powers of two, multiples of the collapse, that divide D / 2."""
    powers = (1 << i for i in range(heads.D.bit_length()))
    return [f for f in powers if f % collapse == 0 and (heads.D // 2) % f == 0]


def bands_of(heads: Heads, fold: Fold) -> tuple[int, ...]:
    """Numbers of frequencies in each band, from the fastest; they add up to D / 2."""
    return (fold,) * (heads.D // 2 // fold) if isinstance(fold, int) else fold


def check_fold(heads: Heads, collapse: int, fold: Fold) -> None:
    """Raises MLAError unless bands of `fold` frequencies fill a head and collapse evenly."""
    if isinstance(fold, tuple):
        if sum(fold) != heads.D // 2 or any(n < 1 or n % collapse for n in fold):
            raise MLAError(
                f"fold: expected bands of multiples of the collapse {collapse} that add up to "
                f"{heads.D // 2}, got {fold}, which add up to {sum(fold)}"
            )
        return
    if fold < 1 or fold % collapse or (heads.D // 2) % fold:
        raise MLAError(
            f"fold: expected a multiple of the collapse {collapse} (head_dim {heads.D} over rope "
            f"{heads.D // collapse}) that divides {heads.D // 2}, such as "
            f"{', '.join(map(str, folds_of(heads, collapse)))}; got {fold}"
        )


def check_rank(heads: Heads, rope: int, rank: int) -> None:
    """Raises MLAError unless 1 <= rank <= 2 J D - R, the channels that the latent stands for."""
    limit = 2 * heads.width - rope
    if not 1 <= rank <= limit:
        raise MLAError(
            f"rank: expected 1 to {limit}, the {2 * heads.width} channels of keys and values less "
            f"the rope key's {rope}; got {rank}"
        )


def check_tokens(heads: Heads, tokens: int) -> None:
    """Raises MLAError when too few tokens are given to tell the directions of keys and values."""
    if tokens < 2 * heads.width:
        raise MLAError(
            f"calibration: expected at least {2 * heads.width} tokens, as many as keys and values "
            f"have channels; the text gives {tokens}"
        )


def check_finite(what: str, t: torch.Tensor) -> None:
    """Raises MLAError when a tensor has an element that is NaN or infinite."""
    if bad := int((~torch.isfinite(t)).sum()):
        raise MLAError(f"{what}: expected finite numbers, got {bad} of {t.numel()} NaN or infinite")
