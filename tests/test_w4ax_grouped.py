"""w4ax_grouped: the bits of one w4ax_linear a group; and 8-bit weights, which it multiplies."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessella import _native, ops
from tessella.formats import SCHEMES, PackedW4
from tessella.quant import eight
from tessella.ref.act_quant import act_quant
from tessella.ref.w4ax_gemm import act_codes, rows, w4_dequant, w4ax_gemm
from tessella.testing.cases import PRECISIONS, k8_of, random_weight
from tessella.testing.force import force, runnable
from tessella.testing.metrics import assert_gemm_close
from tessella.testing.poison import assert_untouched, guarded

KERNELS = runnable("w4ax_gemm") or [""]
native = pytest.mark.skipif(not _native.HAS_OPS, reason="needs the compiled kernels")
CASES = (  # groups, features, K, first, stride
    (1, 64, 1, 0, 640),  # what lies between groups does not matter for one
    (3, 64, 64, 64, 128),
    (5, 128, 200, 0, 128),
    (2, 64, 384, 128, 0),
)
op = torch.ops.tessella.w4ax_grouped.default


def made(G, F, K, first, stride, scheme, rng, **how):
    """A weight in which nothing but the groups' features is fit to be read."""
    w = random_weight(scheme, first + (G - 1) * stride + F + 70, K, rng, **how)
    read = torch.zeros(w.N, dtype=torch.bool)
    for g in range(G):
        read[first + g * stride :][:F] = True
    floats = w.group_scales if w.channel_scales is None else w.channel_scales
    floats[~read] = torch.nan
    return w


@native
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("T", [0, 1, 3, 7, 63, 127, 259])
def test_the_bits_of_a_linear_for_each_group(kernel, T, rng):
    """Over rows at any strides, permuted, in poison; whatever stands between groups is not read."""
    for n, (G, F, K, first, stride) in enumerate(CASES):
        scheme, (share, granularity) = list(SCHEMES)[(n + T) % 5], PRECISIONS[(3 * n + T) % 8]
        w = made(G, F, K, first, stride, scheme, rng)
        blob, around = guarded(ops.w4_pack(w).blob)
        x, whole = guarded(torch.randn(G, T + 2, K + 3, generator=rng).bfloat16())
        x = x.transpose(0, 1)[1 : T + 1, :, 1 : K + 1]
        perm = torch.randperm(K, generator=rng).int()
        how = dict(k8=k8_of(share, K), granularity=granularity, perm=perm)
        packed = PackedW4(blob, scheme, w.N, K)
        with force(kernel):
            got = ops.w4ax_grouped(x, packed, features=F, first=first, stride=stride, **how)
            assert got.shape == (T, G, F) and got.dtype == x.dtype
            for g in range(G):
                part = ops.w4_pack(rows(w, first + g * stride, F))
                want = ops.w4ax_linear(x[:, g], part, **how)
                assert torch.equal(got[:, g], want), f"{kernel} {scheme} {how} G{G} F{F} K{K}"
        for memory in (around, whole):
            assert_untouched(memory)


@native
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("share,granularity", PRECISIONS)
def test_parity_with_the_reference(scheme, share, granularity, threads, rng):
    """Every scheme, precision and granularity; on any number of threads the same bits."""
    G, F, K = 3, 128, 256
    k8 = k8_of(share, K)
    w, x = random_weight(scheme, G * F, K, rng), torch.randn(17, G, K, generator=rng)
    packed = ops.w4_pack(w)
    threads(1)
    got = ops.w4ax_grouped(x, packed, k8=k8, granularity=granularity)
    for g in range(G):
        want = w4ax_gemm(act_quant(x[:, g], k8, granularity), rows(w, g * F, F))
        assert_gemm_close(got[:, g], want, f"{scheme} {granularity} group {g}")
    threads(3)
    assert torch.equal(ops.w4ax_grouped(x, packed, k8=k8, granularity=granularity), got)


