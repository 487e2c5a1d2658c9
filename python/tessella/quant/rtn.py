"""Round-to-nearest weight quantisation with a clipped range, for every 4-bit scheme.

Each group of weights gets a range [lo, hi], and from it 16 equally spaced values::

    real = q * step + offset,    q = clamp(round((w - offset) / step), 0, 15)

The full range (min and max of the group) spends codes on rare extremes. ``clip="mse"`` tries
ranges :data:`RATIOS` times as wide and keeps the one with the smallest squared error of the
weights; no calibration data is needed. The full range is one of them, so clipping never costs
accuracy.

Letters: N out features, K in features, Kp = K rounded up to 128, G group size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessella.formats import W4Weight, group_size, padded_k
from tessella.layout import pack_nibbles
from tessella.ref.w4ax_gemm import w4_dequant

QMAX = 15
"""Largest 4-bit code."""

PROTECTIVE_RANGE = 119
"""Largest level-0 magnitude of the twolevel scheme (QServe section 4.1).

The largest byte of a group, 15 * s1 + a, exceeds 128 + hi by at most 7.5 (rounding of s1) + 0.5
(rounding of a), and 128 + 119 + 8 = 255. tests/test_quant.py checks every range.
"""

MAX_S1 = 16
"""Largest level-1 step: round(2 * 119 / 15)."""

RATIOS = tuple(1 - i / 40 for i in range(25))
"""Widths that MSE clipping tries, as parts of the full range: 1 down to 0.4."""

CLIPS: dict[str, tuple[float, ...]] = {"mse": RATIOS, "none": RATIOS[:1]}
"""Clipping methods, and the widths that each of them tries (the full range first)."""

TINY, HUGE = 2.0**-100, 2.0**100
"""A row below TINY everywhere is stored as zeros; a weight of HUGE or more is refused."""

CHUNK = 1 << 18
"""Weights that a thread works on at a time: bounds the memory and fits the L2 cache."""


def quantize(w_NK: Tensor, scheme: str, clip: str = "mse") -> W4Weight:
    """Quantise a weight to 4 bits by rounding to nearest.

    Args:
        w_NK: bf16, fp16, fp32 or fp64 [N, K], on any device, with any strides.
        scheme: one of :data:`tessella.formats.SCHEMES`.
        clip: "mse" (the range with the smallest squared error) or "none" (the full range).

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
    if w_NK.dim() != 2 or not w_NK.is_floating_point() or 0 in w_NK.shape:
        got = f"{w_NK.dtype} {tuple(w_NK.shape)}"
        raise ValueError(f"rtn: w: expected a floating-point matrix [N, K], got {got}")
    w_NK = w_NK.detach()
    N, K = w_NK.shape
    spec = W4Weight.spec(scheme, N, K)
    out = {f: w_NK.new_empty(shape, dtype=dtype) for f, (dtype, shape) in spec.items()}

    def work(rows: slice) -> None:
        _check_range(w_NK[rows], rows.start, scheme)
        for field, part in _quantize_rows(w_NK[rows].float(), scheme, CLIPS[clip]).items():
            out[field][rows] = part

    _for_rows(work, w_NK)
    return W4Weight.from_tensors(out, scheme, K)


def relative_error(w_NK: Tensor, q: W4Weight) -> float:
    """||dequant(q) - w|| / ||w||, Frobenius norms summed in fp64; 0 for an all-zero weight."""

    def work(rows: slice) -> tuple[float, float]:
        part = {f: t[rows] for f, t in q.tensors().items()}
        part = W4Weight.from_tensors(part, q.scheme, q.K)
        w = w_NK[rows].detach().double()
        error = w4_dequant(part)[:, : q.K] - w
        return error.square().sum().item(), w.square().sum().item()

    error, norm = (math.fsum(part) for part in zip(*_for_rows(work, w_NK)))
    return (error / norm) ** 0.5 if norm else 0.0


def _for_rows(work: Callable[[slice], Any], w_NK: Tensor) -> list:
    """The results of `work` for slices of rows that hold about CHUNK weights each.

    On a CPU the slices are spread over threads, and torch's ops run serially inside. The other
    way round, many short parallel ops, each of them waits for its slowest thread: where cores
    are shared with other programs that was measured to take ten times as long.
    """
    N, K = w_NK.shape
    chunk = CHUNK if w_NK.device.type == "cpu" else CHUNK << 7
    step = max(1, chunk // padded_k(K))
    slices = [slice(n, min(n + step, N)) for n in range(0, N, step)]
    threads = torch.get_num_threads()
    if threads == 1 or w_NK.device.type != "cpu":
        return [work(rows) for rows in slices]
    try:
        # set_num_threads is per thread, but threads to come take after the last call
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, slices))
    finally:
        torch.set_num_threads(threads)


