"""w4ax_gemm on a GPU: every compiled kernel against the fp64 reference fed the same codes."""

from __future__ import annotations

import pytest
import torch

from tessella import layout, ops, tuned
from tessella.formats import SCHEMES, ActBlocks, W4Weight, padded_k
from tessella.ref import act_quant as ref_act
from tessella.ref.w4ax_gemm import act_codes, w4_dequant, w4ax_gemm
from tessella.testing.cases import PRECISIONS, k8_of, random_activations, random_weight
from tessella.testing.force import environment, force, gpu_kernels
from tessella.testing.metrics import assert_gemm_close
from tessella.testing.poison import assert_untouched, guarded, poisoned_output

pytestmark = pytest.mark.gpu
KERNELS = gpu_kernels("w4ax_gemm") or [""]
HOPPER = [k for k in KERNELS if ".sm90." in k] or [""]
FAST = ("channel", "g128", "twolevel")
SHAPES = ((64, 128), (65, 200), (130, 384), (5, 1), (200, 1300))


def to_gpu(x):
    """A weight's or activations' tensors on the GPU."""
    if isinstance(x, W4Weight):
        moved = {name: t.cuda() for name, t in x.tensors().items()}
        return W4Weight.from_tensors(moved, x.scheme, x.K)
    fields = (x.codes8, x.codes4, x.sums, x.scales)
    return ActBlocks(*(t.cuda() for t in fields), x.granularity)


def quantised(M, K, rng, share=1.0, granularity="token"):
    k8 = k8_of(share, K)
    if granularity == "token" and 0 < k8 < padded_k(K):
        return None
    return ref_act.act_quant(random_activations(M, K, torch.float32, rng), k8, granularity)


def takes(kernel, scheme) -> bool:
    """Whether a Hopper kernel has a body for this scheme."""
    return scheme in FAST and not (kernel.endswith(("256", "x192")) and scheme == "g128")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packing(scheme, rng):
    """The op packs to the bytes that plain Python gives, and back."""
    for N, K in SHAPES:
        w = to_gpu(random_weight(scheme, N, K, rng))
        packed = ops.w4_pack(w)
        assert torch.equal(packed.blob, layout.w4_pack_cuda(w))
        back = ops.w4_unpack(packed)
        for name, t in w.tensors().items():
            assert torch.equal(back.tensors()[name], t), name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scheme", FAST)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_parity(kernel, scheme, dtype, rng):
    if ".sm90." in kernel and not takes(kernel, scheme):
        pytest.skip("no body for g128: its totals would not fit the registers")
    for M, (N, K) in zip((3, 17, 1, 7, 300), SHAPES, strict=True):
        a, w = quantised(M, K, rng), random_weight(scheme, N, K, rng)
        bias = torch.randn(N, generator=rng).to(dtype)
        with force(kernel):
            got = ops.w4ax_gemm(to_gpu(a), ops.w4_pack(to_gpu(w)), bias.cuda(), dtype)
        assert_gemm_close(got.cpu(), w4ax_gemm(a, w, bias), f"{kernel} {scheme} M{M} N{N} K{K}")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("share,granularity", PRECISIONS)
def test_every_case_has_a_kernel(scheme, share, granularity, rng):
    """All schemes, precisions and granularities, as the planner chooses."""
    for M, (N, K) in ((3, (130, 384)), (17, (65, 200)), (70, (72, 640))):
        a, w = quantised(M, K, rng, share, granularity), random_weight(scheme, N, K, rng)
        if a is None:
            continue
        got = ops.w4ax_gemm(to_gpu(a), ops.w4_pack(to_gpu(w)))
        assert_gemm_close(got.cpu(), w4ax_gemm(a, w), f"{scheme} M{M} N{N} K{K}")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scheme", FAST)