@native
@given(
    T=st.integers(1, 40),
    G=st.integers(1, 6),
    panels=st.integers(1, 3),
    K=st.integers(1, 300),
    first=st.integers(0, 3),
    stride=st.integers(0, 4),
    scheme=st.sampled_from(("channel", "g32", "g64", "g128", "twolevel")),
    seed=st.integers(0, 2**32),
    threads=st.sampled_from((1, 2)),
)
@settings(max_examples=40, deadline=None)
def test_integers_are_exact_in_every_kernel(T, G, panels, K, first, stride, scheme, seed, threads):
    """Unit scales: integers up to 127, which their own quantisation keeps, give int64's results."""
    rng = torch.Generator().manual_seed(seed)
    F, first, stride = panels * 64, first * 64, stride * 64
    w = made(G, F, K, first, stride, scheme, rng, unit_scales=True)
    x = torch.randint(-127, 128, (T, G, K), generator=rng).float()
    x[..., 0] = 127
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kernel in KERNELS:
            with force(kernel):
                got = ops.w4ax_grouped(x, ops.w4_pack(w), features=F, first=first, stride=stride)
            for g in range(G):
                real = w4_dequant(rows(w, first + g * stride, F)).long()
                exact = act_codes(act_quant(x[:, g])).long() @ real.T
                assert int(exact.abs().max()) < 2**24
                assert torch.equal(got[:, g].long(), exact), f"{kernel} group {g}"
    finally:
        torch.set_num_threads(before)


@native
def test_the_stand_in_is_the_same_op(rng):
    """What serves devices without a kernel, with every argument that moves something."""
    w = random_weight("g64", 448, 200, rng)
    perm = torch.randperm(200, generator=rng).int()
    args = (ops.w4_pack(w).blob, "g64", 448, 64, 64, 128, 128, "class", perm)
    for T in (0, 1, 9):
        x = torch.randn(T, 3, 200, generator=rng)
        stand_in = sys.modules["tessella.ops.w4ax_gemm"]._ref_grouped(x, *args)
        assert_gemm_close(op(x, *args), stand_in.double(), f"T{T}")


@native
def test_a_nan_spoils_its_token_of_its_group(rng):
    x = torch.randn(9, 3, 128, generator=rng)
    x[4, 1, 5], x[7, 2, 0] = torch.nan, torch.inf
    y = ops.w4ax_grouped(x, ops.w4_pack(random_weight("twolevel", 192, 128, rng)))
    bad = torch.zeros(9, 3, dtype=torch.bool)
    bad[4, 1] = bad[7, 2] = True
    assert torch.equal(y.isnan().all(2), bad) and torch.equal(y.isnan().any(2), bad)


@native
@pytest.mark.parametrize(
    "change,text",
    (
        (dict(x=torch.zeros(2, 256)), r"x: expected \[T, G, K\] with G, K >= 1, got float32 \[2, "),
        (dict(x=torch.zeros(2, 0, 256)), r"x: expected \[T, G, K\] with G, K >= 1"),
        (
            dict(x=torch.zeros(2, 2, 512)[..., ::2]),
            r"x: expected unit stride along K, got stride 2",
        ),
        (dict(x=torch.zeros(2, 2, 256).double()), r"x: expected bfloat16, float16 or float32"),
        (dict(w=torch.zeros(5, dtype=torch.uint8)), r"w: expected contiguous uint8 \[34048\]"),
        (dict(features=96), r"features: expected a multiple of 64 from 64 on, got 96"),
        (dict(features=0), r"features: expected a multiple of 64 from 64 on, got 0"),
        (dict(first=-64), r"first: expected a multiple of 64 from 0 on, got -64"),
        (dict(stride=100), r"stride: expected a multiple of 64 from 0 on, got 100"),
        (dict(stride=192), r"N: .*\(G - 1\) \* stride \+ features = 0 \+ 1 \* 192 \+ 128, got 256"),
        (dict(first=2**62), r"N: expected at least .* got 256"),
        (dict(k8=100), r"k8: expected a multiple of 128"),
        (dict(k8=128), r"granularity: "),
        (dict(scheme="g256"), r"scheme: expected one of channel"),
        (dict(perm=torch.zeros(5).int()), r"perm: expected .*int32 \[256\]"),
    ),
)
def test_bad_input_names_argument_expected_and_got(change, text, rng):
    args = dict(
        x=torch.randn(2, 2, 256, generator=rng), w=None,
        scheme="channel", N=256, features=128, first=0, stride=128, k8=-1, granularity="token",
        perm=None,
    )  # fmt: skip
    args["w"] = ops.w4_pack(random_weight("channel", 256, 256, rng)).blob
    op(*args.values())
    with pytest.raises(RuntimeError, match=r"^tessella::w4ax_grouped: " + text):
        op(*(args | change).values())


