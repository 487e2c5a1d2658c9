"""Round-to-nearest weight quantisation with a clipped range, for every 4-bit scheme.

Each group of weights gets a range [lo, hi], and from it 16 equally spaced values::

    real = q * step + offset,    q = clamp(round((w - offset) / step), 0, 15)

The full range (min and max of the group) spends codes on rare extremes. ``clip="mse"`` tries
ranges :data:`RATIOS` times as wide and keeps the one with the smallest squared error of the
weights; no calibration data is needed. ``clip="output"`` compares the squared error of the
products with calibrated inputs instead. The full range is one of them, so clipping never costs
accuracy. Grids are made in :mod:`tessella.quant.grid`.

Letters: N out features, K in features, Kp = K rounded up to 128, G group size.
"""

from __future__ import annotations

import math

from torch import Tensor

from tessella.formats import W4Weight, group_size
from tessella.quant import grid
from tessella.quant.grid import MAX_S1, PROTECTIVE_RANGE, QMAX, RATIOS, TINY
from tessella.ref.w4ax_gemm import w4_dequant

__all__ = ["CLIPS", "MAX_S1", "PROTECTIVE_RANGE", "RATIOS", "TINY", "quantize", "relative_error"]

CLIPS: dict[str, tuple[float, ...]] = {"mse": RATIOS, "none": RATIOS[:1], "output": RATIOS}
"""Clipping methods, and the widths that each of them tries (the full range first)."""


def quantize(
    w_NK: Tensor, scheme: str, clip: str = "mse", hessian_KK: Tensor | None = None
) -> W4Weight:
    """Quantise a weight to 4 bits by rounding to nearest.

    Args:
        w_NK: bf16, fp16, fp32 or fp64 [N, K], on any device, with any strides.
        scheme: one of :data:`tessella.formats.SCHEMES`.
        clip: "mse" (the range with the smallest squared error), "output" (that of the products
            with the inputs that `hessian_KK` describes, block by block) or "none" (the full range).
        hessian_KK: mean of x x^T over the inputs; for "output".

    Returns:
        :class:`~tessella.formats.W4Weight` on the same device; padding channels have code 0.
        A row below 2^-100 everywhere, and a group whose fp16 step underflows (its range is
        below 15 * 2^-25), get step 0: they stand for zeros.

    Raises:
        ValueError: unknown scheme or clip; w is no floating-point [N, K]; it holds a NaN, an inf
            or a weight too large for the scheme's scales (named by row and column).
    """
    if clip not in CLIPS:
        raise ValueError(f"rtn: clip: expected one of {', '.join(CLIPS)}, got {clip!r}")
    if clip == "output" and hessian_KK is None:
        raise ValueError("rtn: clip: 'output' needs the Hessian of calibrated inputs, got none")
    if w_NK.dim() != 2 or not w_NK.is_floating_point() or 0 in w_NK.shape:
        got = f"{w_NK.dtype} {tuple(w_NK.shape)}"
        raise ValueError(f"rtn: w: expected a floating-point matrix [N, K], got {got}")
    w_NK = w_NK.detach()
    N, K = w_NK.shape
    spec = W4Weight.spec(scheme, N, K)
    out = {f: w_NK.new_empty(shape, dtype=dtype) for f, (dtype, shape) in spec.items()}

    weight = grid.hessian_blocks(hessian_KK, scheme) if clip == "output" else None

    def work(rows: slice) -> None:
        grid.check_range(w_NK[rows], rows.start, scheme)
        parts = _quantize_rows(w_NK[rows].float(), scheme, CLIPS[clip], weight)
        for field, part in parts.items():
            out[field][rows] = part

    grid.for_rows(work, w_NK)
    return W4Weight.from_tensors(out, scheme, K)


def relative_error(w_NK: Tensor, q: W4Weight) -> float:
    """||dequant(q) - w|| / ||w||, Frobenius norms summed in fp64; 0 for an all-zero weight."""

    def work(rows: slice) -> tuple[float, float]:
        part = {f: t[rows] for f, t in q.tensors().items()}
        part = W4Weight.from_tensors(part, q.scheme, q.K)
        w = w_NK[rows].detach().double()
        error = w4_dequant(part)[:, : q.K] - w
        return error.square().sum().item(), w.square().sum().item()

    error, norm = (math.fsum(part) for part in zip(*grid.for_rows(work, w_NK)))
    return (error / norm) ** 0.5 if norm else 0.0


def _quantize_rows(
    w: Tensor, scheme: str, ratios: tuple[float, ...], weight: Tensor | None
) -> dict[str, Tensor]:
    """The tensors of a :class:`W4Weight` for fp32 rows [n, K]."""
    n, K = w.shape
    u, s0 = grid.level0(w, scheme)
    u = u.view(n, -1, group_size(scheme, K))
    g = grid.search(u, K, scheme, ratios, weight=weight)
    q = g.position(u).round_().clamp_(0, QMAX).view(n, -1)
    return grid.store(q, g, s0, K, scheme)
