"""Reference of act_quant: per-token symmetric dynamic quantisation into ActBlocks."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.formats import BLOCK_K, FLOAT_DTYPES, ActBlocks, padded_k, scales_shape
from tessella.layout import pack_nibbles

TINY = 2.0**-100
"""A token (or block) whose largest magnitude is below this is stored as zeros with scale 0."""


def act_quant(
    x_MK: Tensor, k8: int = -1, granularity: str = "token", perm: Tensor | None = None
) -> ActBlocks:
    """Quantise activations; see :func:`tessella.ops.act_quant` for arguments and errors.

    For each unit that shares a scale, with qmax = 127 (INT8) or 7 (INT4)::

        amax = max |x|;  scale = amax / qmax;  code = round_half_even(x * (qmax / amax))

    computed in fp32, each step rounded once, so that every backend gives the same codes. A
    unit below TINY has scale 0 and codes 0; one that holds an inf or a NaN has scale NaN and
    codes 0, so that every result that uses it is NaN.
    """
    check(x_MK, k8, granularity, perm)
    M, K = x_MK.shape
    Kp = padded_k(K)
    K8 = Kp if k8 < 0 else k8
    x = x_MK.float() if perm is None else x_MK.float()[:, perm.long()]
    x = torch.nn.functional.pad(x, (0, Kp - K)).view(M, Kp // BLOCK_K, BLOCK_K)
    x = x.transpose(0, 1).contiguous()
    B8 = K8 // BLOCK_K
    codes = torch.empty_like(x, dtype=torch.int8)
    scales = x.new_zeros(scales_shape(granularity, M, Kp // BLOCK_K))
    for c, (blocks, qmax) in enumerate(((slice(0, B8), 127.0), (slice(B8, None), 7.0))):
        if x[blocks].shape[0] == 0:
            continue
        dims = (2,) if granularity == "block" else (0, 2)
        amax = x[blocks].abs().amax(dims, keepdim=True)
        # amax is NaN if any is NaN; an inf is treated alike
        bad, zero = ~torch.isfinite(amax), amax < TINY
        # tensor / tensor: with a Python scalar torch may multiply by a reciprocal instead
        q = torch.full_like(amax, qmax)
        inv = torch.where(bad | zero, 0.0, q / amax)
        codes[blocks] = torch.where(bad, 0.0, torch.round(x[blocks] * inv)).to(torch.int8)
        s = torch.where(bad, torch.nan, torch.where(zero, 0.0, amax / q)).squeeze(2)
        if granularity == "block":
            scales[blocks] = s
        else:
            (scales[c] if granularity == "class" else scales).copy_(s[0])
    sums = codes.int().sum(2, dtype=torch.int32)
    codes4 = pack_nibbles(codes[B8:].view(torch.uint8) & 15)
    return ActBlocks(codes[:B8].contiguous(), codes4, sums, scales, granularity)


def check(x_MK: Tensor, k8: int, granularity: str, perm: Tensor | None) -> None:
    """Raise ValueError on arguments that act_quant refuses, as the kernels do."""
    if x_MK.dim() != 2 or x_MK.dtype not in FLOAT_DTYPES:
        raise ValueError(
            "act_quant: x: expected bfloat16, float16 or float32 [M, K], "
            f"got {x_MK.dtype} {tuple(x_MK.shape)}"
        )
    K = x_MK.shape[1]
    Kp = padded_k(K)
    if K == 0:
        raise ValueError("act_quant: x: expected K >= 1, got K=0")
    if k8 > Kp or (k8 > 0 and k8 % BLOCK_K):
        raise ValueError(
            f"act_quant: k8: expected a multiple of {BLOCK_K} in 0..{Kp} or -1 for all, got {k8}"
        )
    scales_shape(granularity, 0, 0)
    if granularity == "token" and 0 < k8 < Kp:
        raise ValueError(
            f"act_quant: granularity: 'token' needs one precision, got k8={k8} of {Kp}; "
            "use 'class' or 'block'"
        )
    if perm is not None and (perm.dtype != torch.int32 or tuple(perm.shape) != (K,)):
        raise ValueError(
            f"act_quant: perm: expected torch.int32 ({K},), got {perm.dtype} {tuple(perm.shape)}"
        )


def rms_norm(
    x_MK: Tensor, weight_K: Tensor, eps: float, residual_MK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y, h): h = x + residual; y = weight * (h / sqrt(mean(h^2) + eps)).

    Rounded to x's dtype after the sum, the norm and the product, as torch modules do.
    """
    h = x_MK if residual_MK is None else x_MK + residual_MK
    h32 = h.float()
    normed = (h32 * torch.rsqrt(h32.square().mean(1, keepdim=True) + eps)).to(x_MK.dtype)
    return weight_K * normed, h


def silu_mul(gate_MK: Tensor, up_MK: Tensor) -> Tensor:
    """silu(gate) * up, rounded to their dtype after each of the two."""
    return torch.nn.functional.silu(gate_MK) * up_MK
