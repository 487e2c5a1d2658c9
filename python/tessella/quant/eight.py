"""8-bit weights in the 4-bit format: two nibbles side by side along the input.

A weight of K channels becomes one of 2K, which meets its input written twice. With a byte
b = 16 h + l and one scale s for each out feature::

    real = (b - 128) s = (h - 8) (16 s) + (l - 0) s

so the first K channels have codes h, scale 16 s and zero 8, the others l, s and 0: a kernel for
groups of channels multiplies it as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.formats import W4Weight
from tessella.layout import pack_nibbles


def quantize(w_NK: Tensor) -> W4Weight:
    """Round a weight [N, K] to 8 bits, symmetric, one scale for each out feature: [N, 2K].

    K is a multiple of 64. Multiply it with ``torch.cat((x, x), -1)``. Scales are rounded up to
    fp16, so that the largest weight of a row keeps a code: errors are at most half a scale.

    Raises ValueError for another K, for a NaN, an inf, or a weight too large for fp16 scales.
    """
    N, K = w_NK.shape
    if K % 64:
        raise ValueError(
            f"eight: w: expected [N, K] with K a multiple of 64, got {tuple(w_NK.shape)}"
        )
    w = w_NK.float()
    amax = w.abs().amax(1, keepdim=True)
    s = (amax / 127).half()
    s = torch.where(s.float() * 127 < amax, torch.nextafter(s, s.new_tensor(torch.inf)), s)
    if not bool(torch.isfinite(s * 16).all()):
        raise ValueError("eight: w: expected finite weights below 519000")
    inverse = torch.where(s > 0, 1 / s.float(), 0.0)
    byte = (torch.round(w * inverse) + 128).clamp_(1, 255).to(torch.uint8)
    G = 128 if K % 128 == 0 else 64
    scales = torch.cat((s * 16, s), 1).repeat_interleave(K // G, 1)
    zeros = torch.tensor([8, 0], dtype=torch.uint8, device=w.device).repeat_interleave(K // G)
    codes = pack_nibbles(torch.cat((byte >> 4, byte & 15), 1))
    return W4Weight(codes, None, scales, zeros.expand(N, -1).contiguous(), f"g{G}", 2 * K)
