"""w4ax_gemm: every compiled kernel against the fp64 reference fed the same codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessella import _native, ops
from tessella.formats import SCHEMES, padded_k
from tessella.ref import act_quant as ref_act
from tessella.ref.w4ax_gemm import act_codes, w4_dequant, w4ax_gemm
from tessella.testing.cases import (
    HURTFUL_M,
    HURTFUL_NK,
    PRECISIONS,
    k8_of,
    random_activations,
    random_weight,
)
from tessella.testing.force import environment, force, runnable
from tessella.testing.metrics import assert_gemm_close
from tessella.testing.poison import assert_untouched, guarded, poisoned_output

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = runnable("w4ax_gemm") or [""]
native = pytest.mark.skipif(not _native.HAS_OPS, reason="needs the compiled kernels")
pytestmark = native


def quantised(M, K, share, granularity, rng, dtype=torch.float32):
    """Reference activations, or None where the granularity does not allow mixed precision."""
    k8 = k8_of(share, K)
    if granularity == "token" and 0 < k8 < padded_k(K):
        return None
    return ref_act.act_quant(random_activations(M, K, dtype, rng), k8, granularity)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("share,granularity", PRECISIONS)
def test_parity(kernel, scheme, share, granularity, rng):
    """All schemes, precisions and granularities, with bias, over shapes that hurt."""
    for M, (N, K) in ((3, (130, 384)), (17, (65, 200)), (7, (1, 1))):
        a = quantised(M, K, share, granularity, rng)
        if a is None:
            continue
        w = random_weight(scheme, N, K, rng)
        bias = torch.randn(N, generator=rng)
        with force(kernel):
            got = ops.w4ax_gemm(a, ops.w4_pack(w), bias, torch.float32)
        assert_gemm_close(got, w4ax_gemm(a, w, bias), f"{kernel} {scheme} M{M} N{N} K{K}")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("M", HURTFUL_M)
def test_parity_over_tokens(kernel, M, rng):
    for N, K in HURTFUL_NK:
        for scheme in ("g128", "twolevel"):
            a, w = quantised(M, K, 1.0, "token", rng), random_weight(scheme, N, K, rng)
            with force(kernel):
                got = ops.w4ax_gemm(a, ops.w4_pack(w), dtype=torch.float32)
            assert_gemm_close(got, w4ax_gemm(a, w), f"{kernel} {scheme} M{M} N{N} K{K}")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_dtypes(kernel, dtype, rng):
    """Rounding to the result's dtype, with bias, at the tail of a panel too."""
    for N in (5, 64, 127):
        a, w = quantised(19, 512, 1.0, "token", rng), random_weight("twolevel", N, 512, rng)
        bias = torch.randn(N, generator=rng).to(dtype)
        with force(kernel):
            got = ops.w4ax_gemm(a, ops.w4_pack(w), bias, dtype)
        assert got.dtype == dtype
        assert_gemm_close(got, w4ax_gemm(a, w, bias), f"{kernel} N{N}")


@given(
    M=st.integers(1, 130),
    N=st.integers(1, 150),
    K=st.integers(1, 400),
    scheme=st.sampled_from(("channel", "g32", "g64", "g128", "twolevel")),
    case=st.sampled_from(PRECISIONS),
    seed=st.integers(0, 2**32),
    threads=st.sampled_from((1, 2)),
)
@settings(max_examples=60, deadline=None)
def test_integers_are_exact_in_every_kernel(M, N, K, scheme, case, seed, threads):
    """With unit scales a result is an integer below 2^24: equal to int64, bit for bit."""
    rng = torch.Generator().manual_seed(seed)
    share, granularity = case
    a = quantised(M, K, share, granularity, rng)
    if a is None:
        return
    a = type(a)(a.codes8, a.codes4, a.sums, torch.ones_like(a.scales), granularity)
    w = random_weight(scheme, N, K, rng, unit_scales=True)
    exact = act_codes(a).long() @ w4_dequant(w, torch.float64).long().T
    assert int(exact.abs().max()) < 2**24
    packed = ops.w4_pack(w)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kernel in KERNELS:
            with force(kernel):
                got = ops.w4ax_gemm(a, packed, dtype=torch.float32)
            assert torch.equal(got.long(), exact), kernel
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("granularity", ("token", "block"))
def test_batch_and_thread_invariance(kernel, granularity, threads, rng):
    """A token's result is bit-equal alone, in any batch, and on any number of threads."""
    a = quantised(263, 512, 1.0, granularity, rng)  # two chunks of tokens
    for scheme in SCHEMES:
        packed = ops.w4_pack(random_weight(scheme, 200, 512, rng))
        with force(kernel):
            threads(1)
            whole = ops.w4ax_gemm(a, packed, dtype=torch.float32)
            threads(3)
            assert torch.equal(ops.w4ax_gemm(a, packed, dtype=torch.float32), whole)
            for M in (1, 3, 8, 50, 127):
                part = type(a)(
                    a.codes8[:, :M].contiguous(),
                    a.codes4[:, :M].contiguous(),
                    a.sums[:, :M].contiguous(),
                    a.scales[..., :M].contiguous(),
                    granularity,
                )
                got = ops.w4ax_gemm(part, packed, dtype=torch.float32)
                assert torch.equal(got, whole[:M]), f"{scheme} M={M}"


