"""RoRoPE and FreqFold: rotations of merged keys that gather what RoPE must see in few channels.

The keys of all J heads are one vector of J * D channels, in which RoPE turns pair (j, l), channels
l and l + D / 2 of head j, by angle l, the same for every j. So any orthogonal map over j, applied
to both channels of the pairs of one l, commutes with RoPE, and applied to queries too it leaves
every score as it is (RoRoPE). With the eigenvectors of the keys' second moments the first of the J
rotated pairs holds most of the energy; RoPE is kept on it and dropped on the rest, which is the
lossy step.

FreqFold treats `fold` neighbouring frequencies as one: eigenvectors over (j, l in the band), of
which the first fold / c keep their RoPE, at the angles of frequencies c apart. So the angles of
the R = D / c channels that keep RoPE are those of a head of width R with the same base, whatever
the fold. (TransMLA, arXiv 2502.07864, sections 4.2 and 4.3.)

Two things are ours. Bands need not be of one width (:mod:`tessella.mla.bands` chooses them): a band
starting at frequency a gets the angles a, a + c, ..., which lie in it. And of the components that
a band keeps, the one made of its fastest frequencies gets its fastest angle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.mla.shape import Fold, Heads, bands_of, check_fold


def pair_moments(key_moments: Tensor, heads: Heads) -> Tensor:
    """Second moments [J, D/2, J, D/2] of pairs: of their first channels plus of their second ones.

    `key_moments` is sum_t k_t k_t^T [J * D, J * D] of the keys before RoPE.
    """
    J, half = heads.J, heads.D // 2
    m = key_moments.view(J, 2, half, J, 2, half)
    return m[:, 0, :, :, 0] + m[:, 1, :, :, 1]


def band_components(moments: Tensor, first: int, count: int, keep: int) -> Tensor:
    """Principal components [J * count, J, count] of `count` frequencies: rows to project on.

    The strongest come first; the `keep` strongest among themselves by the frequencies that they
    are made of, fastest first.
    """
    J, band = moments.shape[0], slice(first, first + count)
    vectors = torch.linalg.eigh(moments[:, band, :, band].reshape(J * count, -1)).eigenvectors
    found = vectors.flip(1).T.reshape(-1, J, count)
    index = torch.arange(count, dtype=found.dtype, device=found.device)
    order = (found[:keep].square().sum(1) @ index).argsort()
    return torch.cat((found[:keep][order], found[keep:]))


def rotation(moments: Tensor, heads: Heads, collapse: int, fold: Fold) -> Tensor:
    """Orthogonal [J * D, J * D]: merged keys to rotated keys, the rope key's channels first.

    Args:
        moments: fp64, :func:`pair_moments` of the calibration keys.
        fold: neighbouring frequencies treated as one, or the widths of all bands.

    Returns:
        A matrix whose first R = D / collapse rows give pairs (2i, 2i + 1), turned by angle
        collapse * i of the original head; the other rows give the channels that lose their RoPE.

    Raises MLAError for bands that do not fill a head or do not collapse evenly.
    """
    check_fold(heads, collapse, fold)
    J, D, half = heads.J, heads.D, heads.D // 2
    kept, dropped, first = [], [], 0
    for count in bands_of(heads, fold):
        keep, band = count // collapse, slice(first, first + count)
        found = band_components(moments, first, count, keep)
        rows = moments.new_zeros(J * count, 2, J, 2, half)
        rows[:, 0, :, 0, band] = found
        rows[:, 1, :, 1, band] = found
        rows = rows.view(-1, 2, J * D)
        kept.append(rows[:keep])
        dropped.append(rows[keep:])
        first += count
    return torch.cat((*kept, *dropped)).flatten(0, 1)


def energy_kept(key_moments: Tensor, rotated: Tensor, rope: int) -> float:
    """Share of the keys' energy in the channels that keep RoPE; `rotated` as from `rotation`."""
    top = rotated[:rope]
    return float(((top @ key_moments) * top).sum() / key_moments.diagonal().sum())
