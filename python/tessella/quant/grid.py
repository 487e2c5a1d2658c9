"""Grids of 16 equally spaced values for a group of weights, in every 4-bit scheme.

Each group of weights gets a range [lo, hi], and from it a grid::

    real = q * step + offset,    q = clamp(round((w - offset) / step), 0, 15)

A *form* says how a `twolevel` grid comes about (QServe section 4.1). Level 0 divides a row by
s0 = max |w| / 119, to u within +-119; level 1 quantises u with the integer step
s1 = round((hi - lo) / 15):

* ``direct``: u as it is, and any byte as the value of code 0: one rounding.
* ``postscale``: u rounded to INT8 first, then the same (the released recipe's zero points, kept at
  INT8 resolution).
* ``prescale``: u rounded to INT8 first, and code 0 at -z * s1 with z = round(-lo / s1) in 0..15
  (the paper's).

Letters: N out features, K in features, Kp = K rounded up to 128, G group size.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessella.formats import BLOCK_K, W4Weight, group_size, padded_k
from tessella.layout import pack_nibbles

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

TINY, HUGE = 2.0**-100, 2.0**100
"""A row below TINY everywhere is stored as zeros; a weight of HUGE or more is refused."""

CHUNK = 1 << 18
"""Weights that a thread works on at a time: bounds the memory and fits the L2 cache."""


FORMS = ("direct", "postscale", "prescale")
"""How `twolevel` grids come about; other schemes have the first only."""


def for_rows(work: Callable[[slice], Any], w_NK: Tensor) -> list:
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


def check_range(w: Tensor, row0: int, scheme: str) -> None:
    """Refuse (ValueError) weights that no scale can carry, naming the first one.

    `row0` is the first row's number in the whole weight.
    """
    # the step of a group is at most 2 * max / 15; 65504 is the largest fp16
    limit = HUGE if scheme in ("channel", "twolevel") else 65504.0 * QMAX / 2
    bad = ~(w.abs() < limit)
    if bad.any():
        row, col = bad.nonzero()[0].tolist()
        raise ValueError(
            f"rtn: w: expected finite weights below {limit:.3g} for scheme {scheme!r}, "
            f"got {w[row, col].item()} at row {row0 + row}, column {col}"
        )


class Grid(NamedTuple):
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


def grid(lo: Tensor, hi: Tensor, ratio: float | Tensor, scheme: str, form: str = "direct") -> Grid:
    """The grid that covers `ratio` of the range [lo, hi] of each group."""
    if scheme == "twolevel" and form == "prescale":  # code 0 at a multiple of the step
        lo, hi = lo.clamp(max=0) * ratio, hi.clamp(min=0) * ratio
        step = ((hi - lo) / QMAX).round_().clamp_(1, MAX_S1)
        offset = (lo / step).round_().clamp_(-QMAX, 0) * step
        # the paper's integers never pass a byte, a range that was shrunk may
        offset = torch.where(offset + QMAX * step > 127, offset - step, offset)
        return Grid(step, offset, offset + 128)
    if scheme == "twolevel":  # integer step and offset, in units of the channel scale
        cut = (hi - lo) * ((1 - ratio) / 2)
        step = ((hi - lo) * (ratio / QMAX)).round_().clamp_(1, MAX_S1)
        byte = torch.minimum(((lo + cut).round_() + 128).clamp_(min=0), 255 - QMAX * step)
        return Grid(step, byte - 128, byte)
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)  # the zero code must lie in 0..15
    step = (hi - lo) * (ratio / QMAX)
    if scheme != "channel":
        step = step.half().float()
    zero = (lo * -ratio / torch.where(step == 0, 1.0, step)).round_().clamp_(0, QMAX)
    return Grid(step, -zero * step, zero)


def level0(w: Tensor, scheme: str, form: str = "direct") -> tuple[Tensor, Tensor | None]:
    """fp32 rows [n, K] -> (u [n, Kp], s0 [n, 1] or None): what level 1 quantises, w = u * s0.

    Padding repeats the last channel, which leaves a group's range alone.
    """
    n, K = w.shape
    amax = w.abs().amax(1, keepdim=True)
    w, s0 = torch.where(amax < TINY, 0.0, w), None
    if scheme == "twolevel":
        # a tensor divisor: CUDA multiplies by the reciprocal of a Python number
        s0 = torch.where(amax < TINY, 0.0, amax / torch.full_like(amax, PROTECTIVE_RANGE))
        w = w / torch.where(s0 == 0, 1.0, s0)
        w = w if form == "direct" else w.round()
    if padded_k(K) != K:
        w = torch.cat([w, w[:, -1:].expand(n, padded_k(K) - K)], 1)
    return w, s0


def search(
    u: Tensor,
    K: int,
    scheme: str,
    ratios: tuple[float, ...],
    form: str = "direct",
    weight: Tensor | None = None,
) -> Grid:
    """The grid with the smallest squared error of each group of u [n, groups, G].

    Args:
        K: channels that count; those after them are padding.
        ratios: widths to try, the full range first.
        weight: blocks [Kp/B, B, B] on the diagonal of the Hessian of the output's squared error,
            B = min(G, 128), which then is what is compared; zero for padding. None: the error of
            the weights.
    """
    lo, hi = u.amin(2, keepdim=True), u.amax(2, keepdim=True)
    if len(ratios) == 1:
        return grid(lo, hi, ratios[0], scheme, form)
    widths = torch.tensor(ratios, device=u.device).view(-1, 1, 1, 1)
    grids = grid(lo, hi, widths, scheme, form)  # [ratios, n, groups, 1]
    errors = torch.stack([_code_error(u, Grid(*g), K, weight) for g in zip(*grids)])
    # in units of the full range's step, so that the squares neither overflow nor vanish
    full = grids.step[:1]
    errors *= (grids.step / torch.where(full == 0, 1.0, full)).square_()
    errors[1:].masked_fill_(grids.step[1:] == 0, torch.inf)
    best = errors.argmin(0, keepdim=True)  # the widest of equals
    return Grid(*(t.gather(0, best)[0] for t in grids))


def _code_error(u: Tensor, grid: Grid, K: int, weight: Tensor | None) -> Tensor:
    """Sum of squares of each group's rounding errors, in codes; padding channels left out."""
    t = grid.position(u)
    t.sub_(t.round().clamp_(0, QMAX))
    if t[0].numel() > K:
        t.view(t.shape[0], -1)[:, K:] = 0
    if weight is None:
        return t.square_().sum(2, keepdim=True)
    n, groups, _ = t.shape
    t = t.view(n, len(weight), -1).transpose(0, 1)
    squares = torch.bmm(t, weight).mul_(t).sum(2).T.reshape(n, groups, -1)
    return squares.sum(2, keepdim=True)


