"""FMPQ: most blocks of activations in INT4, those with outliers in INT8 (COMET section 3).

For each site (linears that read the same tensor) calibration statistics decide:

1. A channel is an outlier when its largest magnitude is over `outlier` times the median one's.
   With `smooth`, part of that ratio moves into the weights first, exactly: the norm before (or
   up_proj) makes the channel smaller by ratio^smooth, its columns grow by as much. An outlier
   takes the range of its block from the 127 channels that share it; this gives some back.
2. Where the relative error of the site's output with all activations in INT4 is within the error
   budget, no channel moves. Otherwise channels are permuted, the largest first, and the blocks of
   128 that hold outliers become INT8.
3. Where the error is still over the budget, and with `hadamard`, the INT4 blocks are rotated, each
   by a Hadamard matrix, if that lowers the error by at least :data:`GAIN`.
4. More blocks become INT8 while the error is over the budget and each lowers it by at least
   :data:`GAIN`, up to the share `most`.

COMET publishes neither threshold nor budget; the error here is that of activations alone, on rows
of the calibration text, with the scales that the recipe gives activations (per block, or two per
token). Where a permutation goes is the caller's matter: into the weights before it where that is
exact, otherwise into the kernel that quantises.

Letters: S sampled tokens, N out features, K in features (Kp in whole blocks), B blocks of 128.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tessella.formats import BLOCK_K, padded_k
from tessella.quant import layer as layers
from tessella.quant.calibrate import SITES
from tessella.quant.kv.hadamard import matrix
from tessella.quant.layer import Layer
from tessella.quant.steps import PERMUTE, STATS, Step, expect_bool, expect_number
from tessella.ref.act_quant import act_quant
from tessella.ref.w4ax_gemm import act_dequant

FOLDED = ("attn", "mlp", "down")
"""Sites whose channels can be made smaller by what makes them: a norm's gain, or up_proj."""

GAIN = 0.15
"""What one more INT8 block, or a rotation, must take off the error to be worth its time."""


@dataclass(frozen=True)
class Fmpq(Step):
    """Mark blocks of activations INT8 or INT4, with their channels in an order that suits.

    The order of down_proj's inputs goes into gate_proj and up_proj; elsewhere activations are
    permuted when they are quantised, and only where blocks are mixed.
    """

    outlier: float = 8.0
    error: float = 0.08
    most: float = 0.25
    smooth: float = 0.5
    hadamard: bool = False
    stage: ClassVar[int] = PERMUTE
    mixed: ClassVar[bool] = True

    def __post_init__(self):
        expect_number("steps.fmpq.outlier", self.outlier, 1, 1e6)
        expect_number("steps.fmpq.error", self.error, 1e-6, 1)
        expect_number("steps.fmpq.most", self.most, 0, 1)
        expect_number("steps.fmpq.smooth", self.smooth, 0, 1)
        expect_bool("steps.fmpq.hadamard", self.hadamard)

    @property
    def needs(self) -> frozenset[str]:
        return STATS

    @property
    def permutes(self) -> tuple[str, ...]:
        return ("attn", "o", "mlp")

    def change(self, layer: Layer) -> None:
        for site in SITES:
            self.change_site(layer, site)

    def change_site(self, layer: Layer, site: str) -> Marks:
        """Change one site of a layer; returns what was decided."""
        stats, acts = layer.stats[site], layer.acts[site]
        size = stats.amax
        if self.smooth and site in FOLDED:
            layers.scale(layer, site, shrink(size, self.outlier, self.smooth))
        found = mark(
            stats.rows,
            size,
            [layer.tensors[name] for name in layer.columns(site)],
            outlier=self.outlier,
            budget=self.error,
            most=self.most,
            granularity=layer.target.granularity,
            hadamard=self.hadamard,
        )
        if found.perm is not None:
            layers.permute(layer, site, found.perm)
        acts.k8, acts.hadamard = found.k8, found.hadamard
        if found.hadamard:
            layers.turn_inputs(layer, site, lambda t: rotate_blocks(t, found.k8))
        return found


def shrink(amax_K: Tensor, outlier: float, smooth: float) -> Tensor:
    """What outliers are multiplied by, [K]: (median / amax)^smooth; 1 for other channels."""
    median = amax_K.median()
    over = amax_K > outlier * median
    ratio = torch.where(over & (median > 0), median / amax_K.clamp_min(1e-30), 1.0)
    return ratio**smooth


@dataclass(frozen=True)
class Marks:
    """What FMPQ decided for a site."""

    k8: int
    """Channels in INT8, a multiple of 128."""
    perm: Tensor | None
    """int64 [K], None where no channel moves: channel k of the result is channel perm[k]."""
    hadamard: bool
    """Whether the INT4 blocks are rotated."""
    outliers: int
    """Channels over the threshold."""
    error: float
    """Of the site's output with these marks, relative, on the sampled rows."""
    error_int4: float
    """The same with every channel in INT4 and in place."""


