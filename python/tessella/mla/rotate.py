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
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.mla.shape import Heads, check_fold


def pair_moments(key_moments: Tensor, heads: Heads) -> Tensor:
    """Second moments [J, D/2, J, D/2] of pairs: of their first channels plus of their second ones.

    `key_moments` is sum_t k_t k_t^T [J * D, J * D] of the keys before RoPE.
    """
    J, half = heads.J, heads.D // 2
    m = key_moments.view(J, 2, half, J, 2, half)
    return m[:, 0, :, :, 0] + m[:, 1, :, :, 1]


def rotation(moments: Tensor, heads: Heads, collapse: int, fold: int) -> Tensor:
    """Orthogonal [J * D, J * D]: merged keys to rotated keys, the rope key's channels first.

    Args:
        moments: fp64, :func:`pair_moments` of the calibration keys.
        fold: neighbouring frequencies treated as one.

    Returns:
        A matrix whose first R = D / collapse rows give pairs (2i, 2i + 1), turned by angle
        collapse * i of the original head; the other rows give the channels that lose their RoPE.
    """
    check_fold(heads, collapse, fold)
    J, D, half = heads.J, heads.D, heads.D // 2
    keep = fold // collapse
    kept, dropped = [], []
    for first in range(0, half, fold):
        band = slice(first, first + fold)
        vectors = torch.linalg.eigh(
            moments[:, band, :, band].reshape(J * fold, J * fold)
        ).eigenvectors
        components = vectors.flip(1).T.reshape(-1, J, fold)
        rows = moments.new_zeros(J * fold, 2, J, 2, half)
        rows[:, 0, :, 0, band] = components
        rows[:, 1, :, 1, band] = components
        rows = rows.view(-1, 2, J * D)
        kept.append(rows[:keep])
        dropped.append(rows[keep:])
    return torch.cat((*kept, *dropped)).flatten(0, 1)


def energy_kept(key_moments: Tensor, rotated: Tensor, rope: int) -> float:
    """Share of the keys' energy in the channels that keep RoPE; `rotated` as from `rotation`."""
    top = rotated[:rope]
    return float(((top @ key_moments) * top).sum() / key_moments.diagonal().sum())