def test_integers_are_exact(kernel, scheme, rng):
    """With unit scales results are integers, rounded once to the result's type."""
    if ".sm90." in kernel and not takes(kernel, scheme):
        pytest.skip("no such body")
    for M, N, K in (
        (1, 64, 1024),
        (33, 200, 896),
        (129, 65, 256),
        (260, 328, 2304),
        (513, 64, 128),
    ):
        a = quantised(M, K, rng)
        a = ActBlocks(a.codes8, a.codes4, a.sums, torch.ones_like(a.scales), "token")
        w = random_weight(scheme, N, K, rng, unit_scales=True)
        exact = (act_codes(a).double() @ w4_dequant(w).T).to(torch.bfloat16)
        packed, on_gpu = ops.w4_pack(to_gpu(w)), to_gpu(a)
        with force(kernel):
            for _ in range(3):
                got = ops.w4ax_gemm(on_gpu, packed)
                assert torch.equal(got.cpu(), exact), f"M{M} N{N} K{K}"


@pytest.mark.parametrize("kernel", [k for k in HOPPER if k.endswith(("128", "256", "128x192"))])
@pytest.mark.parametrize("scheme", FAST)
def test_last_wave(kernel, scheme, rng):
    """More tiles than SMs: whole ones, then, where the planner says so, halves of them."""
    if not takes(kernel, scheme):
        pytest.skip("no such body")
    for M, N, K in ((300, 8576, 256), (300, 5760, 256), (700, 5768, 128)):
        a = quantised(M, K, rng)
        a = ActBlocks(a.codes8, a.codes4, a.sums, torch.ones_like(a.scales), "token")
        w = random_weight(scheme, N, K, rng, unit_scales=True)
        exact = (act_codes(a).double() @ w4_dequant(w).T).to(torch.bfloat16)
        with force(kernel):
            got = ops.w4ax_gemm(to_gpu(a), ops.w4_pack(to_gpu(w)))
        assert torch.equal(got.cpu(), exact), f"M{M} N{N} K{K}"


@pytest.fixture
def tables():
    """The kernels' tables of choices are back afterwards."""
    yield
    tuned.install()


@pytest.mark.parametrize("kernel", [k for k in HOPPER if ".t" in k and not k.endswith("t256")])
@pytest.mark.parametrize("scheme", FAST)
def test_parts_of_k(kernel, scheme, rng, tables):
    """Every number of parts that K may have, some longer; owners of fewer columns than others."""
    if not takes(kernel, scheme):
        pytest.skip("no such body")
    device, parts = torch.cuda.get_device_name(), {1, 2, 4, 8}
    if kernel.endswith(("64", "128", "x192")):
        parts |= {3, 6}
    if kernel.endswith("128x192"):
        parts -= {6}  # no room for the sums of six
    for M, N, K in ((1, 65, 1100), (63, 200, 1664), (129, 328, 1152), (200, 64, 2304)):
        if kernel.endswith(("t8", "t16")) and M > 64:
            continue  # many blocks share an SM, without room for the sums of eight parts
        a = quantised(M, K, rng)
        a = ActBlocks(a.codes8, a.codes4, a.sums, torch.ones_like(a.scales), "token")
        w = random_weight(scheme, N, K, rng, unit_scales=True)
        exact = (act_codes(a).double() @ w4_dequant(w).T).to(torch.bfloat16)
        on_gpu, packed = to_gpu(a), ops.w4_pack(to_gpu(w))
        case = (device, "w4ax_gemm", scheme, N, padded_k(K), max(8, 1 << (M - 1).bit_length()))
        for split in sorted(parts):
            tuned.use("\t".join(map(str, ("a test", *case, kernel, split))))
            for launch in ("0", "1"):
                with environment(PDL=launch):
                    got = ops.w4ax_gemm(on_gpu, packed)
                assert torch.equal(got.cpu(), exact), f"M{M} N{N} K{K} split {split}"


