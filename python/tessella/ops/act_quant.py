"""act_quant: dynamic quantisation of activations into ActBlocks."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.formats import BLOCK_K, ActBlocks, padded_k, scales_shape
from tessella.ops._register import define, refuse_gradient
from tessella.ref import act_quant as ref


def act_quant(
    x_MK: Tensor, *, k8: int = -1, granularity: str = "token", perm: Tensor | None = None
) -> ActBlocks:
    """Quantise activations per token, symmetrically, into INT8 and INT4 blocks of 128 channels.

    For each unit that shares a scale (qmax 127 for INT8, 7 for INT4), in fp32::

        amax = max |x|;  scale = amax / qmax;  code = round_half_even(x * (qmax / amax))

    Args:
        x_MK: bf16, fp16 or (CPU) fp32 [M, K], unit stride along K, any stride along M. K need
            not be a multiple of 128: missing channels have code 0.
        k8: channels stored in INT8, a multiple of 128; the rest is INT4. -1: all of them
            (W4A8); 0: none (W4A4); between: FMPQ's mixed blocks (COMET section 3).
        granularity: what shares a scale: "token" (one precision only), "class" (a token's INT8
            blocks, and its INT4 blocks) or "block" (128 channels of a token).
        perm: int32 [K] or None; channel k of the result is channel perm[k] of x. Entries must
            lie in 0..K-1 (FMPQ's outlier grouping, GPTQ's act-order).

    Returns:
        :class:`~tessella.formats.ActBlocks`, with the integer sum of the codes of each block.

    A unit whose largest magnitude is below 2^-100 has scale 0 and codes 0. A unit with an inf or
    a NaN has scale NaN and codes 0: every result that uses it is NaN. M = 0 gives empty blocks.

    Raises:
        RuntimeError or ValueError: wrong dtype, shape, stride, device, k8, granularity or perm,
            naming the argument, what was expected and what was got; an x that requires a
            gradient.
    """
    refuse_gradient("act_quant", x_MK)
    out = torch.ops.tessella.act_quant(x_MK, k8, granularity, perm)
    return ActBlocks(*out, granularity)


def rms_norm_quant(
    x_MK: Tensor,
    weight_K: Tensor,
    eps: float,
    residual_MK: Tensor | None = None,
    *,
    k8: int = -1,
    granularity: str = "token",
    perm: Tensor | None = None,
) -> tuple[ActBlocks, Tensor, Tensor]:
    """RMS norm, with an optional residual sum before it, quantised in the same pass.

    ``h = x + residual;  y = weight * (h / sqrt(mean(h^2) + eps));  blocks = act_quant(y)``

    Each step is rounded to x's dtype, as by the torch modules it replaces.

    Args:
        x_MK, residual_MK: bf16, fp16 or (CPU) fp32 [M, K], unit stride along K.
        weight_K: [K] of x's dtype.
        eps: added to the mean of squares.
        k8, granularity, perm: as for :func:`act_quant`.

    Returns:
        (blocks of y, y [M, K], h [M, K]); h is x itself without a residual.

    Raises:
        RuntimeError or ValueError: as :func:`act_quant`, and for a weight or residual that does
            not fit x.
    """
    refuse_gradient("rms_norm_quant", x_MK, weight_K, residual_MK)
    *blocks, y, h = torch.ops.tessella.rms_norm_quant(
        x_MK, weight_K, eps, residual_MK, k8, granularity, perm
    )
    return ActBlocks(*blocks, granularity), y, x_MK if residual_MK is None else h


def silu_mul_quant(
    gate_MK: Tensor,
    up_MK: Tensor,
    *,
    k8: int = -1,
    granularity: str = "token",
    perm: Tensor | None = None,
) -> ActBlocks:
    """``act_quant(silu(gate) * up)`` in one pass: what stands before a gated MLP's down projection.

    Args:
        gate_MK, up_MK: bf16, fp16 or (CPU) fp32 [M, K], unit stride along K.
        k8, granularity, perm: as for :func:`act_quant`.

    Raises:
        RuntimeError or ValueError: as :func:`act_quant`, and for an `up` that does not fit `gate`.
    """
    refuse_gradient("silu_mul_quant", gate_MK, up_MK)
    out = torch.ops.tessella.silu_mul_quant(gate_MK, up_MK, k8, granularity, perm)
    return ActBlocks(*out, granularity)


def empty_blocks(x: Tensor, k8: int, granularity: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unwritten (codes8, codes4, sums, scales) for x [M, K]: buffers for act_quant_out."""
    M, K = x.shape
    B = padded_k(K) // BLOCK_K
    B8 = B if k8 < 0 else k8 // BLOCK_K
    return (
        x.new_empty((B8, M, BLOCK_K), dtype=torch.int8),
        x.new_empty((B - B8, M, BLOCK_K // 2), dtype=torch.uint8),
        x.new_empty((B, M), dtype=torch.int32),
        x.new_empty(scales_shape(granularity, M, B), dtype=torch.float32),
    )


def _ref(x, k8=-1, granularity="token", perm=None):
    a = ref.act_quant(x, k8, granularity, perm)
    return a.codes8, a.codes4, a.sums, a.scales


def _ref_out(x, k8, granularity, perm, codes8, codes4, sums, scales):
    for dst, src in zip((codes8, codes4, sums, scales), _ref(x, k8, granularity, perm)):
        dst.copy_(src)


def _fake(x, k8=-1, granularity="token", perm=None):
    ref.check(x, k8, granularity, perm)
    return empty_blocks(x, k8, granularity)


def _ref_rms_norm(x, weight, eps, residual, k8, granularity, perm):
    y, h = ref.rms_norm(x, weight, eps, residual)
    return *_ref(y, k8, granularity, perm), y, h if residual is not None else x.new_empty(0)


def _ref_rms_norm_out(
    x, weight, eps, residual, k8, granularity, perm, codes8, codes4, sums, scales, y, h
):
    *found, found_h = _ref_rms_norm(x, weight, eps, residual, k8, granularity, perm)
    for dst, src in zip((codes8, codes4, sums, scales, y, h), (*found, found_h)):
        if dst is not None:
            dst.copy_(src)


def _ref_silu_mul_out(gate, up, k8, granularity, perm, codes8, codes4, sums, scales):
    _ref_out(ref.silu_mul(gate, up), k8, granularity, perm, codes8, codes4, sums, scales)


def _fake_rms_norm(x, weight, eps, residual, k8, granularity, perm):
    h = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return *_fake(x, k8, granularity, perm), x.new_empty(x.shape), h


define(
    "act_quant(Tensor x, int k8=-1, str granularity='token', Tensor? perm=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    ref=_ref,
    fake=_fake,
)
define(
    "act_quant_out(Tensor x, int k8, str granularity, Tensor? perm,"
    " Tensor(a!) codes8, Tensor(b!) codes4, Tensor(c!) sums, Tensor(d!) scales) -> ()",
    ref=_ref_out,
    fake=lambda *_: None,
)
_NORM_ARGS = (
    "Tensor x, Tensor weight, float eps, Tensor? residual, int k8, str granularity, Tensor? perm"
)
_GATE_ARGS = "Tensor gate, Tensor up, int k8, str granularity, Tensor? perm"
_OUT_ARGS = "Tensor(a!) codes8, Tensor(b!) codes4, Tensor(c!) sums, Tensor(d!) scales"
define(
    f"rms_norm_quant({_NORM_ARGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ref=_ref_rms_norm,
    fake=_fake_rms_norm,
)
define(
    f"rms_norm_quant_out({_NORM_ARGS}, {_OUT_ARGS}, Tensor(e!)? y, Tensor(f!)? h) -> ()",
    ref=_ref_rms_norm_out,
    fake=lambda *_: None,
)
define(
    f"silu_mul_quant({_GATE_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    ref=lambda gate, up, *rest: _ref(ref.silu_mul(gate, up), *rest),
    fake=lambda gate, up, *rest: _fake(gate, *rest),
)
define(
    f"silu_mul_quant_out({_GATE_ARGS}, {_OUT_ARGS}) -> ()",
    ref=_ref_silu_mul_out,
    fake=lambda *_: None,
)
