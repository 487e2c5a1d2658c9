"""w4ax_gemm: 4-bit weights times INT8/INT4 activations, alone and behind act_quant; packing."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella import layout, tuned
from tessella.formats import ActBlocks, PackedW4, W4Weight
from tessella.ops._register import define, refuse_gradient
from tessella.ref import act_quant as ref_act
from tessella.ref import w4ax_gemm as ref


def w4ax_gemm(
    a: ActBlocks, w: PackedW4, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """``y = dequant(a) @ dequant(w)^T (+ bias)``, the linear layer of a 4-bit model.

    Integer products are accumulated exactly in int32; zero points are folded through the
    activations' code sums; scales are applied in fp32. Results depend neither on the number of
    threads nor on the other tokens of the batch.

    Args:
        a: quantised activations [M, K]; any K8 (K8 = Kp: W4A8, 0: W4A4, between: COMET's W4Ax).
        w: packed weight [N, K] on the same device, any N.
        bias: [N] of `dtype`, or None.
        dtype: of the result: bf16, fp16 or (CPU) fp32.

    Returns:
        [M, N]. M = 0 gives an empty result.

    Raises:
        RuntimeError or ValueError: tensors that do not fit each other, naming the argument, what
            was expected and what was got; inputs that require a gradient.
    """
    refuse_gradient("w4ax_gemm", a.scales, bias)
    return torch.ops.tessella.w4ax_gemm(
        a.codes8, a.codes4, a.sums, a.scales, w.blob, w.scheme, w.N, a.granularity, bias, dtype
    )


def w4ax_linear(
    x: Tensor,
    w: PackedW4,
    bias: Tensor | None = None,
    *,
    k8: int = -1,
    granularity: str = "token",
    perm: Tensor | None = None,
) -> Tensor:
    """``w4ax_gemm(act_quant(x), w, bias)`` as one op: the 4-bit linear on 16-bit activations.

    The same codes and the same result, bit for bit; the codes live in one buffer of the call. Where
    several linears read x, quantise once with :func:`act_quant` instead; where a norm or a gate
    makes x, let it quantise (:func:`rms_norm_quant`, :func:`silu_mul_quant`).

    Args:
        x: bf16, fp16 or (CPU) fp32 [..., K], unit stride along K.
        w: packed weight [N, K] on the same device, any N.
        bias: [N] of x's dtype, or None.
        k8, granularity, perm: as for :func:`act_quant`.

    Returns:
        [..., N] of x's dtype. No tokens give an empty result.

    Raises:
        RuntimeError or ValueError: as :func:`act_quant` and :func:`w4ax_gemm`.
    """
    refuse_gradient("w4ax_linear", x, bias)
    if x.dim() == 0 or x.shape[-1] != w.K:
        raise ValueError(f"tessella::w4ax_linear: x: expected [..., {w.K}], got {tuple(x.shape)}")
    y_MN = torch.ops.tessella.w4ax_linear(
        x.reshape(-1, w.K), w.blob, w.scheme, w.N, k8, granularity, perm, bias
    )
    return y_MN.view(*x.shape[:-1], w.N)


def w4ax_grouped(
    x: Tensor,
    w: PackedW4,
    *,
    features: int | None = None,
    first: int = 0,
    stride: int | None = None,
    k8: int = -1,
    granularity: str = "token",
    perm: Tensor | None = None,
) -> Tensor:
    """``y[:, g] = w4ax_linear(x[:, g], w_g)`` for all groups g at once: one launch, the same bits.

    w_g are out features ``first + g * stride ..`` of one weight, `features` of them. By default
    groups share w equally; other numbers pick a part of each share, as the value rows of every head
    in the key-value projection of latent attention (DeepSeek-V2, section 2.1.2). The INT8 or INT4
    scales are of a token and group.

    Args:
        x: bf16, fp16 or (CPU) fp32 [T, G, K], unit stride along K.
        w: packed weight [N, K] on the same device.
        features: F out features of a group; default N / G.
        first, stride: where the first group starts, and how far apart groups are (default F).
            Multiples of 64, like F: weights are packed in panels of 64 out features.
        k8, granularity, perm: as for :func:`act_quant`.

    Returns:
        [T, G, F] of x's dtype. No tokens give an empty result. Compiled on CPU.

    Raises:
        RuntimeError or ValueError: as :func:`w4ax_linear`; rows that are not whole panels of w.
    """
    refuse_gradient("w4ax_grouped", x)
    if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != w.K:
        want = f"[T, G, {w.K}] with G >= 1"
        raise ValueError(f"tessella::w4ax_grouped: x: expected {want}, got {tuple(x.shape)}")
    if features is None:
        features, rest = divmod(w.N, x.shape[1])
        if rest:
            raise ValueError(
                f"tessella::w4ax_grouped: w: expected out features for {x.shape[1]} equal groups, "
                f"got {w.N}"
            )
    return torch.ops.tessella.w4ax_grouped(
        x, w.blob, w.scheme, w.N, features, first, features if stride is None else stride,
        k8, granularity, perm,
    )  # fmt: skip


def w4_pack(w: W4Weight) -> PackedW4:
    """Shuffle a canonical weight into the order its device's kernels stream.

    CPU: panels of 64 out features, one sequential stream of codes and scales (csrc/layout/w4.h).
    CUDA: the same panels in the order of tensor-core fragments (csrc/layout/w4_frag.h).

    Raises:
        RuntimeError or ValueError: tensors that do not fit each other; two-level bytes over 255.
    """
    if w.codes.is_cuda and w.scheme == "twolevel":
        _check_two_level(w)  # the CPU op does this itself
    blob = torch.ops.tessella.w4_pack(
        w.codes, w.channel_scales, w.group_scales, w.zeros, w.scheme, w.K
    )
    return PackedW4(blob, w.scheme, w.N, w.K)


def _check_two_level(w: W4Weight) -> None:
    """Raise ValueError where a byte q * s1 + a passes 255: it would carry into its neighbour."""
    s1, a = w.group_scales.int(), w.zeros.int()
    if not bool((15 * s1 + a > 255).any()):
        return
    most = layout.unpack_nibbles(w.codes).view(w.N, -1, 128).amax(2).int() * s1 + a
    row, group = divmod(int(most.argmax()), most.shape[1])
    if (byte := int(most[row, group])) > 255:
        raise ValueError(
            "tessella::w4_pack: group_scales: expected q * s1 + a <= 255 "
            f"(row {row}, group {group}), got {byte}"
        )


def w4_unpack(p: PackedW4) -> W4Weight:
    """The canonical weight behind a packed one; ``w4_unpack(w4_pack(w))`` is exactly w."""
    parts = torch.ops.tessella.w4_unpack(p.blob, p.scheme, p.N, p.K)
    return _weight(*parts, p.scheme, p.K)


def _weight(codes, channel_scales, group_scales, zeros, scheme, K) -> W4Weight:
    """W4Weight from op arguments, in which an absent tensor may be None or empty."""
    present = W4Weight.spec(scheme, codes.shape[0], K)
    return W4Weight(
        codes,
        channel_scales if "channel_scales" in present else None,
        group_scales if "group_scales" in present else None,
        zeros,
        scheme,
        K,
    )


def _ref_pack(codes, channel_scales, group_scales, zeros, scheme, K):
    return layout.w4_pack_cpu(_weight(codes, channel_scales, group_scales, zeros, scheme, K))


def _ref_unpack(blob, scheme, N, K):
    w = layout.w4_unpack_cpu(blob, scheme, N, K)
    tensors = w.tensors()
    return tuple(
        tensors[f] if f in tensors else _absent(blob, scheme, f)
        for f in ("codes", "channel_scales", "group_scales", "zeros")
    )


def _absent(blob: Tensor, scheme: str, field: str) -> Tensor:
    """The empty tensor that stands for a field which the scheme does not have."""
    float32 = field == "channel_scales"
    return blob.new_empty(0, dtype=torch.float32 if float32 else torch.float16)


def _ref_gemm(codes8, codes4, sums, scales, w, scheme, N, granularity, bias, dtype):
    a = ActBlocks(codes8, codes4, sums, scales, granularity)
    return ref.w4ax_gemm(a, layout.w4_unpack_cpu(w, scheme, N, a.Kp), bias, dtype)


def _ref_gemm_out(codes8, codes4, sums, scales, w, scheme, N, granularity, bias, out):
    out.copy_(_ref_gemm(codes8, codes4, sums, scales, w, scheme, N, granularity, bias, out.dtype))


def _ref_linear(x, w, scheme, N, k8, granularity, perm, bias):
    a = ref_act.act_quant(x, k8, granularity, perm)
    return ref.w4ax_gemm(a, layout.w4_unpack_cpu(w, scheme, N, a.Kp), bias, x.dtype)


def _fake_linear(x, w, scheme, N, k8, granularity, perm, bias):
    ref_act.check(x, k8, granularity, perm)
    return x.new_empty((x.shape[0], N))


def _ref_grouped(x, w, scheme, N, features, first, stride, k8, granularity, perm):
    ref.check_groups(x.shape, N, features, first, stride)
    # by the op, which knows the order of each device
    weight = _weight(*torch.ops.tessella.w4_unpack(w, scheme, N, x.shape[2]), scheme, x.shape[2])
    ys = []
    for g in range(x.shape[1]):
        a = ref_act.act_quant(x[:, g], k8, granularity, perm)
        ys.append(ref.w4ax_gemm(a, ref.rows(weight, first + g * stride, features), None, x.dtype))
    return torch.stack(ys, 1)


def _fake_grouped(x, w, scheme, N, features, first, stride, k8, granularity, perm):
    ref.check_groups(x.shape, N, features, first, stride)
    ref_act.check(x[:, 0], k8, granularity, perm)
    return x.new_empty((*x.shape[:2], features))


def _fake_pack(codes, channel_scales, group_scales, zeros, scheme, K):
    return codes.new_empty(layout.w4_cpu_bytes(scheme, codes.shape[0], K))


def _fake_unpack(blob, scheme, N, K):
    spec = W4Weight.spec(scheme, N, K)
    return tuple(
        blob.new_empty(spec[f][1], dtype=spec[f][0]) if f in spec else _absent(blob, scheme, f)
        for f in ("codes", "channel_scales", "group_scales", "zeros")
    )


def _fake_gemm(codes8, codes4, sums, scales, w, scheme, N, granularity, bias, dtype):
    return codes8.new_empty((codes8.shape[1], N), dtype=dtype)


def _refuse_probe(codes8, codes4, sums, scales, w, N, wide):
    raise RuntimeError(
        "tessella::_w4ax_gemm_probe: w: expected a tensor on cuda and a build with CUDA, "
        f"got one on {w.device.type}"
    )


def _fake_probe(codes8, codes4, sums, scales, w, N, wide):
    return codes8.new_empty((codes8.shape[1], N), dtype=torch.bfloat16)


define(
    "w4_pack(Tensor codes, Tensor? channel_scales, Tensor? group_scales, Tensor zeros,"
    " str scheme, int K) -> Tensor",
    ref=_ref_pack,
    fake=_fake_pack,
)
define(
    "w4_unpack(Tensor w, str scheme, int N, int K) -> (Tensor, Tensor, Tensor, Tensor)",
    ref=_ref_unpack,
    fake=_fake_unpack,
)
_GEMM_ARGS = (
    "Tensor codes8, Tensor codes4, Tensor sums, Tensor scales, Tensor w, str scheme, int N,"
    " str granularity, Tensor? bias"
)
define(f"w4ax_gemm({_GEMM_ARGS}, ScalarType dtype) -> Tensor", ref=_ref_gemm, fake=_fake_gemm)
define(
    f"w4ax_gemm_out({_GEMM_ARGS}, Tensor(a!) out) -> ()",
    ref=_ref_gemm_out,
    fake=lambda *_: None,
)
define(
    "w4ax_linear(Tensor x, Tensor w, str scheme, int N, int k8, str granularity, Tensor? perm,"
    " Tensor? bias) -> Tensor",
    ref=_ref_linear,
    fake=_fake_linear,
)
define(
    "w4ax_grouped(Tensor x, Tensor w, str scheme, int N, int features, int first, int stride,"
    " int k8, str granularity, Tensor? perm) -> Tensor",
    ref=_ref_grouped,
    fake=_fake_grouped,
)
# What decoding costs on Hopper: two-level weights, packed or `wide` (layout.w4_widen_cuda), in
# tiles of the same plan; bf16 results.
define(
    "_w4ax_gemm_probe(Tensor codes8, Tensor codes4, Tensor sums, Tensor scales, Tensor w, int N,"
    " bool wide) -> Tensor",
    ref=_refuse_probe,
    fake=_fake_probe,
)
tuned.install()