def test_the_wrapper_and_the_reference_refuse_too(rng):
    packed = ops.w4_pack(random_weight("g128", 192, 128, rng))
    x = torch.randn(2, 3, 128, generator=rng)
    assert ops.w4ax_grouped(x[:0], packed).shape == (0, 3, 64)
    with pytest.raises(ValueError, match=r"x: expected \[T, G, 128\] with G >= 1, got \(2, 3, 127"):
        ops.w4ax_grouped(x[..., 1:], packed)
    with pytest.raises(ValueError, match=r"w: expected out features for 5 equal groups, got 192"):
        ops.w4ax_grouped(torch.zeros(2, 5, 128), packed)
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.w4ax_grouped(x.clone().requires_grad_(), packed)
    meta = (x.to("meta"), packed.blob.to("meta"), "g128", 192)
    with pytest.raises(ValueError, match=r"features: expected a multiple of 64 from 64 on, got 65"):
        op(*meta, 65, 0, 64, -1, "token", None)
    with pytest.raises(ValueError, match=r"N: expected .* 64 \+ 2 \* 64 \+ 64, got 192"):
        op(*meta, 64, 64, 64, -1, "token", None)
    with pytest.raises(ValueError, match=r"x: expected \[T, G, K\] with G, K >= 1, got \(2, 128\)"):
        op(x[:, 0].to("meta"), *meta[1:], 64, 0, 64, -1, "token", None)


@native
def test_opcheck_compile_and_fake(rng):
    packed = ops.w4_pack(random_weight("g64", 256, 200, rng))
    x = torch.randn(5, 2, 200, generator=rng)
    torch.library.opcheck(op, (x, packed.blob, "g64", 256, 64, 64, 128, 128, "class", None))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def heads(x):
        return torch.relu(ops.w4ax_grouped(x, packed))

    assert torch.equal(heads(x), torch.relu(ops.w4ax_grouped(x, packed)))


@pytest.mark.parametrize("K", [64, 128, 192])
def test_eight_bits_in_two_nibbles(K, rng):
    """What the codes stand for is a byte times the scale, at most half a scale from the weight."""
    w = torch.randn(70, K, generator=rng) * torch.logspace(-7, 2, 70)[:, None]
    w[3] = 0
    q = eight.quantize(w)
    real = w4_dequant(q)
    assert q.K == 2 * K and q.scheme == ("g128" if K == 128 else "g64")
    got = (real[:, :K] + real[:, K : 2 * K]).double()
    s = q.group_scales[:, -1:].double()
    byte = got / s.clamp_min(1e-30)
    assert torch.equal(byte, byte.round()) and int(byte.abs().max()) <= 127
    assert bool(((got - w).abs() <= s * (0.5 + 1e-6)).all())
    assert bool((s[4:, 0] < w[4:].abs().amax(1) / 127 * 1.001 + 6e-8).all())
    x = torch.randn(3, 1, K, generator=rng)
    y = ops.w4ax_grouped(torch.cat((x, x), -1), ops.w4_pack(eight.quantize(w[:64])))[:, 0]
    want = w4ax_gemm(act_quant(torch.cat((x, x), -1)[:, 0]), eight.quantize(w[:64]))
    assert_gemm_close(y, want, f"K{K}")
    with pytest.raises(ValueError, match=r"a multiple of 64, got \(2, 63\)"):
        eight.quantize(torch.zeros(2, 63))
    for bad in (torch.nan, torch.inf, 6e5):
        w[0, 0] = bad
        with pytest.raises(ValueError, match="expected finite weights below 519000"):
            eight.quantize(w)
