"""One latent for keys without RoPE and values: balanced joint principal components (BKV).

With k~ [N] the rotated key channels without RoPE and v [J * D] the values, the latent is

    c = P^T [k~ / alpha ; v],   P [N + J * D, L]: the first eigenvectors of the second moments,

and alpha, the ratio of the mean norms of a key channel and a value channel, keeps the larger of
the two from taking all of the rank (TransMLA, arXiv 2502.07864, section 4.4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Components:
    """Principal components of a layer's keys and values.

    `vectors` fp64 [N + V, N + V] has one a column, the strongest first; `energies` [N + V] are
    their eigenvalues; `alpha` is what keys were divided by; the first `N` rows belong to keys.
    """

    vectors: Tensor
    energies: Tensor
    alpha: float
    N: int

    def up(self, rank: int) -> tuple[Tensor, Tensor]:
        """Latent to keys [N, rank] and to values [V, rank]."""
        top = self.vectors[:, :rank]
        return self.alpha * top[: self.N], top[self.N :]

    def down(self, rank: int) -> tuple[Tensor, Tensor]:
        """Keys and values to the latent: [rank, N] and [rank, V]."""
        top = self.vectors[:, :rank].T
        return top[:, : self.N] / self.alpha, top[:, self.N :]


def components(moments: Tensor, rotated: Tensor, rope: int) -> Components:
    """Principal components of [k~ / alpha ; v].

    Args:
        moments: fp64 sum_t [k; v][k; v]^T [2W, 2W] of keys before RoPE and values, W = J * D.
        rotated: [W, W] of :func:`tessella.mla.rotate.rotation`.
        rope: rows of it that keep RoPE, R.
    """
    W = rotated.shape[0]
    nope, N = rotated[rope:], W - rope
    keys = nope @ moments[:W, :W] @ nope.T
    cross = nope @ moments[:W, W:]
    values = moments[W:, W:]
    norms = _mean_norm(keys) if N else 0.0, _mean_norm(values)
    alpha = norms[0] / norms[1] if all(norms) else 1.0  # 1: no keys, or nothing but zeros
    joint = torch.cat(
        (torch.cat((keys / alpha**2, cross / alpha), 1), torch.cat((cross.T / alpha, values), 1))
    )
    found = torch.linalg.eigh((joint + joint.T) / 2)
    return Components(found.eigenvectors.flip(1), found.eigenvalues.flip(0).clamp_min(0), alpha, N)


def _mean_norm(moments: Tensor) -> float:
    """Mean over channels of the norm over tokens."""
    return float(moments.diagonal().clamp_min(0).sqrt().mean())


def hadamard(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Orthogonal [n, n] whose entries all are of one size, for any n, or nearly so.

    Sylvester's matrix for the power of two in n, times Hartley's (cos + sin) for the odd rest. A
    latent multiplied by it has its energy spread over all channels, so that one scale a token
    serves all of them (QuaRot, arXiv 2404.00456, section 3).
    """
    odd = n // (n & -n)
    angle = 2 * torch.pi / odd * torch.outer(torch.arange(odd), torch.arange(odd)).to(dtype)
    h = (angle.cos() + angle.sin()) * odd**-0.5
    while h.shape[0] < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1))) * 0.5**0.5
    return h


def per_token(latent: Tensor, bits: int) -> Tensor:
    """[..., L] rounded to symmetric codes of `bits` with one fp16 scale a token, and back."""
    top = 2 ** (bits - 1) - 1
    x = latent.float()
    scale = (x.abs().amax(-1, keepdim=True) / top).half().float()
    codes = (x / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-top, top)
    return (codes * scale).to(latent.dtype)


def allocate(energies: list[Tensor], rank: int, step: int, most: int) -> list[int]:
    """A rank for each layer, `rank` in the mean, where each step keeps the most energy.

    Args:
        energies: of each layer's components, strongest first; only shares of a layer count.
        rank: mean over layers.
        step: ranks are multiples of it, at least one.
        most: of a layer.
    """
    shares = [e / e.sum().clamp_min(torch.finfo(e.dtype).tiny) for e in energies]
    ranks = [step] * len(energies)

    def gain(i: int) -> float:
        full = ranks[i] + step > min(most, len(shares[i]))
        return -1.0 if full else float(shares[i][ranks[i] : ranks[i] + step].sum())

    for _ in range(rank * len(ranks) // step - len(ranks)):
        best = max(range(len(ranks)), key=gain)
        if gain(best) < 0:
            break
        ranks[best] += step
    return ranks
