"""Attention over coded pages, and the coding itself: every body, mask and codec."""

import pytest
import torch

from attention_cases import MIXED, coded_cases, coded_problem, gen
from attention_cases import assert_close as assert_close_to
from tessella import _native, ops
from tessella.formats_kv import KV4Pages, KVCodec, KVFactors
from tessella.layout_kv import unpack_page
from tessella.ref import kv4 as ref
from tessella.testing.attention import make_batch
from tessella.testing.force import environment, force, runnable
from tessella.testing.poison import assert_untouched, poisoned_output

native = pytest.mark.skipif(not _native.HAS_OPS, reason="needs compiled kernels")
KERNELS = [k for k in runnable("kv4") if not k.endswith("bf16") or _native._C.cpu_isa().get("bf16")]
CODECS = ["k4v4", "k8v8", "k2v2", "k4v4-g16", "k4v2-g32", "k4v4-channel", "k8v4-channel"]
SHAPES = (  # H, J, D, Z, dtype, with factors
    (8, 2, 64, 16, torch.float32, True),
    (4, 4, 80, 32, torch.bfloat16, False),
    (7, 1, 96, 64, torch.float16, False),
    (4, 2, 128, 16, torch.bfloat16, False),
    (2, 1, 256, 48, torch.float32, False),
)

# |x - y|^2 / (|x|^2 + |y|^2) with the exact attention over the same codes. "codes" quantises
# queries and probabilities to 8 bits: 1e-2 relative, a tenth of what coding the cache costs.
DIFF = {"codes": 2e-4, "bf16": 3e-5, "tile": 4e-6}


def assert_close(got, want, limit):
    assert_close_to(got, want, limit, 5e-2 if limit > 5e-6 else 2e-3)


@native
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_parity(kernel, codec):
    for (q, cache, batch), split, how, want in coded_cases(codec, SHAPES):
        with force(kernel):
            for plan in (None, split):
                got = ops.kv4_attn(q, cache, batch, plan=plan, lse=True, **how)
                assert_close(got, want, DIFF[kernel.split(".")[-1]])


@native
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("codec", ["k4v4", "k4v4-channel"])
def test_split_and_unsplit_agree(kernel, codec):
    mask = ["causal", "window", "tree"]
    q, cache, batch, how = coded_problem(
        codec, 4, 2, 64, 16, torch.float32, mask, q_len=[3, 9, 66], kv_len=[2000, 700, 900]
    )
    with force(kernel):
        results = []
        for units, split in ((1, 0), (64, 0), (1, 256), (5, 512)):
            plan = ops.msm_plan(batch, 4, 2, window=333, units=units, split=split)
            results.append(ops.kv4_attn(q, cache, batch, window=333, plan=plan, lse=True, **how))
    for got in results[1:]:
        # where a part begins decides which 64 probabilities share a scale
        assert_close(got, results[0], 1e-4 if kernel.endswith("codes") else 4e-6)


@native
def test_integer_products_are_exact():
    """Where queries are INT8 already and one key is seen, nothing is rounded but the result."""
    g, J, Z, D = gen(), 1, 16, 64
    batch, P = make_batch([1], [1], Z, g)
    for name in ("k4v4", "k8v8", "k2v2", "k4v4-g32"):
        cache = KV4Pages.empty(P, J, Z, D, KVCodec.parse(name))
        k = torch.randint(0, 4, (1, J, D), generator=g).float()
        k[..., ::16], k[..., 1::16] = 0, 3
        slots = batch.block_table[0, :1].long() * Z
        ops.kv4_append(k, k, slots, cache)
        q = torch.randint(-127, 128, (1, 1, D), generator=g).float()
        q[..., 0] = 127
        stored, _ = ref.gather(cache, batch, 0)
        for kernel in (k for k in KERNELS if k.endswith("codes")):
            with force(kernel):
                _, lse = ops.kv4_attn(q, cache, batch, lse=True, scale=2.0**-10)
            want = float((q[0, 0].double() * stored[0, 0]).sum()) * 2.0**-10
            assert abs(float(lse) - want) < 1e-5 * max(1, abs(want)), (name, kernel)