@pytest.mark.skipif(not KERNELS[0], reason="needs the compiled _C module, which names the kernels")
def test_the_tile_does_not_change_the_result(rng):
    """gemv, skinny and wide of one instruction set agree to the bit: buckets have no seams."""
    a, w = quantised(40, 640, 0.5, "class", rng), random_weight("g64", 96, 640, rng)
    packed, seen = ops.w4_pack(w), {}
    for kernel in KERNELS:
        with force(kernel):
            y = ops.w4ax_gemm(a, packed, dtype=torch.float32)
        assert torch.equal(seen.setdefault(kernel.split(".")[1], y), y), kernel


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("granularity", ("token", "block"))
def test_nan_scales_reach_their_tokens_and_no_others(kernel, granularity, rng):
    x = random_activations(9, 256, torch.float32, rng)
    x[4, 130] = torch.nan
    x[7, 1] = torch.inf
    a, w = ref_act.act_quant(x, -1, granularity), random_weight("g128", 70, 256, rng)
    with force(kernel):
        y = ops.w4ax_gemm(a, ops.w4_pack(w), dtype=torch.float32)
    bad = torch.tensor([m in (4, 7) for m in range(9)])
    assert torch.equal(y.isnan().all(1), bad) and torch.equal(y.isnan().any(1), bad)


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_its_own_memory(kernel, rng):
    """Inputs sit in poison, and so does the result, every element of which is written."""
    for M, N, K in ((5, 70, 300), (33, 64, 128)):
        a, w = quantised(M, K, 0.5, "block", rng), random_weight("g32", N, K, rng)
        packed = ops.w4_pack(w)
        fields = [guarded(t) for t in (a.codes8, a.codes4, a.sums, a.scales, packed.blob)]
        out, around = poisoned_output(torch.empty(M, N))
        with force(kernel):
            torch.ops.tessella.w4ax_gemm_out(*[f[0] for f in fields], "g32", N, "block", None, out)
        assert_gemm_close(out, w4ax_gemm(a, w), kernel)
        for _, whole in (*fields, (out, around)):
            assert_untouched(whole)


@pytest.mark.parametrize("kernel", KERNELS)
def test_linear_is_quantise_then_multiply(kernel, rng):
    """w4ax_linear gives the bits of the two ops, from rows at any stride, inside poison."""
    for M, N, K in ((1, 64, 128), (3, 70, 300), (63, 5, 512), (127, 130, 200)):
        x, whole = guarded(torch.randn(M, K + 3, generator=rng).bfloat16())
        x = x[:, :K]
        perm = torch.randperm(K, generator=rng).int()
        for scheme, share, granularity in (
            ("twolevel", 1.0, "token"), ("g32", 0.5, "block"), ("g128", 0.5, "class"),
            ("channel", 0.0, "token"),
        ):  # fmt: skip
            packed = ops.w4_pack(random_weight(scheme, N, K, rng))
            bias = torch.randn(N, generator=rng).bfloat16()
            how = dict(k8=k8_of(share, K), granularity=granularity, perm=perm)
            with force(kernel):
                want = ops.w4ax_gemm(ops.act_quant(x, **how), packed, bias)
                got = ops.w4ax_linear(x, packed, bias, **how)
            assert torch.equal(got, want), f"{kernel} {scheme} M{M} N{N} K{K}"
        assert_untouched(whole)


