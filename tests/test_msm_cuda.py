"""Attention over 16-bit pages on a GPU: every body against the fp64 reference, under poison."""

import pytest
import torch

from attention_cases import MIXED, assert_close, gen, paged_case, paged_problem
from tessella import ops
from tessella.formats_kv import KVPages, MsmBatch
from tessella.ref import msm as ref
from tessella.testing.force import force, gpu_kernels
from tessella.testing.metrics import relative_diff
from tessella.testing.poison import assert_untouched, poisoned_output

pytestmark = pytest.mark.gpu
KERNELS = gpu_kernels("msm") or [""]
HEADS = [
    (8, 2, 64, 16),
    (4, 4, 80, 32),
    (7, 1, 96, 64),
    (32, 8, 128, 16),
    (2, 1, 256, 48),
    (24, 1, 128, 64),
]
DTYPES = [torch.bfloat16, torch.float16]
# |x - y|^2 / (|x|^2 + |y|^2): rounding of probabilities and of the result
DIFF = {torch.float16: 3e-7, torch.bfloat16: 1.2e-5}


def on_gpu(batch: MsmBatch) -> MsmBatch:
    return MsmBatch(*(None if t is None else t.cuda() for t in vars(batch).values()))


def attend(q, pages, batch, plan=None, **how):
    """msm_attn on the GPU for tensors on the CPU; the plan is given with room behind it."""
    if plan is not None:
        plan = torch.cat([plan, plan.new_full((100,), 7)]).cuda()
    if how.get("sinks") is not None:
        how["sinks"] = how["sinks"].cuda()
    out = ops.msm_attn(q.cuda(), KVPages(pages.cuda()), on_gpu(batch), plan=plan, lse=True, **how)
    return tuple(t.cpu() for t in out)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("H, J, D, Z", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(kernel, H, J, D, Z, dtype):
    q, pages, batch, how, want = paged_case(H, J, D, Z, dtype)
    plans = [
        ops.msm_plan(batch, H, J, window=20, units=u, split=s)
        for u, s in ((9, 0), (1, 0), (3, 256))
    ]
    with force(kernel):
        for plan in (None, *plans):
            assert_close(attend(q, pages, batch, plan, **how), want, DIFF[dtype])
        got = attend(q, pages, batch, max_kv_len=300, **how)
        assert_close(got, want, DIFF[dtype])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("G", [1, 4, 8, 16, 24, 32])
@pytest.mark.parametrize("q", [1, 2, 8, 33])
def test_decode_and_verify_of_every_group(kernel, G, q):
    """Rows of 1 to 8 times 33 of a kv head; lengths around the groups of 16 keys and the pages."""
    kv_len = [q, q + 1, 63, 64, 65, 127, 500, 1030]
    D, dtype = 128, torch.bfloat16
    for mask in ("causal", "tree"):
        args = paged_problem(2 * G, 2, D, 16, dtype, [mask] * 8, [q] * 8, kv_len, seed=G)
        want = ref.msm_attn(*args, scale=D**-0.5)
        with force(kernel):
            for units in (1, 64):
                plan = ops.msm_plan(args[2], 2 * G, 2, units=units)
                assert_close(attend(*args, plan), want, DIFF[dtype])
            assert_close(attend(*args), want, DIFF[dtype])


@pytest.mark.parametrize("kernel", KERNELS)
def test_runs_and_replays_give_the_same_bits(kernel):
    q, pages, batch = paged_problem(
        8, 2, 64, 16, torch.bfloat16, None, [1] * 5, [3000, 7, 700, 64, 1]
    )
    plan = ops.msm_plan(batch, 8, 2, units=200)
    assert int(plan[7]) > 0
    buffer = torch.zeros(4096, dtype=torch.int32, device="cuda")
    buffer[: len(plan)] = plan.cuda()
    cache, b, gq = KVPages(pages.cuda()), on_gpu(batch), q.cuda()
    with force(kernel):
        want = ops.msm_attn(gq, cache, b, plan=buffer).clone()
        assert all(torch.equal(ops.msm_attn(gq, cache, b, plan=buffer), want) for _ in range(20))
        graph, out = torch.cuda.CUDAGraph(), torch.empty_like(gq)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            ops.msm_attn(gq, cache, b, plan=buffer, out=out)
        for _ in range(5):
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, want)
        # other lengths and another plan in the same buffers
        shorter = MsmBatch(
            batch.block_table, batch.cu_q, batch.kv_len - torch.tensor([999, 0, 5, 0, 0]).int()
        )
        b.kv_len.copy_(shorter.kv_len)
        plan = ops.msm_plan(shorter, 8, 2, units=60)
        buffer[: len(plan)] = plan.cuda()
        graph.replay()
    got = (out.cpu(), ref.msm_attn(q, pages, shorter, scale=64**-0.5)[1])
    assert_close(got, ref.msm_attn(q, pages, shorter, scale=64**-0.5), DIFF[torch.bfloat16])