def _check_range(w: Tensor, row0: int, scheme: str) -> None:
    """Refuse weights that no scale can carry, naming the first one; `row0` is w's first row."""
    # the step of a group is at most 2 * max / 15; 65504 is the largest fp16
    limit = HUGE if scheme in ("channel", "twolevel") else 65504.0 * QMAX / 2
    bad = ~(w.abs() < limit)
    if bad.any():
        row, col = bad.nonzero()[0].tolist()
        raise ValueError(
            f"rtn: w: expected finite weights below {limit:.3g} for scheme {scheme!r}, "
            f"got {w[row, col].item()} at row {row0 + row}, column {col}"
        )


class _Grid(NamedTuple):
    """The 16 values ``q * step + offset`` of each group, fp32 [n, groups, 1].

    `zero` is what the format stores for the offset: the code of 0, or (twolevel) the byte of
    code 0.
    """

    step: Tensor
    offset: Tensor
    zero: Tensor

    def position(self, u: Tensor) -> Tensor:
        """Where each value lies on the grid, in codes, before rounding."""
        return (u - self.offset).div_(torch.where(self.step == 0, 1.0, self.step))


def _quantize_rows(w: Tensor, scheme: str, ratios: tuple[float, ...]) -> dict[str, Tensor]:
    """The tensors of a :class:`W4Weight` for fp32 rows [n, K]."""
    n, K = w.shape
    Kp, G = padded_k(K), group_size(scheme, K)
    amax = w.abs().amax(1, keepdim=True)
    w = torch.where(amax < TINY, 0.0, w)
    tensors = {}
    if scheme == "twolevel":
        # a tensor divisor: CUDA multiplies by the reciprocal of a Python number
        s0 = torch.where(amax < TINY, 0.0, amax / torch.full_like(amax, PROTECTIVE_RANGE))
        w = w / torch.where(s0 == 0, 1.0, s0)
        tensors["channel_scales"] = s0[:, 0]
    if Kp != K:  # repeating the last channel leaves a group's range alone
        w = torch.cat([w, w[:, -1:].expand(n, Kp - K)], 1)
    u = w.view(n, Kp // G, G)
    grid = _search(u, K, scheme, ratios)
    q = grid.position(u).round_().clamp_(0, QMAX).view(n, Kp)
    q[:, K:] = 0
    step, zero = grid.step.squeeze(2), grid.zero.squeeze(2)
    if scheme == "channel":
        return {"codes": pack_nibbles(q), "channel_scales": step[:, 0], "zeros": zero[:, 0]}
    return {"codes": pack_nibbles(q), "group_scales": step, "zeros": zero, **tensors}


def _search(u: Tensor, K: int, scheme: str, ratios: tuple[float, ...]) -> _Grid:
    """The grid with the smallest squared error of each group of u [n, groups, G]."""
    lo, hi = u.amin(2, keepdim=True), u.amax(2, keepdim=True)
    if len(ratios) == 1:
        return _grid(lo, hi, ratios[0], scheme)
    widths = torch.tensor(ratios, device=u.device).view(-1, 1, 1, 1)
    grids = _grid(lo, hi, widths, scheme)  # [ratios, n, groups, 1]
    errors = torch.stack([_code_error(u, _Grid(*grid), K) for grid in zip(*grids)])
    # in units of the full range's step, so that the squares neither overflow nor vanish
    full = grids.step[:1]
    errors *= (grids.step / torch.where(full == 0, 1.0, full)).square_()
    errors[1:].masked_fill_(grids.step[1:] == 0, torch.inf)
    best = errors.argmin(0, keepdim=True)  # the widest of equals
    return _Grid(*(t.gather(0, best)[0] for t in grids))


def _grid(lo: Tensor, hi: Tensor, ratio: float | Tensor, scheme: str) -> _Grid:
    """The grid that covers `ratio` of the range [lo, hi] of each group."""
    if scheme == "twolevel":  # integer step and offset, in units of the channel scale
        cut = (hi - lo) * ((1 - ratio) / 2)
        step = ((hi - lo) * (ratio / QMAX)).round_().clamp_(1, MAX_S1)
        byte = torch.minimum(((lo + cut).round_() + 128).clamp_(min=0), 255 - QMAX * step)
        return _Grid(step, byte - 128, byte)
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)  # the zero code must lie in 0..15
    step = (hi - lo) * (ratio / QMAX)
    if scheme != "channel":
        step = step.half().float()
    zero = (lo * -ratio / torch.where(step == 0, 1.0, step)).round_().clamp_(0, QMAX)
    return _Grid(step, -zero * step, zero)


def _code_error(u: Tensor, grid: _Grid, K: int) -> Tensor:
    """Sum of squares of each group's rounding errors, in codes; padding channels left out."""
    t = grid.position(u)
    t.sub_(t.round().clamp_(0, QMAX))
    if t[0].numel() > K:
        t.view(t.shape[0], -1)[:, K:] = 0
    return t.square_().sum(2, keepdim=True)
