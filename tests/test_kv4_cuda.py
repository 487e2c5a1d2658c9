"""Coded pages on a GPU: attention against the fp64 reference, and the codes themselves."""

import pytest
import torch

from attention_cases import MIXED, coded_cases, coded_problem, gen, make_factors
from attention_cases import assert_close as assert_close_to
from tessella import ops
from tessella.formats_kv import KV4Pages, KVCodec, KVFactors, MsmBatch
from tessella.ref import kv4 as ref
from tessella.testing.attention import make_batch
from tessella.testing.force import force, gpu_kernels
from tessella.testing.poison import assert_untouched, poisoned_output
from test_kv4 import awkward
from test_msm_cuda import split_late

pytestmark = pytest.mark.gpu
KERNELS = gpu_kernels("kv4") or [""]
CODECS = [
    "k4v4", "k8v8", "k2v2", "k4v4-g16", "k4v2-g32", "k8v4",
    "k4v4-channel", "k8v4-channel", "k2v4-g16-channel",
]  # fmt: skip
SHAPES = (  # H, J, D, Z, dtype, with factors
    (8, 2, 64, 16, torch.bfloat16, True),
    (4, 4, 80, 32, torch.bfloat16, False),
    (7, 1, 96, 64, torch.float16, False),
    (32, 8, 128, 16, torch.bfloat16, False),
    (2, 1, 256, 48, torch.float16, True),
    (12, 1, 128, 64, torch.bfloat16, True),
)
# |x - y|^2 / (|x|^2 + |y|^2) with the exact attention over the same codes: fp16 products, and the
# rounding of a bf16 result
DIFF = {torch.float16: 1e-6, torch.bfloat16: 4e-6}


def cuda(x):
    """Tensors and dataclasses of tensors on the GPU."""
    if isinstance(x, torch.Tensor):
        return x.cuda()
    if isinstance(x, (MsmBatch, KVFactors, KV4Pages)):
        return type(x)(**{name: cuda(t) for name, t in vars(x).items()})
    return x


def attend(q, cache, batch, plan=None, **how):
    how = {name: cuda(x) for name, x in how.items()}
    plan = None if plan is None else torch.cat([plan, plan.new_full((50,), 3)]).cuda()
    got = ops.kv4_attn(cuda(q), cuda(cache), cuda(batch), plan=plan, lse=True, **how)
    return tuple(t.cpu() for t in got)


def assert_close(got, want, limit):
    assert_close_to(got, want, limit, 1e-2)


def takes(kernel, cache):
    """Whether a kernel is compiled for such pages: TESSELLA_FORCE refuses others."""
    codes = cache.codec.name in ("k4v4", "k8v8") and cache.D in (64, 128, 256)
    pages = cache.Z <= 64 and cache.blob.shape[-1] <= 256 * 128  # what a copy can bring
    return kernel != "kv4.sm90.few" or (codes and pages)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_parity(kernel, codec):
    cases = [case for case in coded_cases(codec, SHAPES) if takes(kernel, case[0][1])]
    if not cases:
        pytest.skip("not compiled for this codec")
    for args, split, how, want in cases:
        with force(kernel):
            for plan in (None, split):
                assert_close(attend(*args, plan, **how), want, DIFF[args[0].dtype])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("codec", ["k4v4", "k4v4-channel"])
def test_runs_and_replays_give_the_same_bits(kernel, codec):
    q, cache, batch, how = coded_problem(
        codec, 8, 2, 128, 16, torch.bfloat16, None, q_len=[1, 8, 1], kv_len=[2000, 700, 33]
    )
    if not takes(kernel, cache):
        pytest.skip("not compiled for this codec")
    how = {name: cuda(x) for name, x in how.items()}
    plan = ops.msm_plan(batch, 8, 2, units=100).cuda()
    args = (cuda(q), cuda(cache), cuda(batch))
    with force(kernel):
        want = ops.kv4_attn(*args, plan=plan, **how).clone()
        assert all(torch.equal(ops.kv4_attn(*args, plan=plan, **how), want) for _ in range(20))
        graph, out = torch.cuda.CUDAGraph(), torch.empty_like(args[0])
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            ops.kv4_attn(*args, plan=plan, out=out, **how)
        for _ in range(5):
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, want)


@pytest.mark.parametrize("kernel", KERNELS)
def test_split_one(kernel):
    """A few keys, split and merged: small enough to run under compute-sanitizer."""
    for codec, q_len in (("k4v4", [1, 1]), ("k4v4", [8, 3]), ("k4v2-g32", [1, 1])):
        q, cache, batch, how = coded_problem(
            codec, 8, 2, 128, 16, torch.bfloat16, None, q_len=q_len, kv_len=[600, 35]
        )
        if not takes(kernel, cache):
            continue
        want = ref.kv4_attn(q, cache, batch, scale=128**-0.5, **how)
        with force(kernel):
            for plan in (ops.msm_plan(batch, 8, 2, units=8, split=256), None):
                got = attend(q, cache, batch, plan, **how)
                assert_close(got, want, DIFF[torch.bfloat16])