def hessian_blocks(hessian_KK: Tensor, scheme: str) -> Tensor:
    """The blocks on a Hessian's diagonal that :func:`search` weighs errors with."""
    K = len(hessian_KK)
    B = min(group_size(scheme, K), BLOCK_K)
    padded = torch.nn.functional.pad(hessian_KK.float(), (0, padded_k(K) - K) * 2)
    blocks = padded.view(padded_k(K) // B, B, padded_k(K) // B, B)
    blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    # equal scale for all inputs: only ratios of errors matter, and squares must not overflow
    return (blocks / hessian_KK.diagonal().float().mean().clamp_min(TINY)).contiguous()


def store(q: Tensor, g: Grid, s0: Tensor | None, K: int, scheme: str) -> dict[str, Tensor]:
    """The tensors of a :class:`~tessella.formats.W4Weight` for codes q [n, Kp] on their grids."""
    q[:, K:] = 0
    step, zero = g.step.squeeze(2), g.zero.squeeze(2)
    fields = {"codes": pack_nibbles(q), "zeros": zero, "group_scales": step}
    if scheme == "channel":
        fields = {"codes": fields["codes"], "zeros": zero[:, 0], "channel_scales": step[:, 0]}
    if s0 is not None:
        fields["channel_scales"] = s0[:, 0]
    spec = W4Weight.spec(scheme, len(q), K)
    return {field: t.to(spec[field][0]).contiguous() for field, t in fields.items()}
