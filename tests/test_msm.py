"""Attention over 16-bit pages: every body against the fp64 reference, under poison."""

import pytest
import torch

from attention_cases import MIXED, assert_close, gen, paged_case, paged_problem
from tessella import _native, ops
from tessella.formats_kv import KVPages, MsmBatch
from tessella.ref import msm as ref
from tessella.testing.attention import make_batch
from tessella.testing.force import environment, force, runnable
from tessella.testing.poison import assert_untouched, poisoned_output

native = pytest.mark.skipif(not _native.HAS_OPS, reason="needs compiled kernels")
KERNELS = [k for k in runnable("msm") if not k.endswith("bf16") or _native._C.cpu_isa().get("bf16")]
HEADS = [(8, 2, 64, 16), (4, 4, 80, 32), (7, 1, 96, 64), (4, 2, 128, 16), (2, 1, 256, 48)]

# |x - y|^2 / (|x|^2 + |y|^2): rounding of the result, and in bf16 bodies of q, k, v and p
DIFF = {torch.float32: 1e-12, torch.float16: 1e-7, torch.bfloat16: 4e-6}
DIFF_BF16_BODY = 1.2e-5


@native
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("H, J, D, Z", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_parity(kernel, H, J, D, Z, dtype):
    q, pages, batch, how, want = paged_case(H, J, D, Z, dtype)
    limit = DIFF_BF16_BODY if kernel.endswith("bf16") and dtype == torch.bfloat16 else DIFF[dtype]
    with force(kernel):
        for plan in (None, ops.msm_plan(batch, H, J, window=20, units=9)):
            got = ops.msm_attn(q, KVPages(pages), batch, plan=plan, lse=True, **how)
            assert_close(got, want, limit)


@native
@pytest.mark.parametrize("kernel", KERNELS)
def test_split_and_unsplit_agree(kernel):
    mask = ["causal", "window", "tree"]
    q, pages, batch = paged_problem(
        4, 2, 64, 16, torch.float32, mask, [3, 40, 66], [2000, 700, 900]
    )
    cache = KVPages(pages)
    with force(kernel):
        whole = ops.msm_attn(q, cache, batch, window=333, lse=True, plan=plan_of(batch, 333, 1, 0))
        for units, split in ((64, 0), (1, 256), (5, 512)):
            plan = plan_of(batch, 333, units, split)
            assert int(plan[7]) > 0  # it does merge
            parts = ops.msm_attn(q, cache, batch, window=333, lse=True, plan=plan)
            assert_close(parts, whole, 1e-12)


def plan_of(batch, window, units, split):
    return ops.msm_plan(batch, 4, 2, window=window, units=units, split=split)


@native
def test_a_fixed_split_is_batch_invariant():
    """The same request, alone and beside others, on any number of workers: the same bits."""
    q_len, kv_len = [2, 60, 1], [1500, 400, 5000]
    q, pages, batch = paged_problem(4, 2, 64, 16, torch.bfloat16, None, q_len, kv_len)
    plan = ops.msm_plan(batch, 4, 2, units=8, split=512)
    together = ops.msm_attn(q, KVPages(pages), batch, plan=plan)
    for b in range(3):
        cu = torch.tensor([0, q_len[b]], dtype=torch.int32)
        alone = MsmBatch(batch.block_table[b : b + 1].clone(), cu, batch.kv_len[b : b + 1].clone())
        part = slice(int(batch.cu_q[b]), int(batch.cu_q[b + 1]))
        plan = ops.msm_plan(alone, 4, 2, units=1, split=512)
        got = ops.msm_attn(q[part], KVPages(pages), alone, plan=plan)
        assert torch.equal(got, together[part])


@native
def test_results_do_not_depend_on_threads():
    q, pages, batch = paged_problem(8, 2, 64, 16, torch.float32, MIXED)
    plan = ops.msm_plan(batch, 8, 2, window=7, units=3)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.msm_attn(q, KVPages(pages), batch, window=7, plan=plan))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@native
def test_one_giant_among_tiny_requests():
    n, giant = 63, 20_000
    q, pages, batch = paged_problem(
        4, 2, 64, 64, torch.bfloat16, None, [1] * (n + 1), [giant] + [1 + i % 40 for i in range(n)]
    )
    plan = ops.msm_plan(batch, 4, 2, units=8)
    assert int(plan[7]) == 1  # only the giant is split
    got = ops.msm_attn(q, KVPages(pages), batch, plan=plan, lse=True)
    limit = DIFF_BF16_BODY if _native._C.cpu_isa()["bf16"] else DIFF[torch.bfloat16]
    assert_close(got, ref.msm_attn(q, pages, batch, scale=64**-0.5), limit)