def mark(
    rows_SK: Tensor,
    amax_K: Tensor,
    weights: Sequence[Tensor],
    *,
    outlier: float,
    budget: float,
    most: float,
    granularity: str,
    hadamard: bool = False,
) -> Marks:
    """Decide the blocks of one site.

    Args:
        rows_SK: inputs of some tokens, floats [S, K].
        amax_K: largest magnitude of each channel over the whole calibration text.
        weights: [N, K] of each linear that reads them.
        outlier: a channel whose amax is over this times the median is an outlier.
        budget: relative error of the output up to which all blocks stay INT4, above 0.
        most: largest share of the blocks in INT8, rounded up to whole blocks.
        granularity: of the activation scales, "class" or "block".
        hadamard: also try rotated INT4 blocks; not where K is no multiple of 128.

    Raises ValueError for granularity "token", which cannot mix precisions.
    """
    if granularity == "token":
        raise ValueError("fmpq: granularity: expected 'class' or 'block', got 'token'")
    K = rows_SK.shape[1]
    B = padded_k(K) // BLOCK_K
    w_NK = torch.cat([w.float() for w in weights])
    x_SK = rows_SK.float()
    outliers = int((amax_K > outlier * amax_K.median()).sum())
    largest_first = amax_K.argsort(descending=True, stable=True)

    def candidate(blocks: int, turn: bool = False) -> Marks:
        perm, k8 = largest_first if blocks else None, blocks * BLOCK_K
        error = output_error(x_SK, w_NK, k8, perm, granularity, turn)
        return Marks(k8, perm, turn, outliers, error, whole.error if whole else error)

    whole = None
    whole = best = candidate(0)
    limit = math.ceil(most * B)
    holding = min(limit, -(-outliers // BLOCK_K))
    if whole.error > budget and holding:
        best = candidate(holding)
    if best.error > budget and hadamard and K % BLOCK_K == 0:
        turned = candidate(holding, True)
        best = turned if turned.error <= (1 - GAIN) * best.error else best
    while best.error > budget and best.k8 // BLOCK_K < limit:
        more = candidate(best.k8 // BLOCK_K + 1, best.hadamard)
        if more.error > (1 - GAIN) * best.error:
            break
        best = more
    return best


def output_error(
    x_SK: Tensor,
    w_NK: Tensor,
    k8: int,
    perm: Tensor | None,
    granularity: str,
    hadamard: bool = False,
) -> float:
    """||(q(x) - x) w^T|| / ||x w^T|| where q quantises activations as marked; 0 for no output."""
    K = x_SK.shape[1]
    if perm is not None:
        x_SK, w_NK = x_SK[:, perm], w_NK[:, perm]
    norm = (x_SK @ w_NK.T).norm()
    if hadamard:
        x_SK, w_NK = rotate_blocks(x_SK, k8), rotate_blocks(w_NK, k8)
    error = dequantised(x_SK, k8, granularity)[:, :K] - x_SK
    return float((error @ w_NK.T).norm() / norm) if norm > 0 else 0.0


def dequantised(x_MK: Tensor, k8: int, granularity: str) -> Tensor:
    """What act_quant's codes of x [M, K] stand for, fp32 [M, Kp]."""
    return act_dequant(act_quant(x_MK.float(), k8, granularity), torch.float32)


def rotate_blocks(x: Tensor, k8: int) -> Tensor:
    """x [..., K], each block of 128 channels from k8 on times the Hadamard matrix / sqrt(128).

    Orthogonal and symmetric: ``rotate(x) @ rotate(w)^T = x @ w^T``, and twice is once nothing. In
    fp32 (fp64 for fp64), rounded to x's dtype at the end. K is a multiple of 128.
    """
    if not 0 <= k8 < x.shape[-1]:
        return x  # all channels are INT8
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = matrix(BLOCK_K).sign().to(x.device, wide)
    blocks = x[..., k8:].to(wide).unflatten(-1, (-1, BLOCK_K))
    turned = ((blocks @ h) * BLOCK_K**-0.5).flatten(-2).to(x.dtype)
    return turned if k8 == 0 else torch.cat([x[..., :k8], turned], -1)


def w4a4_share(linears: Iterable[tuple[int, int, int]]) -> float:
    """Share of the GEMM volume N x K x M whose activations are INT4, of linears (N, K, k8).

    Padding channels are no volume; k8 = -1 means all channels. 0 without linears.
    """
    whole = int4 = 0
    for N, K, k8 in linears:
        whole += N * K
        int4 += N * max(0, K - (K if k8 < 0 else k8))
    return int4 / whole if whole else 0.0