@pytest.mark.parametrize("kernel", [k for k in HOPPER if ".s" in k.removeprefix("w4ax_gemm.sm90")])
@pytest.mark.parametrize("scheme", FAST)
def test_shares_of_k(kernel, scheme, rng):
    """Random shapes: a share within one tile, over several, and whole tiles behind them."""
    if not takes(kernel, scheme):
        pytest.skip("no such body")
    for _ in range(6):
        M, N, K = (int(torch.randint(1, n, (), generator=rng)) for n in (513, 1500, 4000))
        a = quantised(M, K, rng)
        a = ActBlocks(a.codes8, a.codes4, a.sums, torch.ones_like(a.scales), "token")
        w = random_weight(scheme, N, K, rng, unit_scales=True)
        exact = (act_codes(a).double() @ w4_dequant(w).T).to(torch.bfloat16)
        on_gpu, packed = to_gpu(a), ops.w4_pack(to_gpu(w))
        torch.cuda.synchronize()
        with force(kernel), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                assert torch.equal(ops.w4ax_gemm(on_gpu, packed).cpu(), exact), f"{M} {N} {K}"


@pytest.mark.parametrize("kernel", [k for k in HOPPER if ".s" in k.removeprefix("w4ax_gemm.sm90")])
def test_shares_of_k_in_a_graph(kernel, rng):
    """Flags of one replay do not stand for those of the next; scratch memory need not be clear."""
    a = ops.act_quant(torch.randn(200, 2048, generator=rng).bfloat16().cuda())
    w = ops.w4_pack(to_gpu(random_weight("twolevel", 640, 2048, rng)))
    with force(kernel):
        want = ops.w4ax_gemm(a, w)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(3):
                y = ops.w4ax_gemm(a, w)
    for _ in range(20):
        y.zero_()
        graph.replay()
        assert torch.equal(y, want)


@pytest.mark.parametrize("kernel", HOPPER)
def test_virtual_padding(kernel, rng):
    """Rows that do not exist change nothing: the first M rows of a larger batch are bit-equal."""
    w = ops.w4_pack(to_gpu(random_weight("twolevel", 192, 2048, rng)))
    whole = to_gpu(quantised(300, 2048, rng))
    with force(kernel):
        want = ops.w4ax_gemm(whole, w)
        for M in (1, 9, 63, 128, 257):
            part = ActBlocks(
                whole.codes8[:, :M].contiguous(),
                whole.codes4[:, :M].contiguous(),
                whole.sums[:, :M].contiguous(),
                whole.scales[:M].contiguous(),
                "token",
            )
            assert torch.equal(ops.w4ax_gemm(part, w), want[:M]), M


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_its_own_memory(kernel, rng):
    for M, N, K in ((5, 72, 300), (33, 65, 128), (257, 136, 1024)):
        a, w = quantised(M, K, rng), random_weight("twolevel", N, K, rng)
        b, packed = to_gpu(a), ops.w4_pack(to_gpu(w))
        fields = [guarded(t) for t in (b.codes8, b.codes4, b.sums, b.scales, packed.blob)]
        out, around = poisoned_output(torch.empty(M, N, dtype=torch.bfloat16, device="cuda"))
        with force(kernel):
            torch.ops.tessella.w4ax_gemm_out(
                *[f[0] for f in fields], "twolevel", N, "token", None, out
            )
        assert_gemm_close(out.cpu(), w4ax_gemm(a, w), kernel)
        for _, whole in (*fields, (out, around)):
            assert_untouched(whole)


def test_nan_scales_reach_their_tokens_and_no_others(rng):
    x = random_activations(40, 256, torch.float32, rng)
    x[4, 130] = torch.nan
    x[37, 1] = torch.inf
    w = ops.w4_pack(to_gpu(random_weight("twolevel", 72, 256, rng)))
    bad = torch.tensor([m in (4, 37) for m in range(40)])
    for kernel in KERNELS:
        with force(kernel):
            y = ops.w4ax_gemm(to_gpu(ref_act.act_quant(x)), w).cpu()
        assert torch.equal(y.isnan().all(1), bad) and torch.equal(y.isnan().any(1), bad)


