"""Reference of w4ax_gemm and of the weight formats, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.formats import BLOCK_K, ActBlocks, W4Weight
from tessella.layout import PANEL_N, unpack_nibbles, unpack_signed_nibbles


def w4_dequant(w: W4Weight, dtype: torch.dtype = torch.float64) -> Tensor:
    """The real weight [N, Kp] that the codes stand for (padding channels included)."""
    q = unpack_nibbles(w.codes).to(dtype)
    if w.scheme == "channel":
        return (q - w.zeros[:, None].to(dtype)) * w.channel_scales[:, None].to(dtype)
    z = w.zeros.to(dtype).repeat_interleave(w.G, 1)
    s = w.group_scales.to(dtype).repeat_interleave(w.G, 1)
    if w.scheme == "twolevel":
        return (q * s + z - 128) * w.channel_scales[:, None].to(dtype)
    return (q - z) * s


def act_codes(a: ActBlocks) -> Tensor:
    """Codes int8 [M, Kp] of both precisions, in channel order."""
    both = torch.cat([a.codes8, unpack_signed_nibbles(a.codes4)])
    return both.transpose(0, 1).reshape(a.M, a.Kp)


def act_dequant(a: ActBlocks, dtype: torch.dtype = torch.float64) -> Tensor:
    """The real activations [M, Kp] that the codes stand for."""
    s = a.scales.to(dtype)
    B8, B = a.K8 // BLOCK_K, a.Kp // BLOCK_K
    if a.granularity == "token":
        s = s.expand(B, a.M)
    elif a.granularity == "class":
        s = torch.cat([s[:1].expand(B8, a.M), s[1:].expand(B - B8, a.M)])
    return act_codes(a).to(dtype) * s.repeat_interleave(BLOCK_K, 0).T


def w4ax_gemm(
    a: ActBlocks, w: W4Weight, bias: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``y = dequant(a) @ dequant(w)^T + bias`` computed in fp64, returned as `dtype` [M, N]."""
    y = act_dequant(a) @ w4_dequant(w).T
    if bias is not None:
        y = y + bias.double()
    return y.to(dtype)


def rows(w: W4Weight, first: int, count: int) -> W4Weight:
    """Out features first..first + count - 1 of a weight."""
    part = {name: t[first : first + count] for name, t in w.tensors().items()}
    return W4Weight.from_tensors(part, w.scheme, w.K)


def check_groups(shape: torch.Size, N: int, features: int, first: int, stride: int) -> None:
    """Raise ValueError where w4ax_grouped refuses the groups of x [T, G, K], as the kernels do."""
    op = "tessella::w4ax_grouped"
    if len(shape) != 3 or 0 in shape[1:]:
        raise ValueError(f"{op}: x: expected [T, G, K] with G, K >= 1, got {tuple(shape)}")
    for name, given, least in (("features", features, PANEL_N), ("first", first, 0),
                               ("stride", stride, 0)):  # fmt: skip
        if given < least or given % PANEL_N:
            raise ValueError(
                f"{op}: {name}: expected a multiple of {PANEL_N} from {least} on, got {given}"
            )
    if first + (shape[1] - 1) * stride + features > N:
        raise ValueError(
            f"{op}: N: expected at least first + (G - 1) * stride + features = "
            f"{first} + {shape[1] - 1} * {stride} + {features}, got {N}"
        )
