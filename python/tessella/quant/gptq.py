"""Rounding with error feedback (GPTQ), on the grids of every 4-bit scheme.

Channels are rounded one after the other; what a channel loses, the ones not yet rounded make up
for, as far as the inputs are correlated. With H the mean of x x^T and U the upper Cholesky factor
of its inverse (GPTQ, algorithm 1)::

    e = (w_k - grid(w_k)) / U[k, k];   w_j -= e * U[k, j]  for all j > k

Letters: N out features, K in features, Kp = K rounded up to 128, G group size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.formats import BLOCK_K, W4Weight, group_size, padded_k
from tessella.quant import grid
from tessella.quant.grid import FORMS, QMAX, Grid
from tessella.quant.rtn import CLIPS

DAMPING_TRIES = 4
"""A Hessian that is not positive is damped ten times as much, up to so many times."""


def quantize(
    w_NK: Tensor,
    scheme: str,
    hessian_KK: Tensor,
    *,
    clip: str = "output",
    form: str = "direct",
    damping: float = 0.01,
    act_order: bool = False,
) -> W4Weight:
    """Quantise a weight to 4 bits so that its products with calibrated inputs change little.

    Args:
        w_NK: bf16, fp16, fp32 or fp64 [N, K].
        scheme: one of :data:`tessella.formats.SCHEMES`.
        hessian_KK: mean of x x^T over the inputs.
        clip: how wide a group's grid is, see :func:`tessella.quant.rtn.quantize`.
        form: of `twolevel` grids, see :mod:`tessella.quant.grid`.
        damping: part of the Hessian's mean diagonal that is added to it.
        act_order: round the channels with the largest inputs first, on grids that were made from
            the weights as they were; otherwise a group's grid is made when its turn comes.

    Returns:
        :class:`~tessella.formats.W4Weight` on the same device.

    Raises:
        ValueError: as :func:`tessella.quant.rtn.quantize`, or a Hessian of another size or that
            cannot be inverted.
    """
    N, K = w_NK.shape
    if tuple(hessian_KK.shape) != (K, K):
        got = tuple(hessian_KK.shape)
        raise ValueError(f"gptq: hessian: expected ({K}, {K}) for w [{N}, {K}], got {got}")
    grid.check_range(w_NK, 0, scheme)
    u, s0 = grid.level0(w_NK.detach().float(), scheme, form)
    blocks = grid.hessian_blocks(hessian_KK, scheme) if clip == "output" else None
    maker = _Grids(K, scheme, CLIPS[clip], form, blocks)
    H = torch.nn.functional.pad(hessian_KK.float(), (0, padded_k(K) - K) * 2)
    order = torch.arange(padded_k(K), device=H.device)
    if act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
        maker.all_groups(u)
        H = H[order][:, order]
    U = _inverse_factor(H, damping)
    q = _feedback(u.T[order].contiguous(), U, maker, order)
    return W4Weight.from_tensors(grid.store(q, maker.whole(), s0, K, scheme), scheme, K)


class _Grids:
    """The grids of a weight's groups, each made when it is first asked for."""

    def __init__(
        self, K: int, scheme: str, ratios: tuple[float, ...], form: str, blocks: Tensor | None
    ):
        self.K, self.scheme, self.ratios, self.form, self.blocks = K, scheme, ratios, form, blocks
        self.G = group_size(scheme, K)
        self.groups: dict[int, Grid] = {}

    def all_groups(self, u: Tensor) -> None:
        """Make all grids from u [N, Kp]."""
        for g in range(u.shape[1] // self.G):
            self.make(g, u[:, g * self.G : (g + 1) * self.G])

    def make(self, g: int, u: Tensor) -> None:
        """The grid of group g from its values [N, G]."""
        inside = min(self.K - g * self.G, self.G)
        blocks = self.blocks
        if blocks is not None:
            each = self.G // blocks.shape[1]
            blocks = blocks[g * each : (g + 1) * each]
        parts = [
            grid.search(part[:, None], inside, self.scheme, self.ratios, self.form, blocks)
            for part in u.split(max(1, grid.CHUNK // self.G))
        ]
        self.groups[g] = Grid(*(torch.cat(ts) for ts in zip(*parts)))

    def whole(self) -> Grid:
        """All groups' grids as one, [N, groups, 1]."""
        return Grid(*(torch.cat(ts, 1) for ts in zip(*(self.groups[g] for g in range(self.count)))))

    @property
    def count(self) -> int:
        """Groups along K."""
        return padded_k(self.K) // self.G


def _inverse_factor(H: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U^T U = inverse of H (damped); channels without inputs get ones."""
    diagonal = H.diagonal()
    dead = diagonal == 0
    if not torch.isfinite(diagonal).all():
        raise ValueError("gptq: hessian: expected finite values")
    H = H.flip(0, 1).contiguous()  # H = R R^T with R upper triangular, then U = R^-1
    mean = diagonal[~dead].mean() if not dead.all() else diagonal.new_ones(())
    H.diagonal().copy_(torch.where(dead, mean, diagonal).flip(0))
    for attempt in range(DAMPING_TRIES):
        H.diagonal().add_(mean * damping * (0.9 * 10**attempt if attempt else 1))
        L, failed = torch.linalg.cholesky_ex(H)
        if not failed:
            R = L.flip(0, 1)
            eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
            return torch.linalg.solve_triangular(R, eye, upper=True)
    raise ValueError(
        f"gptq: hessian: not positive definite with damping {damping}: expected more calibration "
        "tokens or more damping"
    )


def _feedback(w: Tensor, U: Tensor, maker: _Grids, order: Tensor) -> Tensor:
    """Codes [N, Kp] of w [Kp, N], whose rows are the channels `order` and change on the way."""
    Kp, N = w.shape
    G = maker.G
    sequential = not maker.groups
    q = torch.empty_like(w)
    channels = order.tolist()
    for start in range(0, Kp, BLOCK_K):
        errors = w.new_empty(BLOCK_K, N)
        end = start + BLOCK_K
        for i in range(start, end):
            if sequential and i % G == 0:
                maker.make(i // G, w[i : i + G].T)
            step, offset, _ = (t[:, 0, 0] for t in maker.groups[channels[i] // G])
            codes = Grid(step, offset, offset).position(w[i]).round_().clamp_(0, QMAX)
            q[i] = codes
            e = (w[i] - codes * step - offset) / U[i, i]
            errors[i - start] = e
            w[i + 1 : end].addr_(U[i, i + 1 : end], e, alpha=-1)
        w[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(Kp, device=order.device)
    return q[back].T.contiguous()


__all__ = ["FORMS", "quantize"]