def test_linear_refuses_and_takes_leading_dims(rng):
    packed = ops.w4_pack(random_weight("twolevel", 10, 200, rng))
    x = torch.randn(2, 3, 200, generator=rng)
    rows = ops.w4ax_linear(x.view(6, 200), packed)
    assert torch.equal(ops.w4ax_linear(x, packed), rows.view(2, 3, 10))
    assert ops.w4ax_linear(x[:0], packed).shape == (0, 3, 10)
    with pytest.raises(
        ValueError, match=r"w4ax_linear: x: expected \[\.\.\., 200\], got \(2, 256\)"
    ):
        ops.w4ax_linear(torch.zeros(2, 256), packed)
    with pytest.raises(RuntimeError, match=r"w4ax_linear: bias: expected .*float32 \[10\]"):
        ops.w4ax_linear(x, packed, torch.zeros(10).half())
    with pytest.raises(RuntimeError, match=r"w4ax_linear: k8: expected a multiple of 128"):
        ops.w4ax_linear(x, packed, k8=100)
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.w4ax_linear(x.clone().requires_grad_(), packed)


def test_empty_batch(rng):
    a = ops.act_quant(torch.empty(0, 256))
    y = ops.w4ax_gemm(a, ops.w4_pack(random_weight("twolevel", 10, 256, rng)))
    assert y.shape == (0, 10) and y.dtype == torch.bfloat16


def call(rng, **change):
    """A valid call with some arguments changed."""
    a, w = ops.act_quant(torch.randn(4, 256, generator=rng)), random_weight("g128", 64, 256, rng)
    args = dict(
        codes8=a.codes8, codes4=a.codes4, sums=a.sums, scales=a.scales, w=ops.w4_pack(w).blob,
        scheme="g128", N=64, granularity="token", bias=None, dtype=torch.bfloat16,
    )  # fmt: skip
    return torch.ops.tessella.w4ax_gemm(*(args | change).values())


@pytest.mark.parametrize(
    "change,text",
    (
        (dict(codes8=torch.zeros(2, 4, 128)), r"codes8: expected contiguous int8 \[2, 4, 128\]"),
        (dict(codes8=torch.zeros(2, 4, dtype=torch.int8)), r"codes8: expected 3 dimensions"),
        (dict(codes4=torch.zeros(0, 5, 64, dtype=torch.uint8)), r"codes4: expected .*\[0, 4, 64\]"),
        (dict(sums=torch.zeros(2, 5, dtype=torch.int32)), r"sums: expected .*\[2, 4\] .*got .*5"),
        (dict(scales=torch.zeros(4).double()), r"scales: expected contiguous float32 \[4\]"),
        (dict(scales=torch.zeros(8)[::2]), r"scales: .*not contiguous"),
        (dict(granularity="block"), r"scales: expected .*\[2, 4\] on cpu, got float32 \[4\]"),
        (dict(granularity="tile"), r"granularity: expected one of token, class, block"),
        (dict(scheme="g256"), r"scheme: expected one of channel, g32, g64, g128, twolevel"),
        (dict(scheme="g64"), r"w: expected contiguous uint8 \[8960\] on cpu, got uint8 \[8576\]"),
        (dict(N=65), r"w: expected contiguous uint8 \[17152\]"),
        (dict(N=0), r"N: expected at least 1, got 0"),
        (dict(bias=torch.zeros(64)), r"bias: expected contiguous bfloat16 \[64\] .*got float32"),
        (dict(bias=torch.zeros(63).bfloat16()), r"bias: expected .*\[64\] .*got bfloat16 \[63\]"),
        (dict(dtype=torch.float64), r"dtype: expected bfloat16, float16 or float32"),
    ),
)
def test_bad_input_names_argument_expected_and_got(change, text, rng):
    call(rng)
    with pytest.raises(RuntimeError, match=r"^tessella::w4ax_gemm: " + text):
        call(rng, **change)


def test_pack_refuses_what_does_not_fit(rng):
    w = random_weight("twolevel", 3, 128, rng)
    pack = torch.ops.tessella.w4_pack
    with pytest.raises(RuntimeError, match=r"w4_pack: zeros: expected .*\[3, 1\]"):
        pack(w.codes, w.channel_scales, w.group_scales, w.zeros[:2], "twolevel", 128)
    with pytest.raises(RuntimeError, match=r"channel_scales: expected a tensor .*got None"):
        pack(w.codes, None, w.group_scales, w.zeros, "twolevel", 128)
    with pytest.raises(RuntimeError, match=r"codes: expected contiguous uint8 \[3, 128\]"):
        pack(w.codes, w.channel_scales, w.group_scales, w.zeros, "twolevel", 200)
    with pytest.raises(RuntimeError, match=r"K: expected 1\.\.65536 channels, got 65664"):
        pack(torch.zeros(1, 32832, dtype=torch.uint8), None, None, w.zeros, "channel", 65600)
    w.codes[1, 5] = 0xFF
    w.group_scales[1, 0], w.zeros[1, 0] = 16, 16
    with pytest.raises(RuntimeError, match=r"q \* s1 \+ a <= 255 \(row 1, group 0\), got 256"):
        ops.w4_pack(w)
    w.zeros[1, 0] = 15
    ops.w4_pack(w)