@pytest.mark.parametrize("programmatic", ("0", "1"))
def test_packed_in_stream_just_before(programmatic, rng):
    """Weights prefetched ahead of the previous kernel's end are never stale."""
    weights = [to_gpu(random_weight("twolevel", 512, 2048, rng)) for _ in range(4)]
    x = torch.randn(16, 2048, generator=rng).bfloat16().cuda()
    with environment(PDL=programmatic):
        acts = ops.act_quant(x)
        want = [ops.w4ax_gemm(acts, ops.w4_pack(w)) for w in weights]
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        blob = ops.w4_pack(weights[0]).blob
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(5):
                for w, y in zip(weights, want, strict=True):
                    fields = (w.codes, w.channel_scales, w.group_scales, w.zeros, "twolevel", 2048)
                    blob.copy_(torch.ops.tessella.w4_pack(*fields))
                    a = ops.act_quant(x)
                    got = torch.ops.tessella.w4ax_gemm(
                        a.codes8, a.codes4, a.sums, a.scales, blob, "twolevel", 512, "token",
                        None, torch.bfloat16,
                    )  # fmt: skip
                    got2 = ops.w4ax_gemm(a, ops.w4_pack(w))
                    assert torch.equal(got, y) and torch.equal(got2, y)


def test_graph_replays_are_identical(rng):
    x = torch.randn(70, 1024, generator=rng).bfloat16().cuda()
    w = ops.w4_pack(to_gpu(random_weight("g128", 1024, 1024, rng)))
    want = ops.w4ax_gemm(ops.act_quant(x), w)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a = ops.act_quant(x)
        y = ops.w4ax_gemm(ops.act_quant(ops.w4ax_gemm(a, w)), w)
        y = ops.w4ax_gemm(a, w)
    for _ in range(10):
        y.zero_()
        graph.replay()
        assert torch.equal(y, want)


@pytest.mark.parametrize("scheme", FAST)
def test_linear_is_quantise_then_multiply(scheme, rng):
    """w4ax_linear gives the bits of the two ops, with its codes in one buffer of the call."""
    for M, N, K in ((1, 64, 128), (3, 70, 300), (63, 130, 512), (300, 256, 1024)):
        x = torch.randn(M, K, generator=rng).bfloat16().cuda()
        packed = ops.w4_pack(to_gpu(random_weight(scheme, N, K, rng)))
        for k8, granularity in ((-1, "token"), (128, "class")):
            a = ops.act_quant(x, k8=k8, granularity=granularity)
            got = ops.w4ax_linear(x, packed, k8=k8, granularity=granularity)
            assert torch.equal(got, ops.w4ax_gemm(a, packed)), f"{scheme} M{M} N{N} K{K}"


def test_bad_input(rng):
    a, w = to_gpu(quantised(4, 256, rng)), random_weight("g128", 64, 256, rng)
    packed = ops.w4_pack(to_gpu(w))
    with pytest.raises(
        RuntimeError, match="dtype: expected bfloat16 or float16 on cuda, got float"
    ):
        ops.w4ax_gemm(a, packed, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"codes8: expected .* on cuda, got .* on cpu"):
        ops.w4ax_gemm(quantised(4, 256, rng), packed)
    two = random_weight("twolevel", 3, 128, rng)
    two.codes[1, 5], two.group_scales[1, 0], two.zeros[1, 0] = 0xFF, 16, 16
    with pytest.raises(ValueError, match=r"q \* s1 \+ a <= 255 \(row 1, group 0\), got 256"):
        ops.w4_pack(to_gpu(two))
    empty = ops.w4ax_gemm(ops.act_quant(torch.empty(0, 256).bfloat16().cuda()), packed)
    assert empty.shape == (0, 64)


def test_opcheck(rng):
    a, w = to_gpu(quantised(5, 200, rng)), to_gpu(random_weight("twolevel", 70, 200, rng))
    packed = ops.w4_pack(w)
    args = (a.codes8, a.codes4, a.sums, a.scales, packed.blob, "twolevel", 70, "token", None)
    torch.library.opcheck(torch.ops.tessella.w4ax_gemm.default, (*args, torch.bfloat16))
    out = torch.empty(5, 70, dtype=torch.bfloat16, device="cuda")
    torch.library.opcheck(torch.ops.tessella.w4ax_gemm_out.default, (*args, out))
    fields = (w.codes, w.channel_scales, w.group_scales, w.zeros, "twolevel", 200)
    torch.library.opcheck(torch.ops.tessella.w4_pack.default, fields)
    torch.library.opcheck(torch.ops.tessella.w4_unpack.default, (packed.blob, "twolevel", 70, 200))