@native
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("D, Z", [(64, 16), (96, 48)])
def test_append_gives_the_codes_of_the_reference(codec, D, Z):
    g, J, T, P, c = gen(2), 2, 70, 8, KVCodec.parse(codec)
    if c.group and D % c.group:
        pytest.skip("D is not whole groups")
    got, want = (KV4Pages.empty(P, J, Z, D, c, 2) for _ in range(2))
    k, v = torch.randn(T, J, D, generator=g), torch.randn(T, J, D, generator=g)
    awkward(k), awkward(v)
    slots = torch.arange(T)
    slots[20], slots[21], slots[22] = -1, P * Z, -5
    rope = torch.rand(T, D // 4, generator=g), torch.rand(T, D // 4, generator=g)
    factors = KVFactors(k_mean=torch.randn(3, J, D, generator=g))
    how = {"factors": factors, "rows": torch.full((T,), 2, dtype=torch.int32)}
    if c.k_axis == "channel":
        how["tail_row"] = torch.ones(T, dtype=torch.int32)
    ops.kv4_append(k, v, slots, got, rope, **how)
    ref.kv4_append(k, v, slots, want, rope, **how)
    assert torch.equal(got.blob, want.blob)
    if c.k_axis == "channel":
        assert torch.equal(got.k_tail.nan_to_num(7), want.k_tail.nan_to_num(7))
    before = got.blob.clone()
    with environment(DEBUG="1"), pytest.raises(RuntimeError, match="slots: expected -1"):
        ops.kv4_append(v, k, slots, got, rope, **how)
    assert torch.equal(got.blob, before)


def awkward(x):
    """Constants, zeros, tiny and huge vectors, infinities and NaN, in tokens 3 to 12."""
    x[3], x[4] = 2.5, 0
    x[5, 0, 3], x[6, 1, 2] = torch.nan, torch.inf
    x[7] *= 1e-8
    x[8], x[9, 0, 0] = -1e6, 1e30
    x[10] = 100 + x[10] * 0.02
    x[11] = x[11].abs() + 50
    x[12, :, 1:] = 0


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_append_takes_strided_rows_of_any_dtype(dtype):
    g = gen(5)
    k = torch.randn(2, 9, 3 * 64, generator=g).to(dtype).transpose(0, 1)[..., 64:128]
    got, want = (KV4Pages.empty(2, 2, 16, 64, KVCodec()) for _ in range(2))
    ops.kv4_append(k, k, torch.arange(9), got)
    ops.kv4_append(k.float().contiguous(), k.float().contiguous(), torch.arange(9), want)
    assert torch.equal(got.blob, want.blob)


@pytest.mark.parametrize("bits, limit", [(8, 0.006), (4, 0.1), (2, 0.5)])
def test_the_error_of_coding(bits, limit):
    """Half a step at most; far from zero and nearly constant vectors as well as others."""
    x = torch.randn(500, 64, generator=gen(6)) * 3
    x[::5] += 40
    x[1::5] = x[1::5] * 1e-5 + 7
    codes, s, z = ref.quantise(x, bits)
    real = (codes.double() - z[:, None].double()) * s[:, None].double()
    step = s[:, None].double() * 0.5 + 2.0**-10 * x.abs().amax(1, keepdim=True)
    assert bool(((real - x).abs() <= step * 1.01).all())
    plain = torch.arange(500) % 5 > 1
    assert float((real - x)[plain].norm() / x[plain].norm()) < limit


@native
def test_a_nan_token_spoils_only_what_sees_it():
    for spoil in ("k", "v"):
        for kernel in KERNELS:
            q, cache, batch, _ = coded_problem(
                "k4v4", 4, 2, 64, 16, torch.float32, None, q_len=[8, 2], kv_len=[40, 40]
            )
            k, v = torch.randn(1, 2, 64), torch.randn(1, 2, 64)
            (k if spoil == "k" else v)[0, 1, 5] = torch.inf
            slot = batch.block_table[0, 34 // 16].long() * 16 + 34 % 16
            ops.kv4_append(k, v, slot[None], cache)
            with force(kernel):
                out = ops.kv4_attn(q, cache, batch)
            want = torch.zeros(10, 4, dtype=torch.bool)
            want[2:8, 2:] = True
            bad = torch.isnan(out)
            assert bool(bad[want].all()), (spoil, kernel)
            if spoil == "v":  # 0 * NaN: rows of the same tile may be spoilt though they are masked
                want[:8, 2:] = True
            assert not bad[~want].any(), (spoil, kernel)


@native
@pytest.mark.parametrize("kernel", KERNELS)
def test_non_finite_queries(kernel):
    q, cache, batch, _ = coded_problem("k4v4", 4, 2, 64, 16, torch.float32, None)
    q[0, 1, 5], q[3, 2, 0] = torch.inf, torch.nan
    with force(kernel):
        out = ops.kv4_attn(q, cache, batch)
    bad = torch.isnan(out).any(-1)
    assert bad.nonzero().tolist() == [[0, 1], [3, 2]]


@native
@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_long_request_among_tiny_ones(kernel):
    if ".scalar." in kernel:
        pytest.skip("minutes")
    n = 63
    q, cache, batch, _ = coded_problem(
        "k4v4", 4, 2, 64, 64, torch.float32, None,
        q_len=[1] * (n + 1), kv_len=[100_000] + [1 + i % 40 for i in range(n)],
    )  # fmt: skip
    want = ref.kv4_attn(q, cache, batch, scale=0.125)
    with force(kernel):
        got = ops.kv4_attn(q, cache, batch, lse=True, plan=ops.msm_plan(batch, 4, 2, units=16))
    assert_close(got, want, DIFF[kernel.split(".")[-1]])


@native
def test_nothing_but_the_result_is_written():
    q, cache, batch, _ = coded_problem("k4v4", 8, 2, 64, 16, torch.float32, MIXED)
    out, around = poisoned_output(q)
    before = cache.blob.clone()
    got, lse = ops.kv4_attn(q, cache, batch, window=20, out=out, lse=True)
    assert got is out and torch.isfinite(out).all()
    assert_untouched(around)
    assert torch.equal(cache.blob, before)
    again = ops.kv4_attn(q, cache, batch, window=20, lse=True)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


def bad_calls():
    """(what, keyword arguments that are changed, part of the message)."""
    fold = torch.zeros(2, 2, 4, 16, 16)
    return [
        ("codec", {"codec": "k4v5"}, r"codec: expected k\{8,4,2\}v\{8,4,2\}.*got 'k4v5'"),
        ("other codec", {"codec": "k8v8"}, "pages: expected contiguous uint8"),
        ("group", {"codec": "k4v4-g48"}, "codec: expected groups"),
        ("trailing", {"codec": "k4v4-g32x"}, "codec: expected k"),
        ("page size", {"Z": 24}, "Z: expected a multiple of 16"),
        ("mean", {"k_mean": torch.zeros(1, 2, 32)}, "k_mean: expected contiguous float32"),
        ("fold", {"q_fold": fold[..., :8, :8].contiguous()}, "q_fold: expected float32"),
        ("rows differ", {"q_fold": fold, "k_mean": torch.zeros(1, 2, 64)}, "q_fold: expected 1"),
        ("row", {"o_fold": fold, "rows": torch.full((8,), 2, dtype=torch.int32)},
         "rows: expected rows 0..1 in entry 0, got 2"),
        ("tail", {"k_tail": torch.zeros(1, 2, 16, 64)}, "k_tail: expected None"),
        ("no tail", {"codec": "k4v4-channel"}, "expected"),
        ("head dim", {"q": torch.zeros(62, 8, 72)}, "a multiple of 16 in 16..256, got 72"),
    ]  # fmt: skip


@native
@pytest.mark.parametrize("what, change, message", bad_calls(), ids=lambda x: x if x else "")
def test_bad_input_is_refused_before_any_work(what, change, message):
    q, cache, b, _ = coded_problem("k4v4", 8, 2, 64, 16, torch.float32, MIXED)
    names = "q pages codec Z block_table cu_q kv_len mask tree_bits tree_row scale window softcap"
    names += " sinks plan max_kv_len k_mean q_fold o_fold rows k_tail tail_row"
    batch = {
        f: getattr(b, f) for f in ["block_table", "cu_q", "kv_len", "mask", "tree_bits", "tree_row"]
    }
    args = dict.fromkeys(names.split()) | batch
    args |= {"q": q, "pages": cache.blob, "codec": "k4v4", "Z": 16, "scale": 0.1, "window": 20}
    args |= {"softcap": 0.0, "max_kv_len": 0} | change
    out, around = poisoned_output(args["q"])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tessella.kv4_attn_out(*(args[n] for n in names.split()), out, None)
    assert_untouched(around)
    assert bool(out.isnan().all())


@native
def test_appends_refuse_what_does_not_fit():
    cache = KV4Pages.empty(2, 2, 16, 64, KVCodec())
    k, slots = torch.zeros(3, 2, 64), torch.arange(3)
    for args, message in [
        ((k, k[:2], slots, cache), r"v: expected \[T, J, D\]"),
        ((k, k, slots.int(), cache), "slots: expected contiguous int64"),
        ((k[..., :48], k[..., :48], slots, cache), "codec|pages"),
        ((k, k.bfloat16(), slots, cache), "v: expected"),
        ((k, k, slots, cache, (torch.zeros(3, 40), torch.zeros(3, 40))), "cos: expected .*R <= D"),
        ((k, k, slots, cache, (torch.zeros(3, 8), torch.zeros(2, 8))), "sin"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.kv4_append(*args)
    assert not cache.blob.any()


@native
def test_opcheck_fake_and_compile():
    q, cache, b, _ = coded_problem("k4v4", 4, 2, 64, 16, torch.float32, MIXED)
    cache = KV4Pages(cache.blob.clone(), cache.codec, 16, 64)
    fields = (b.block_table, b.cu_q, b.kv_len, b.mask, b.tree_bits, b.tree_row)
    args = (q, cache.blob, "k4v4", 16, *fields, 0.125, 20, 0.0, None, None, 0, *[None] * 6)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.tessella.kv4_attn.default, (*args, True), test_utils=checks)
    out = (torch.empty_like(q), torch.empty(q.shape[:2]))
    op = torch.ops.tessella.kv4_attn_out.default
    torch.library.opcheck(op, (*args, *out), test_utils=checks)
    k = torch.randn(3, 2, 64)
    append = (k, k, torch.arange(3), None, None, "k4v4", 16, *[None] * 4, cache.blob, None, None)
    torch.library.opcheck(torch.ops.tessella.kv4_append.default, append, test_utils=checks)

    def attend(q):
        return ops.kv4_attn(q * 2, cache, b, window=20) + 1

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q), attend(q))


@native
def test_the_stand_in_agrees():
    from tessella.ops import kv4

    q, cache, b, how = coded_problem("k4v4", 8, 2, 64, 16, torch.float32, None, True)
    f = how["factors"]
    batch = (b.block_table, b.cu_q, b.kv_len, None, None, None, 0.125, 0, 0.0, None, None, 0)
    own = (f.k_mean, f.q_fold, f.o_fold, how["rows"], None, None)
    args = (q, cache.blob, "k4v4", 16, *batch, *own, True)
    assert_close(torch.ops.tessella.kv4_attn(*args), kv4._ref_attn(*args), DIFF["codes"])
    k, slots = torch.randn(3, 2, 64), torch.tensor([0, 5, -1])
    blobs = [torch.zeros_like(cache.blob) for _ in range(2)]
    for run, blob in zip((torch.ops.tessella.kv4_append, kv4._ref_append), blobs, strict=True):
        run(k, k, slots, None, None, "k4v4", 16, None, f.k_fold[:1], None, None, blob, None, None)
    old, new = (unpack_page(x, cache.codec, 16, 64) for x in blobs)
    assert float((old.k != new.k).float().mean()) < 1e-2  # the fold sums in another order
    assert torch.equal(old.v, new.v)
