"""act_quant: exact parity of every kernel with the reference, and what bad input gets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessella import _native, ops
from tessella.ref import act_quant as ref
from tessella.ref.w4ax_gemm import act_dequant
from tessella.testing.cases import HURTFUL_M, PRECISIONS, k8_of, random_activations
from tessella.testing.force import force, runnable
from tessella.testing.poison import assert_untouched, guarded, poison_value, poisoned_output

FIELDS = ("codes8", "codes4", "sums", "scales")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = runnable("act_quant") or [""]
native = pytest.mark.skipif(not _native.HAS_OPS, reason="needs the compiled kernels")


def assert_same(got, want):
    """All four tensors equal, NaN scales in the same places."""
    for f in FIELDS:
        g, w = getattr(got, f), getattr(want, f)
        assert g.dtype == w.dtype and g.shape == w.shape, f
        assert torch.equal(g.nan_to_num(-1.0), w.nan_to_num(-1.0)), f


@native
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share,granularity", PRECISIONS)
def test_parity(kernel, dtype, share, granularity, rng):
    with force(kernel):
        for M, K in ((1, 1), (3, 127), (63, 128), (7, 200), (2, 520)):
            x = random_activations(M, K, dtype, rng)
            k8 = k8_of(share, K)
            if granularity == "token" and 0 < k8 < ref.padded_k(K):
                continue
            want = ref.act_quant(x, k8, granularity)
            assert_same(ops.act_quant(x, k8=k8, granularity=granularity), want)


@native
@pytest.mark.parametrize("kernel", KERNELS)
def test_permutation_and_strides(kernel, rng):
    """A permuted, row-strided, unaligned view gives what a copy of it gives."""
    big = random_activations(9, 333, torch.bfloat16, rng)
    x = big[::2, 5:305]
    perm = torch.randperm(300, generator=rng).int()
    with force(kernel):
        got = ops.act_quant(x, k8=128, granularity="block", perm=perm)
        assert_same(got, ref.act_quant(x[:, perm.long()].contiguous(), 128, "block"))
        assert_same(ops.act_quant(x), ref.act_quant(x.clone()))


@native
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("granularity", ("token", "class", "block"))
def test_special_values(kernel, granularity, rng):
    """Zero, tiny, subnormal, constant, inf and NaN rows, next to an ordinary one."""
    x = random_activations(10, 256, torch.float32, rng)
    x[1] = 0.0
    x[2] = 1e-38
    x[3] = 3.25
    x[4, 200] = torch.inf
    x[5, 3] = -torch.inf
    x[6, 255] = torch.nan
    x[7] *= 1e30
    x[8] = 0.0
    x[8, 0] = ref.TINY
    x[9, :128] = 0.0
    with force(kernel):
        got = ops.act_quant(x, granularity=granularity)
    assert_same(got, ref.act_quant(x, -1, granularity))
    real = act_dequant(got)
    assert bool((real[1:3] == 0).all())
    assert torch.allclose(real[3], torch.tensor(3.25, dtype=torch.float64))
    for m in (4, 5, 6):
        assert bool(real[m].isnan().any()), "a non-finite token must not pass unnoticed"
    assert not bool(real[[0, 1, 2, 3, 7, 8, 9]].isnan().any())


@given(
    M=st.integers(1, 20),
    K=st.integers(1, 400),
    dtype=st.sampled_from(DTYPES),
    case=st.sampled_from(PRECISIONS),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from((1e-20, 1.0, 100.0)),
)
@settings(max_examples=60, deadline=None)
def test_rounding_error_is_half_a_step(M, K, dtype, case, seed, scale):
    share, granularity = case
    k8 = k8_of(share, K)
    if granularity == "token" and 0 < k8 < ref.padded_k(K):
        return
    x = random_activations(M, K, dtype, torch.Generator().manual_seed(seed)) * scale
    a = ops.act_quant(x, k8=k8, granularity=granularity)
    x64 = torch.nn.functional.pad(x.double(), (0, a.Kp - K))
    step = act_dequant(
        type(a)(
            torch.ones_like(a.codes8),
            torch.full_like(a.codes4, 0x11),
            a.sums,
            a.scales,
            granularity,
        )
    )
    assert bool(((act_dequant(a) - x64).abs() <= step * 0.50002).all())


@native
def test_out_variant_writes_all_and_only_its_tensors(rng):
    x, whole = guarded(random_activations(5, 300, torch.bfloat16, rng))
    want = ref.act_quant(x.clone(), 128, "class")
    pairs = [poisoned_output(getattr(want, f)) for f in FIELDS]
    torch.ops.tessella.act_quant_out(x, 128, "class", None, *[p[0] for p in pairs])
    for f, (inner, around) in zip(FIELDS, pairs):
        assert torch.equal(inner, getattr(want, f)), f
        assert_untouched(around)
    assert_untouched(whole)


@native
def test_channels_outside_a_view_are_not_read(rng):
    """Poison right of the last channel, in the row padding, changes nothing."""
    x = random_activations(4, 200, torch.float32, rng)
    wide = torch.full((4, 256), poison_value(torch.float32))
    wide[:, :200] = x
    assert_same(ops.act_quant(wide[:, :200]), ref.act_quant(x))


def test_empty_batch():
    a = ops.act_quant(torch.empty(0, 300, dtype=torch.bfloat16), k8=128, granularity="block")
    assert a.M == 0 and a.Kp == 384 and a.scales.shape == (3, 0)


@pytest.mark.parametrize(
    "change,text",
    (
        (dict(x=torch.zeros(4)), r"x: expected .*\[M, K\]"),
        (dict(x=torch.zeros(4, 0)), r"x: expected .*K >= 1"),
        (dict(x=torch.zeros(4, 256, dtype=torch.float64)), r"x: expected bfloat16"),
        (dict(k8=64), r"k8: expected a multiple of 128 in 0\.\.256"),
        (dict(k8=384), r"k8: expected .*got 384"),
        (dict(k8=128, granularity="token"), r"granularity: .*'class' or 'block'|'token' needs"),
        (dict(granularity="row"), r"granularity: expected one of token, class, block, got 'row'"),
        (dict(perm=torch.zeros(256)), r"perm: expected .*int32"),
        (dict(perm=torch.zeros(255, dtype=torch.int32)), r"perm: expected .*256"),
    ),
)
def test_bad_input_names_argument_expected_and_got(change, text):
    args = dict(x=torch.zeros(4, 256), k8=-1, granularity="token", perm=None) | change
    x = args.pop("x")
    with pytest.raises((RuntimeError, ValueError), match=text):
        ops.act_quant(x, **args)


@native
def test_inner_stride_is_refused():
    with pytest.raises(RuntimeError, match=r"x: expected unit stride along K, got stride 2"):
        ops.act_quant(torch.zeros(4, 512)[:, ::2])


@native
def test_opcheck_and_compile(rng):
    x = random_activations(5, 200, torch.bfloat16, rng)
    perm = torch.randperm(200, generator=rng).int()
    torch.library.opcheck(torch.ops.tessella.act_quant.default, (x, 128, "block", perm))
    want = ref.act_quant(x, 128, "class")
    out = tuple(torch.empty_like(getattr(want, f)) for f in FIELDS)
    torch.library.opcheck(torch.ops.tessella.act_quant_out.default, (x, 128, "class", None, *out))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x):
        codes8, _, sums, scales = torch.ops.tessella.act_quant(x * 2, -1, "token", None)
        return codes8, sums + 1, scales

    a = ref.act_quant(x * 2)
    for got, want in zip(f(x), (a.codes8, a.sums + 1, a.scales)):
        assert torch.equal(got, want)


def test_gradient_is_refused():
    """The entry says so; the bare op gives results that autograd knows to be constants."""
    x = torch.randn(2, 128, requires_grad=True)
    with pytest.raises(RuntimeError, match="for inference and has no gradient"):
        ops.act_quant(x)
    with torch.no_grad():
        ops.act_quant(x)
    ops.act_quant(x.detach())
    assert not any(t.requires_grad for t in torch.ops.tessella.act_quant(x, -1, "token", None))


@native
def test_results_do_not_depend_on_threads(threads, rng):
    x = random_activations(600, 1024, torch.bfloat16, rng)
    threads(1)
    one = ops.act_quant(x)
    threads(3)
    assert_same(ops.act_quant(x), one)


def on_cpu(a):
    return type(a)(*(getattr(a, f).cpu() for f in FIELDS), a.granularity)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("share,granularity", PRECISIONS)
def test_cuda_gives_the_cpu_codes(dtype, share, granularity, rng):
    for M in HURTFUL_M:
        for K in (1, 127, 128, 200, 4096, 14336):
            k8 = k8_of(share, K)
            if granularity == "token" and 0 < k8 < ref.padded_k(K):
                continue
            x = random_activations(M, K, dtype, rng)
            if M > 2:
                x[1] = 0
                x[2, K // 2] = torch.nan
            got = ops.act_quant(x.cuda(), k8=k8, granularity=granularity)
            assert_same(on_cpu(got), ops.act_quant(x, k8=k8, granularity=granularity))


@pytest.mark.gpu
def test_cuda_views_permutation_poison_and_refusals(rng):
    big = random_activations(64, 4100, torch.bfloat16, rng).cuda()
    perm = torch.randperm(3001, generator=rng).int().cuda()
    for x in (big[::3, 7:3008], big[::3, 8:3008], big[:, :4096]):
        use = perm if x.shape[1] == 3001 else None
        got = ops.act_quant(x, k8=1024, granularity="block", perm=use)
        want = ops.act_quant(
            x.cpu().contiguous(),
            k8=1024,
            granularity="block",
            perm=None if use is None else use.cpu(),
        )
        assert_same(on_cpu(got), want)
    x, whole = guarded(random_activations(33, 520, torch.float16, rng).cuda())
    want = ops.act_quant(x.cpu())
    pairs = [poisoned_output(getattr(want, f).cuda()) for f in FIELDS]
    torch.ops.tessella.act_quant_out(x, -1, "token", None, *[p[0] for p in pairs])
    for f, (inner, around) in zip(FIELDS, pairs):
        assert torch.equal(inner.cpu(), getattr(want, f)), f
        assert_untouched(around)
    assert_untouched(whole)
    with pytest.raises(RuntimeError, match="x: expected bfloat16 or float16 on cuda"):
        ops.act_quant(torch.zeros(2, 128, device="cuda"))
    with pytest.raises(RuntimeError, match=r"perm: expected .*on cuda, got .*on cpu"):
        ops.act_quant(big[:, :3001], perm=perm.cpu())
    assert ops.act_quant(big[:0]).M == 0


@pytest.mark.gpu
def test_cuda_stream_graph_opcheck_and_compile(rng):
    op = torch.ops.tessella.act_quant
    x = random_activations(16, 4096, torch.bfloat16, rng).cuda()
    torch.library.opcheck(op.default, (x, 2048, "class", None))
    # the current stream: the op must wait for the slow producer queued before it there
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        y = x * 3
        late = ops.act_quant(y)
    stream.synchronize()
    assert_same(on_cpu(late), ops.act_quant((x * 3).cpu()))
    # a captured graph replays on new input, bit for bit, without allocating
    static = x.clone()
    ops.act_quant(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.act_quant(static)
    for _ in range(3):
        new = random_activations(16, 4096, torch.bfloat16, rng)
        static.copy_(new)
        graph.replay()
        assert_same(on_cpu(captured), ops.act_quant(new))
    compiled = torch.compile(lambda t: op(t * 2, -1, "token", None), fullgraph=True)
    for got, want in zip(compiled(x), op(x * 2, -1, "token", None)):
        assert torch.equal(got, want)