@pytest.mark.parametrize("kernel", KERNELS)
def test_scales_of_any_size(kernel):
    """Values in the thousands and keys near nothing: probabilities times scales stay in range."""
    g, D = gen(), 64
    batch, P = make_batch([1, 4], [200, 90], 16, g)
    cache = KV4Pages.empty(P, 2, 16, D, KVCodec())
    for b, n in enumerate((200, 90)):
        pos = torch.arange(n)
        slots = batch.block_table[b, pos // 16].long() * 16 + pos % 16
        k, v = torch.randn(n, 2, D, generator=g) * 1e-4, torch.randn(n, 2, D, generator=g) * 3e4
        ops.kv4_append(k, v, slots, cache)
    q = (torch.randn(5, 8, D, generator=g) * 300).bfloat16()
    want = ref.kv4_attn(q, cache, batch, scale=D**-0.5)
    with force(kernel):
        assert_close(attend(q, cache, batch), want, DIFF[torch.bfloat16])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("longest", [9000, pytest.param(131_072, marks=pytest.mark.slow)])
def test_one_giant_among_tiny_requests(kernel, longest):
    kv_len = [longest] + [1 + i % 40 for i in range(63)]
    q, cache, batch, _ = coded_problem(
        "k4v4", 8, 2, 128, 64, torch.bfloat16, None, q_len=[1] * 64, kv_len=kv_len
    )
    want = ref.kv4_attn(q, cache, batch, scale=128**-0.5)
    with force(kernel):
        for plan in (ops.msm_plan(batch, 8, 2, units=264), None):
            assert_close(attend(q, cache, batch, plan), want, DIFF[torch.bfloat16])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("codec", ["k4v4", "k8v8", "k4v4-g32"])
def test_prompts_in_parts(kernel, codec):
    q, cache, batch, how = coded_problem(
        codec, 8, 4, 64, 64, torch.bfloat16, None, q_len=[1, 600, 9], kv_len=[900, 600, 700]
    )
    if not takes(kernel, cache):
        pytest.skip("not compiled for such pages")
    want = ref.kv4_attn(q, cache, batch, scale=64**-0.5, **how)
    with force(kernel):
        got = attend(q, cache, batch, split_late(batch, 8, 4), **how)
    assert_close(got, want, DIFF[torch.bfloat16])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("codec, D", [("k4v4", 64), ("k4v4", 128), ("k8v8", 64), ("k8v8", 256)])
def test_every_page_size_and_one_long_task(kernel, codec, D):
    """A task's keys many times around any ring, windows that begin within a page, few rows."""
    for Z, n in ((16, 2500), (32, 9001), (48, 2511), (64, 9100), (80, 1000)):
        q, cache, batch, _ = coded_problem(
            codec, 4, 2, D, Z, torch.float16, ["causal", "window", "tree"], q_len=[1, 2, 3],
            kv_len=[n, 700, 90],
        )  # fmt: skip
        if not takes(kernel, cache):
            continue
        how = {"scale": D**-0.5, "window": 333}
        want = ref.kv4_attn(q, cache, batch, **how)
        with force(kernel):
            for units in (1, 40):
                plan = ops.msm_plan(batch, 4, 2, window=333, units=units)
                assert_close(attend(q, cache, batch, plan, **how), want, DIFF[torch.float16])


def test_a_forced_kernel_refuses_what_it_was_not_compiled_for():
    if "kv4.sm90.few" not in KERNELS:
        pytest.skip("no such kernel for this GPU")
    for codec, D, Z in (("k2v2", 64, 16), ("k4v4", 96, 16), ("k4v4", 64, 80)):
        q, cache, batch, _ = coded_problem(codec, 4, 2, D, Z, torch.float16, None)
        with (
            force("kv4.sm90.few"),
            pytest.raises(RuntimeError, match=r"kv4\.sm90\.few' cannot run this problem"),
        ):
            attend(q, cache, batch)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_but_the_result_is_written(kernel):
    q, cache, batch, _ = coded_problem("k4v4", 8, 2, 64, 16, torch.bfloat16, MIXED)
    out, around = poisoned_output(q.cuda())
    pages = cuda(cache)
    with force(kernel):
        ops.kv4_attn(q.cuda(), pages, cuda(batch), window=20, out=out)
    assert torch.isfinite(out).all()
    assert_untouched(around)
    assert torch.equal(pages.blob.cpu(), cache.blob)


@pytest.mark.parametrize("kernel", KERNELS)
def test_non_finite_queries_and_keys(kernel):
    q, cache, batch, _ = coded_problem("k4v4", 4, 2, 64, 16, torch.float16, None)
    q[0, 1, 5], q[3, 2, 0] = torch.inf, torch.nan
    with force(kernel):
        bad = torch.isnan(attend(q, cache, batch)[0]).any(-1)
    assert bad.nonzero().tolist() == [[0, 1], [3, 2]]
    for spoil in ("k", "v"):
        q, cache, batch, _ = coded_problem(
            "k4v4", 4, 2, 64, 16, torch.float16, None, q_len=[8, 2], kv_len=[40, 40]
        )
        k, v = torch.randn(1, 2, 64), torch.randn(1, 2, 64)
        (k if spoil == "k" else v)[0, 1, 5] = torch.inf
        slot = batch.block_table[0, 34 // 16].long() * 16 + 34 % 16
        ops.kv4_append(k, v, slot[None], cache)
        with force(kernel):
            bad = torch.isnan(attend(q, cache, batch)[0])
        want = torch.zeros(10, 4, dtype=torch.bool)
        want[2:8, 2:] = True
        assert torch.equal(bad.all(-1), want) and torch.equal(bad.any(-1), want), spoil


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("D, Z", [(64, 16), (96, 48), (256, 64)])
def test_append_gives_the_codes_of_the_reference(codec, D, Z):
    g, J, T, P, c = gen(2), 2, 70, 8, KVCodec.parse(codec)
    if c.group and D % c.group:
        pytest.skip("D is not whole groups")
    want = KV4Pages.empty(P, J, Z, D, c, 2)
    got = cuda(want)
    k, v = torch.randn(T, J, D, generator=g), torch.randn(T, J, D, generator=g)
    awkward(k), awkward(v)
    rope = torch.rand(T, D // 4, generator=g), torch.rand(T, D // 4, generator=g)
    factors = KVFactors(k_mean=torch.randn(3, J, D, generator=g))
    how = {"factors": factors, "rows": torch.full((T,), 2, dtype=torch.int32)}
    if c.k_axis == "channel":
        how["tail_row"] = torch.ones(T, dtype=torch.int32)
    for part in (slice(0, 20), slice(20, 23), slice(23, T)):  # pages fill across calls
        slots = torch.arange(T)[part]
        if part.start == 20:
            slots[:] = torch.tensor([-1, P * Z, -5])
        mine = {n: x[part] if isinstance(x, torch.Tensor) else x for n, x in how.items()}
        turn = tuple(t[part].contiguous() for t in rope)
        ref.kv4_append(k[part], v[part], slots, want, turn, **mine)
        there = {n: cuda(x) for n, x in mine.items()}
        ops.kv4_append(
            k[part].cuda(), v[part].cuda(), slots.cuda(), got, tuple(map(cuda, turn)), **there
        )
    assert torch.equal(got.blob.cpu(), want.blob)
    if c.k_axis == "channel":
        assert torch.equal(got.k_tail.cpu().nan_to_num(7), want.k_tail.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_append_folds(dtype):
    """Folds sum in another order than the reference: a few codes differ by one."""
    g, J, D, T = gen(7), 2, 128, 33
    f = make_factors(3, J, D, g, m=64)
    rows = torch.randint(0, 3, (T,), generator=g, dtype=torch.int32)
    want = KV4Pages.empty(3, J, 16, D, KVCodec())
    got = cuda(want)
    k = torch.randn(J, T, D, generator=g).to(dtype).transpose(0, 1)
    ref.kv4_append(k, k, torch.arange(T), want, None, f, rows)
    ops.kv4_append(
        k.cuda(), k.cuda(), torch.arange(T).cuda(), got, factors=cuda(f), rows=rows.cuda()
    )
    assert float((got.blob.cpu() != want.blob).float().mean()) < 1e-2


def test_bad_input_is_refused():
    q, cache, batch, _ = coded_problem("k4v4", 8, 2, 64, 16, torch.bfloat16, None)
    args = (q.cuda(), cuda(cache), cuda(batch))
    with pytest.raises(RuntimeError, match="q: expected bfloat16 or float16 on cuda, got float32"):
        ops.kv4_attn(args[0].float(), *args[1:])
    with pytest.raises(RuntimeError, match=r"plan: expected .* on cuda, got .* on cpu"):
        ops.kv4_attn(*args, plan=ops.msm_plan(batch, 8, 2))
    with pytest.raises(RuntimeError, match=r"pages: expected .* on cuda, got .* on cpu"):
        ops.kv4_attn(args[0], cache, args[2])
    with pytest.raises(RuntimeError, match=r"slots: expected .* on cuda"):
        ops.kv4_append(args[0][:, :2], args[0][:, :2], torch.arange(len(q)), args[1])