def test_opcheck_compile_and_fake(rng):
    a = quantised(5, 200, 0.5, "class", rng)
    w = random_weight("g64", 70, 200, rng)
    packed = ops.w4_pack(w)
    args = (a.codes8, a.codes4, a.sums, a.scales, packed.blob, "g64", 70, "class", None)
    torch.library.opcheck(torch.ops.tessella.w4ax_gemm.default, (*args, torch.bfloat16))
    torch.library.opcheck(torch.ops.tessella.w4ax_gemm_out.default, (*args, torch.empty(5, 70)))
    x = torch.randn(5, 200, generator=rng)
    linear_args = (x, packed.blob, "g64", 70, 128, "class", None, None)
    torch.library.opcheck(torch.ops.tessella.w4ax_linear.default, linear_args)
    for scheme in ("channel", "g32", "twolevel"):
        v = random_weight(scheme, 70, 200, rng)
        fields = (v.codes, v.channel_scales, v.group_scales, v.zeros, scheme, 200)
        torch.library.opcheck(torch.ops.tessella.w4_pack.default, fields)
        blob = ops.w4_pack(v).blob
        torch.library.opcheck(torch.ops.tessella.w4_unpack.default, (blob, scheme, 70, 200))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def linear(x):
        q = torch.ops.tessella.act_quant(x, 128, "class", None)
        y = torch.ops.tessella.w4ax_gemm(*q, packed.blob, "g64", 70, "class", None, torch.float32)
        return torch.relu(y)

    x = torch.randn(5, 200, generator=rng)
    b = ops.act_quant(x, k8=128, granularity="class")
    assert torch.equal(linear(x), torch.relu(ops.w4ax_gemm(b, packed, dtype=torch.float32)))


def test_forcing_and_capping(rng, capfd):
    """Unknown names are refused with the valid ones; a cap is obeyed; plans are printed once."""
    with pytest.raises(ValueError, match=r"TESSELLA_FORCE: expected one of .*w4ax_gemm\.scalar"):
        force("w4ax_gemm.sse2.gemv").__enter__()
    with pytest.raises(ValueError, match=r"TESSELLA_CPU_ISA: expected one of .*scalar; got 'avx9'"):
        environment(CPU_ISA="avx9").__enter__()
    with pytest.raises(ValueError, match=r"TESSELLA_LOG: expected one of plan; got 'all'"):
        environment(LOG="all").__enter__()
    assert _native._ops.refresh_env() == ""
    a, w = quantised(2, 128, 1.0, "token", rng), random_weight("channel", 64, 128, rng)
    with environment(CPU_ISA="scalar", LOG="plan"):
        assert _native._C is None or _native._C.cpu_isa()["best"] == "scalar"
        for _ in range(2):
            ops.w4ax_gemm(a, ops.w4_pack(w))
    printed = [line for line in capfd.readouterr().err.splitlines() if "plan: w4ax_gemm" in line]
    assert len(printed) == 1 and "M=2 N=64 K=128" in printed[0] and "gemv" in printed[0]


@pytest.mark.skipif(_native._C is None, reason="needs the compiled _C module")
@given(
    M=st.integers(1, 5000),
    N=st.integers(1, 20000),
    K=st.integers(1, 20000),
    threads=st.integers(1, 64),
    isa=st.sampled_from(("scalar", "avx2", "avx512vnni")),
)
@settings(max_examples=200, deadline=None)
def test_plan_is_legal(M, N, K, threads, isa):
    """Every row belongs to one chunk, chunks fit their buffer, and the kernel exists."""
    if f"w4ax_gemm.{isa}.gemv" not in _native._C.kernels()["w4ax_gemm"]:
        return
    p = _native._C.plan_w4ax_gemm(M, N, K, threads, isa)
    assert p["kernel"] in _native._C.kernels()["w4ax_gemm"]
    assert 1 <= p["chunk_rows"] <= 256
    assert p["tasks"] == -(-N // 64) * -(-M // p["chunk_rows"])