@native
def test_requests_may_share_pages():
    g = gen(3)
    batch, P = make_batch([4, 1, 30], [100, 77, 64], 16, g, shared_pages=4)
    pages = torch.randn(P, 2, 2, 16, 64, generator=g)
    q = torch.randn(35, 4, 64, generator=g)
    got = ops.msm_attn(q, KVPages(pages), batch, lse=True)
    assert_close(got, ref.msm_attn(q, pages, batch, scale=64**-0.5), 1e-12)


@native
def test_nothing_but_the_result_is_written():
    q, pages, batch = paged_problem(8, 2, 64, 16, torch.float32, MIXED)
    out, around = poisoned_output(q)
    before = pages.clone()
    got = ops.msm_attn(q, KVPages(pages), batch, window=20, out=out)
    assert got is out and torch.isfinite(out).all()
    assert_untouched(around)
    assert torch.equal(pages.nan_to_num(7), before.nan_to_num(7))
    assert torch.equal(out, ops.msm_attn(q, KVPages(pages), batch, window=20))


@native
def test_nan_spoils_only_what_sees_it():
    q, pages, batch = paged_problem(4, 2, 64, 16, torch.float32, None, [8, 2], [40, 40])
    page, at = int(batch.block_table[0, 34 // 16]), 34 % 16
    pages[page, 1, 0, at, 3] = torch.nan  # key 34 of request 0, kv head 1
    out = ops.msm_attn(q, KVPages(pages), batch)
    bad = torch.isnan(out).all(-1)
    assert torch.equal(bad, torch.isnan(out).any(-1))
    want = torch.zeros(10, 4, dtype=torch.bool)
    want[2:8, 2:] = True  # tokens at 34.. of request 0, the query heads of kv head 1
    assert torch.equal(bad, want)


@native
def test_strided_queries_and_empty_batches():
    q, pages, batch = paged_problem(4, 2, 64, 16, torch.float32)
    wide = torch.randn(len(q), 12, 64)
    wide[:, 4:8] = q
    cache = KVPages(pages)
    assert torch.equal(ops.msm_attn(wide[:, 4:8], cache, batch), ops.msm_attn(q, cache, batch))
    none = MsmBatch(batch.block_table[:0], batch.cu_q[:1], batch.kv_len[:0])
    out, lse = ops.msm_attn(q[:0], cache, none, lse=True)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D, R", [(64, 64), (80, 32), (128, 0)])
def test_append(dtype, D, R):
    g, T, J, Z, P = gen(4), 70, 2, 16, 6
    k = torch.randn(T, J, 2 * D, generator=g).to(dtype)[..., :D]
    v = torch.randn(J, T, D, generator=g).to(dtype).transpose(0, 1)
    slots = torch.randperm(P * Z, generator=g)[:T]
    slots[5], slots[6], slots[7] = -1, P * Z, -(10**12)
    rope = (torch.rand(T, R // 2, generator=g), torch.rand(T, R // 2, generator=g)) if R else None
    got, want = (torch.full((P, J, 2, Z, D), 9.0, dtype=torch.bfloat16) for _ in range(2))
    ops.msm_append(k, v, slots, KVPages(got), rope)
    ref.msm_append(k, v, slots, want, *(rope or ()))
    assert torch.equal(got, want)
    assert int((got[:, 0, 0, :, 0] == 9).sum()) >= P * Z - T + 3
    with environment(DEBUG="1"), pytest.raises(RuntimeError, match=r"slots: expected -1\.\.95 for"):
        ops.msm_append(k, v, slots, KVPages(got), rope)
    assert torch.equal(got, want)


def bad_calls():
    """(what, how the arguments are changed, part of the message)."""

    def change(**kw):
        return lambda a: {**a, **kw}

    def value(name, at, x):
        def run(a):
            t = a[name].clone()
            t[at] = x
            return {**a, name: t}

        return run

    return [
        ("page", value("block_table", (3, 1), 99), "block_table: expected pages.*entry 1 of"),
        ("negative page", value("block_table", (0, 0), -1), "block_table.*request 0, got -1"),
        ("kv over the table", value("kv_len", 0, 10_000), "kv_len.*request 0, got 10000"),
        ("kv under q", value("kv_len", 3, 7), "kv_len: expected at least the 37.*request 3, got 7"),
        ("negative kv", value("kv_len", 0, -1), "kv_len"),
        ("cu_q", value("cu_q", 1, 30), "cu_q: expected non-decreasing"),
        ("first cu_q", value("cu_q", 0, 1), "cu_q: expected 0 as the first"),
        ("last cu_q", value("cu_q", -1, 200), "cu_q: expected T=123"),
        ("mask", value("mask", 1, 4), "mask: expected 0 full.*request 1, got 4"),
        ("window", change(window=0), "window: expected at least 1.*request 2"),
        ("tree row", value("tree_row", 3, 90), "tree_row.*request 3, got 90"),
        ("no bits", change(tree_bits=None), "tree_bits"),
        ("no rows", change(tree_row=None), "tree_row: expected int32"),
        ("narrow tree", lambda a: {**a, "tree_bits": a["tree_bits"][:, :1].contiguous()},
         "tree_bits: expected at least 70 bits a row of request 5, got 64"),
        ("dtype", lambda a: {**a, "kv_len": a["kv_len"].long()}, "kv_len: expected contiguous"),
        ("head dim", lambda a: {**a, "q": a["q"][..., :32].contiguous()}, "q: expected head dim"),
        ("heads", lambda a: {**a, "q": a["q"][:, :3].contiguous()}, "q: expected H a multiple"),
        ("stride", lambda a: {**a, "q": a["q"].repeat(1, 1, 2)[..., ::2]}, "unit stride"),
        ("double", lambda a: {**a, "q": a["q"].double()}, "q: expected bfloat16"),
        ("pages", lambda a: {**a, "pages": a["pages"][:, :, :, ::2]}, "pages: expected contig"),
        ("page size", lambda a: {**a, "pages": a["pages"][..., :8, :].contiguous()}, "tokens a"),
        ("sinks", change(sinks=torch.zeros(3)), r"sinks: expected contiguous float32 \[8\]"),
        ("softcap", change(softcap=-1.0), "softcap"),
        ("longest", change(max_kv_len=100), "kv_len: expected 0..100 of request 0, got 300"),
    ]  # fmt: skip


@native
@pytest.mark.parametrize("what, change, message", bad_calls(), ids=lambda x: x if x else "")
def test_bad_input_is_refused_before_any_work(what, change, message):
    q, pages, b = paged_problem(8, 2, 64, 16, torch.float32, MIXED)
    args = {"q": q, "pages": pages} | {f: getattr(b, f) for f in MsmBatch.__dataclass_fields__}
    args |= {"scale": 0.1, "window": 20, "softcap": 0.0, "sinks": None, "plan": None}
    names = (
        "q pages block_table cu_q kv_len mask tree_bits tree_row scale window softcap sinks plan"
    )
    args = change(args | {"max_kv_len": 0})
    out, around = poisoned_output(q)
    before = out.clone()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tessella.msm_attn_out(
            *(args[n] for n in (*names.split(), "max_kv_len")), out, None
        )
    assert_untouched(around)
    assert torch.equal(out.isnan(), before.isnan())


@native
def test_gradients_are_refused():
    q, pages, batch = paged_problem(4, 2, 64, 16, torch.float32)
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.msm_attn(q.requires_grad_(), KVPages(pages), batch)


@native
def test_opcheck_fake_and_compile():
    q, pages, b = paged_problem(4, 2, 64, 16, torch.float32, MIXED)
    fields = (b.block_table, b.cu_q, b.kv_len, b.mask, b.tree_bits, b.tree_row)
    args = (q, pages, *fields, 0.125, 20, 0.0, None, None, 0)
    checks = ("test_schema", "test_faketensor")
    clean = pages.nan_to_num()
    args = (q, clean, *args[2:])
    torch.library.opcheck(torch.ops.tessella.msm_attn.default, (*args, True), test_utils=checks)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
    op = torch.ops.tessella.msm_attn_out.default
    torch.library.opcheck(op, (*args, out, lse), test_utils=checks)
    plan = (b.cu_q, b.kv_len, b.mask, 4, 2, 20, 3, 0)
    torch.library.opcheck(torch.ops.tessella.msm_plan.default, plan, test_utils=("test_schema",))
    k = torch.randn(3, 2, 64)
    append = (k, k, torch.arange(3), None, None, clean)
    torch.library.opcheck(torch.ops.tessella.msm_append.default, append, test_utils=checks)

    def attend(q):
        return ops.msm_attn(q * 2, KVPages(clean), b, window=20) + 1

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q), attend(q))


@native
def test_the_stand_in_agrees():
    """The op without compiled kernels is the reference."""
    from tessella.ops import msm

    q, pages, b = paged_problem(4, 2, 64, 16, torch.float32)
    batch = (b.block_table, b.cu_q, b.kv_len, None, None, None, 0.125, 0, 0.0, None, None, 0)
    out, lse = msm._ref_attn(q, pages, *batch, True)
    got, sums = torch.ops.tessella.msm_attn(q, pages, *batch, True)
    assert_close((got, sums), (out, lse), 1e-12)
    words = msm._ref_plan(b.cu_q, b.kv_len, None, 4, 2, 0, 1, 0)
    assert torch.equal(ops.msm_attn(q, KVPages(pages), b, plan=words, scale=0.125), got)