@pytest.mark.parametrize("kernel", KERNELS)
def test_split_one(kernel):
    """A few keys, split and merged: small enough to run under compute-sanitizer."""
    for q_len in ([1, 1], [8, 3]):
        q, pages, batch = paged_problem(8, 2, 128, 16, torch.bfloat16, None, q_len, [600, 35])
        want = ref.msm_attn(q, pages, batch, scale=128**-0.5)
        with force(kernel):
            for plan in (ops.msm_plan(batch, 8, 2, units=8, split=256), None):
                assert_close(attend(q, pages, batch, plan), want, DIFF[torch.bfloat16])


def split_late(batch, H, J):
    """A plan with parts whose first rows lie behind their place among the partial ones."""
    plan = ops.msm_plan(batch, H, J, units=100)
    tasks = plan[16 : 16 + 8 * int(plan[6])].view(-1, 8)
    assert ((tasks[:, 6] >= 0) & (tasks[:, 6] < tasks[:, 2])).any()
    return plan


@pytest.mark.parametrize("kernel", KERNELS)
def test_prompts_in_parts(kernel):
    q, pages, batch = paged_problem(
        8, 4, 64, 64, torch.bfloat16, None, q_len=[1, 600, 9], kv_len=[900, 600, 700]
    )
    want = ref.msm_attn(q, pages, batch, scale=64**-0.5)
    with force(kernel):
        assert_close(attend(q, pages, batch, split_late(batch, 8, 4)), want, DIFF[torch.bfloat16])


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_but_the_result_is_written(kernel):
    q, pages, batch = paged_problem(8, 2, 64, 16, torch.bfloat16, MIXED)
    out, around = poisoned_output(q.cuda())
    cache = KVPages(pages.cuda())
    before = cache.pages.clone()
    with force(kernel):
        ops.msm_attn(q.cuda(), cache, on_gpu(batch), window=20, out=out)
    assert torch.isfinite(out).all()
    assert_untouched(around)
    assert torch.equal(cache.pages.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("longest", [20_000, pytest.param(131_072, marks=pytest.mark.slow)])
def test_one_giant_among_tiny_requests(kernel, longest):
    kv_len = [longest] + [1 + i % 40 for i in range(63)]
    q, pages, batch = paged_problem(4, 2, 64, 64, torch.bfloat16, None, [1] * 64, kv_len)
    want = ref.msm_attn(q, pages, batch, scale=64**-0.5)
    with force(kernel):
        for plan in (ops.msm_plan(batch, 4, 2, units=264), None):
            assert_close(attend(q, pages, batch, plan), want, DIFF[torch.bfloat16])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_cache_beyond_2_31_elements(kernel):
    """Pages whose elements lie beyond 32 bits are found."""
    J, Z, D = 8, 64, 128
    P = 2**31 // (J * 2 * Z * D) + 64
    pages = torch.empty(P, J, 2, Z, D, dtype=torch.bfloat16, device="cuda")
    small = torch.randn(4, J, 2, Z, D, generator=gen()).bfloat16()
    table = torch.tensor([[P - 1, 0, P - 30, P - 2]], dtype=torch.int32)
    pages[table[0].long()] = small.cuda()
    lengths = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([250], dtype=torch.int32)
    q = torch.randn(1, 32, D, generator=gen(1)).bfloat16()
    with force(kernel):
        got = ops.msm_attn(q.cuda(), KVPages(pages), on_gpu(MsmBatch(table, *lengths)))
    local = MsmBatch(torch.arange(4, dtype=torch.int32)[None], *lengths)
    want, _ = ref.msm_attn(q, small, local, scale=D**-0.5)
    assert relative_diff(got.cpu(), want) < DIFF[torch.bfloat16]
    k = torch.randn(1, J, D, generator=gen(2)).bfloat16()
    ops.msm_append(k.cuda(), k.cuda(), torch.tensor([(P - 1) * Z + 3]).cuda(), KVPages(pages))
    assert torch.equal(pages[P - 1, :, 1, 3].cpu(), k[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D, R", [(64, 64), (80, 32), (128, 0)])
def test_append(dtype, D, R):
    g, T, J, Z, P = gen(4), 70, 2, 16, 6
    k = torch.randn(T, J, 2 * D, generator=g).to(dtype)[..., :D]
    v = torch.randn(J, T, D, generator=g).to(dtype).transpose(0, 1)
    slots = torch.randperm(P * Z, generator=g)[:T]
    slots[5], slots[6], slots[7] = -1, P * Z, -(10**12)
    rope = (torch.rand(T, R // 2, generator=g), torch.rand(T, R // 2, generator=g)) if R else None
    for page_dtype in (torch.bfloat16, torch.float16, torch.float32):
        want = torch.full((P, J, 2, Z, D), 9.0, dtype=page_dtype)
        got = want.cuda()
        wide = torch.cat([k, k], -1).cuda()[..., :D]
        turned = v.transpose(0, 1).contiguous().cuda().transpose(0, 1)
        gpu_rope = None if rope is None else tuple(t.cuda() for t in rope)
        ops.msm_append(wide, turned, slots.cuda(), KVPages(got), gpu_rope)
        ref.msm_append(k, v, slots, want, *(rope or ()))
        assert torch.equal(got.cpu(), want)


def test_nan_spoils_only_what_sees_it():
    q, pages, batch = paged_problem(4, 2, 64, 16, torch.bfloat16, None, [8, 2], [40, 40])
    page, at = int(batch.block_table[0, 34 // 16]), 34 % 16
    pages[page, 1, 0, at, 3] = torch.nan  # key 34 of request 0, kv head 1
    bad = torch.isnan(attend(q, pages, batch)[0])
    want = torch.zeros(10, 4, dtype=torch.bool)
    want[2:8, 2:] = True  # tokens at 34.. of request 0, the query heads of kv head 1
    assert torch.equal(bad.all(-1), want) and torch.equal(bad.any(-1), want)


def test_strided_queries_and_empty_batches():
    q, pages, batch = paged_problem(4, 2, 64, 16, torch.float16)
    wide = torch.randn(len(q), 12, 64).half().cuda()
    wide[:, 4:8] = q.cuda()
    cache, b = KVPages(pages.cuda()), on_gpu(batch)
    assert torch.equal(ops.msm_attn(wide[:, 4:8], cache, b), ops.msm_attn(q.cuda(), cache, b))
    none = MsmBatch(b.block_table[:0], b.cu_q[:1], b.kv_len[:0])
    out, lse = ops.msm_attn(q[:0].cuda(), cache, none, lse=True)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


def test_bad_input_is_refused():
    q, pages, batch = paged_problem(4, 2, 64, 16, torch.bfloat16)
    cache, b = KVPages(pages.cuda()), on_gpu(batch)
    for args, how, message in [
        ((q.cuda().half(), cache, b), {}, "pages: expected pages of q's dtype or"),
        ((q.cuda().float(), cache, b), {}, "q: expected bfloat16 or float16 on cuda"),
        ((q.cuda(), cache, batch), {}, "block_table: expected .* on cuda"),
        ((q.cuda(), cache, b), {"plan": ops.msm_plan(batch, 4, 2)}, "plan: expected .* on cuda"),
        ((q.cuda(), cache, b), {"max_kv_len": 10_000}, "max_kv_len: expected at most the"),
        ((q.cuda()[..., :48], cache, b), {}, "q: expected head dim 64"),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            ops.msm_attn(*args, **how)


def test_opcheck_and_compile():
    q, pages, batch = paged_problem(4, 2, 64, 16, torch.bfloat16, MIXED)
    b, clean = on_gpu(batch), pages.nan_to_num().cuda()
    fields = (b.block_table, b.cu_q, b.kv_len, b.mask, b.tree_bits, b.tree_row)
    args = (q.cuda(), clean, *fields, 0.125, 20, 0.0, None, None, 0)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.tessella.msm_attn.default, (*args, True), test_utils=checks)

    def run(q):
        return ops.msm_attn(q * 2, KVPages(clean), b, window=20) + 1

    assert torch.equal(
        torch.compile(run, backend="aot_eager", fullgraph=True)(q.cuda()), run(q.cuda())
    )
