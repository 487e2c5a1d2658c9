"""Attention over latents, the coding itself, and its pages: every body, mask, codec and shape."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessella import _native, ops
from tessella.formats_mla import MLACache, MLACodec
from tessella.layout_mla import LatentCodes, pack_latents, unpack_latents
from tessella.ref import mla as ref
from tessella.testing.attention import make_batch
from tessella.testing.force import environment, force, runnable
from tessella.testing.metrics import relative_diff
from tessella.testing.poison import assert_untouched, poisoned_output

native = pytest.mark.skipif(not _native.HAS_OPS, reason="needs compiled kernels")
KERNELS = [k for k in runnable("mla") if not k.endswith("bf16") or _native._C.cpu_isa().get("bf16")]
CODECS = ["int4", "int8", "bf16", "fp16", "fp32", "int4-rint8", "int8-rfp32", "bf16-rint8"]
SHAPES = [  # H, L, R, Z, dtype
    (28, 128, 64, 16, torch.bfloat16),
    (7, 192, 32, 48, torch.float32),
    (40, 64, 128, 16, torch.float16),
    (1, 448, 0, 64, torch.float32),
    (10, 512, 64, 32, torch.bfloat16),
]
Q_LEN, KV_LEN = [1, 0, 5, 3, 1, 9, 2, 0], [300, 0, 5, 200, 1, 130, 64, 17]
MIXED = ["full", "causal", "window", "tree", "tree", "tree", "causal", "full"]

# |x - y|^2 / (|x|^2 + |y|^2) with exact attention over the same codes. "codes" quantises queries
# and probabilities to 8 bits: 1e-2 relative (csrc/mla/README.md); the others only round.
DIFF = {"codes": 5e-5, "bf16": 3e-5, "tile": 4e-6}
LSE = {"codes": 5e-2, "bf16": 2e-2, "tile": 1e-4}


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fill(cache, batch, kv_len, dtype, g, scale=1.0):
    """Append random latents and rope keys of every request."""
    for b, n in enumerate(kv_len):
        pos = torch.arange(n)
        slots = batch.block_table[b, pos // cache.Z].long() * cache.Z + pos % cache.Z
        x = (torch.randn(n, cache.L + cache.R, generator=g) * scale).to(dtype)
        ops.mla_append(x[:, : cache.L], x[:, cache.L :], slots, cache)


def problem(codec, H, L, R, Z, dtype, mask=None, q_len=Q_LEN, kv_len=KV_LEN):
    """(q, q_rope, cache, batch); what may not be read is NaN."""
    g = gen()
    batch, P = make_batch(q_len, kv_len, Z, g, mask)
    cache = MLACache.empty(P, Z, L, R, MLACodec.parse(codec))
    cache.blob.fill_(255)  # NaN in every float format; -1 and 7 as codes
    fill(cache, batch, kv_len, dtype, g)
    q = torch.randn(sum(q_len), H, L + R, generator=g).to(dtype)
    return q[..., :L], q[..., L:], cache, batch


def assert_close(got, want, tile):
    (o, lse), (wo, wl) = got, want
    assert torch.equal(torch.isnan(o), torch.isnan(wo))
    diff = relative_diff(o.nan_to_num(), wo.nan_to_num())
    assert diff <= DIFF[tile], f"{diff:.2e} > {DIFF[tile]:.0e}"
    dead = wl == -torch.inf
    assert torch.equal(lse == -torch.inf, dead) and not o[dead].any()
    assert float((lse - wl)[~dead].nan_to_num().abs().max()) < LSE[tile]


@functools.cache
def parity_cases(codec):
    """(arguments, plan, keyword arguments, reference) of every shape."""
    cases = []
    for H, L, R, Z, dtype in SHAPES:
        args = problem(codec, H, L, R, Z, dtype, MIXED if H != 7 else None)
        how = {"scale": (L + R) ** -0.5, "window": 20, "softcap": 5.0 if H in (28, 1) else 0.0}
        how["sinks"] = torch.randn(H, generator=gen(1)) if H in (28, 40) else None
        plan = ops.msm_plan(args[3], H, 1, window=20, units=9)
        cases.append((args, plan, how, ref.mla_decode(*args, **how)))
    return cases


@native
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_parity(kernel, codec):
    tile = kernel.split(".")[-1]
    for args, split, how, want in parity_cases(codec):
        with force(kernel):
            for plan in (None, split):
                assert_close(ops.mla_decode(*args, plan=plan, lse=True, **how), want, tile)


@native
@pytest.mark.parametrize("kernel", [k for k in KERNELS if ".scalar." not in k])
@pytest.mark.parametrize("H", [2, 3, 5, 6, 8, 13, 14, 16, 20, 32, 64, 127, 128])
def test_any_number_of_heads(kernel, H):
    args = problem("int4", H, 64, 32, 16, torch.float32, None, [2], [67])
    with force(kernel):
        got = ops.mla_decode(*args, scale=0.1, lse=True)
    assert_close(got, ref.mla_decode(*args, scale=0.1), kernel.split(".")[-1])


@native
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("codec", ["int4", "bf16"])
def test_split_and_unsplit_agree(kernel, codec):
    mask = ["causal", "window", "tree"]
    *q, cache, batch = problem(
        codec, 5, 64, 32, 16, torch.float32, mask, q_len=[3, 9, 36], kv_len=[2000, 700, 900]
    )
    results = []
    with force(kernel):
        for units, split in ((1, 0), (64, 0), (1, 256), (5, 512)):
            plan = ops.msm_plan(batch, 5, 1, window=333, units=units, split=split)
            results.append(
                ops.mla_decode(*q, cache, batch, scale=0.1, window=333, plan=plan, lse=True)
            )
    for got in results[1:]:
        assert_close(got, results[0], kernel.split(".")[-1])


@native
def test_a_fixed_split_does_not_see_neighbours():
    """One request alone and among others: bit for bit the same with a fixed split."""
    lengths = [700, 33, 1500]
    q, q_rope, cache, batch = problem(
        "int4", 10, 128, 64, 16, torch.bfloat16, None, [1] * 3, lengths
    )
    plan = ops.msm_plan(batch, 10, 1, split=256)
    together = ops.mla_decode(q, q_rope, cache, batch, scale=0.1, plan=plan)
    for b in range(3):
        one = type(batch)(
            batch.block_table[b : b + 1], torch.tensor([0, 1]).int(), batch.kv_len[b : b + 1]
        )
        plan = ops.msm_plan(one, 10, 1, split=256)
        alone = ops.mla_decode(q[b : b + 1], q_rope[b : b + 1], cache, one, scale=0.1, plan=plan)
        assert torch.equal(alone[0], together[b])


@native
def test_integer_products_are_exact():
    """With queries that are INT8 already and one token, nothing is rounded but the result."""
    g, L, R, Z = gen(), 64, 32, 16
    batch, P = make_batch([1], [1], Z, g)
    for codec, most in (("int4", 7), ("int8", 127)):
        cache = MLACache.empty(P, Z, L, R, MLACodec.parse(codec))
        x = torch.randint(-most, most + 1, (1, L), generator=g).float()
        x[0, 0] = most
        rope = torch.randint(-8, 9, (1, R), generator=g).float()
        ops.mla_append(x, rope, batch.block_table[0, :1].long() * Z, cache)
        q = torch.randint(-127, 128, (1, 1, L), generator=g).float()
        q[..., 0] = 127
        q_rope = torch.randint(-8, 9, (1, 1, R), generator=g).float()
        want = float(((q[0, 0] * x[0]).sum() + (q_rope[0, 0] * rope[0]).sum()).double() * 2**-12)
        for kernel in (k for k in KERNELS if k.endswith("codes")):
            with force(kernel):
                out, lse = ops.mla_decode(q, q_rope, cache, batch, lse=True, scale=2.0**-12)
            assert abs(float(lse) - want) < 1e-6 * max(1, abs(want)), (codec, kernel)
            assert float((out[0, 0] - x[0]).abs().max()) <= 2**-18 * most, (codec, kernel)


def awkward(x):
    """Zeros, tiny and huge vectors, infinities and NaN, in tokens 3 to 10."""
    x[3] = 2.5
    x[4] = 0
    x[5, 3], x[6, 2], x[7, 0] = torch.nan, torch.inf, -torch.inf
    x[8] *= 1e-9
    x[9] *= 1e6
    x[10, 1] = 3e38


@native
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("L, R, Z", [(64, 32, 16), (320, 0, 48), (128, 128, 32)])
def test_append_gives_the_bytes_of_the_reference(codec, L, R, Z):
    g, T, P, c = gen(2), 70, 8, MLACodec.parse(codec)
    got, want = (MLACache.empty(P, Z, L, R, c) for _ in range(2))
    x, rope = torch.randn(T, L, generator=g), torch.randn(T, R, generator=g)
    awkward(x)
    if R:
        awkward(rope)
    slots = torch.arange(T)
    slots[20], slots[21], slots[22] = -1, P * Z, -5
    rotation = torch.rand(T, R // 2, generator=g), torch.rand(T, R // 2, generator=g)
    for rot in (rotation, None):
        ops.mla_append(x, rope, slots, got, rot)
        ref.mla_append(x, rope, slots, want, rot)
        a, b = (unpack_latents(t.blob, c, Z, L, R) for t in (got, want))
        for name in LatentCodes.__dataclass_fields__:
            old, new = getattr(a, name), getattr(b, name)
            if old is not None and old.is_floating_point():
                assert torch.equal(old.isnan(), new.isnan())
                old, new = old.nan_to_num(), new.nan_to_num()
            assert old is None or torch.equal(old, new), name
    before = got.blob.clone()
    with environment(DEBUG="1"), pytest.raises(RuntimeError, match="slots: expected -1"):
        ops.mla_append(x, rope, slots, got)
    assert torch.equal(got.blob, before)


@native
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9),
    st.sampled_from(["int4", "int8", "int8-rint8", "bf16"]),
    st.sampled_from([64, 128, 192]),
    st.sampled_from([0, 32, 64]),
    st.integers(0, 2**31),
)
def test_append_of_anything(T, codec, L, R, seed):
    """Bytes as the reference's for any rows, slots and strides."""
    g, Z = gen(seed), 16
    x = torch.randn(T, L + R + 3, generator=g) * 10 ** (torch.rand(T, 1, generator=g) * 12 - 6)
    slots = torch.randperm(4 * Z, generator=g)[:T] - 1
    got, want = (MLACache.empty(3, Z, L, R, MLACodec.parse(codec)) for _ in range(2))
    ops.mla_append(x[:, :L], x[:, L : L + R], slots, got)
    ref.mla_append(x[:, :L], x[:, L : L + R], slots, want)
    assert torch.equal(got.blob, want.blob)


@pytest.mark.parametrize("qmax, limit", [(127, 0.012), (7, 0.14)])
def test_the_error_of_coding(qmax, limit):
    """Half a step at most, and a few percent of a Gaussian vector."""
    x = torch.randn(500, 128, generator=gen(6)) * 3
    codes, s = ref.quantise(x, qmax)
    real = codes.double() * s[:, None].double()
    assert bool(((real - x).abs() <= s[:, None].double() * 0.51).all())
    assert float((real - x).norm() / x.norm()) < limit


@native
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("codec", ["int4", "bf16"])
def test_a_nan_token_spoils_only_what_sees_it(kernel, codec):
    q, q_rope, cache, batch = problem(
        codec, 3, 64, 32, 16, torch.float32, None, q_len=[8, 2], kv_len=[40, 40]
    )
    x = torch.randn(1, 64)
    x[0, 5] = torch.inf
    slot = batch.block_table[0, 34 // 16].long() * 16 + 34 % 16
    ops.mla_append(x, torch.zeros(1, 32), slot[None], cache)
    with force(kernel):
        out = ops.mla_decode(q, q_rope, cache, batch, scale=0.1)
    bad = torch.isnan(out).any(-1).any(-1)
    assert bool(bad[2:8].all()) and not bad[8:].any()
    if codec == "int4":  # plain numbers: 0 * inf may spoil the rest of a tile
        assert not bad[:2].any()


@native
@pytest.mark.parametrize("kernel", KERNELS)
def test_non_finite_queries(kernel):
    q, q_rope, cache, batch = problem("int4", 4, 64, 32, 16, torch.float32)
    q, q_rope = q.clone(), q_rope.clone()
    q[0, 1, 5], q[3, 2, 0], q_rope[4, 0, 1] = torch.inf, torch.nan, torch.nan
    with force(kernel):
        out = ops.mla_decode(q, q_rope, cache, batch, scale=0.1)
    bad = torch.isnan(out).any(-1)
    assert bad.nonzero().tolist() == [[0, 1], [3, 2], [4, 0]]


@native
def test_nothing_but_the_result_is_written():
    q, q_rope, cache, batch = problem("int4", 7, 64, 32, 16, torch.float32, MIXED)
    out, around = poisoned_output(q)
    before = cache.blob.clone()
    how = {"scale": 0.1, "window": 20, "lse": True}
    got, lse = ops.mla_decode(q, q_rope, cache, batch, out=out, **how)
    assert got is out and torch.isfinite(out).all()
    assert_untouched(around)
    assert torch.equal(cache.blob, before)
    again = ops.mla_decode(q.contiguous(), q_rope.contiguous(), cache, batch, **how)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@native
def test_no_tokens_at_all():
    for q_len, kv_len in (([], []), ([0, 0], [5, 0])):
        q, q_rope, cache, batch = problem("int4", 3, 64, 32, 16, torch.float32, None, q_len, kv_len)
        out, lse = ops.mla_decode(q, q_rope, cache, batch, scale=1.0, lse=True)
        assert out.shape == (0, 3, 64) and lse.shape == (0, 3)
    ops.mla_append(torch.zeros(0, 64), torch.zeros(0, 32), torch.zeros(0).long(), cache)


def bad_calls():
    """(what, keyword arguments that are changed, part of the message)."""
    return [
        ("codec", {"codec": "int5"}, "codec: expected int4, int8.*got 'int5'"),
        ("rope codec", {"codec": "int8-rint4"}, "codec: expected int4.*got 'int8-rint4'"),
        ("trailing", {"codec": "int4x"}, "codec: expected int4"),
        ("other codec", {"codec": "int8"}, "pages: expected contiguous uint8"),
        ("page size", {"Z": 24}, "Z: expected a multiple of 16 in 16..256.*got 24"),
        ("rank", {"q": torch.zeros(21, 7, 96)}, "L: expected .* 64..512, got 96"),
        ("high rank", {"q": torch.zeros(21, 7, 576)}, "64..512, got 576"),
        ("rope", {"q_rope": torch.zeros(21, 7, 48)}, "R: expected .* 32 in 0..128, got 48"),
        ("heads differ", {"q_rope": torch.zeros(21, 8, 32)}, "q_rope: expected"),
        ("dtypes differ", {"q_rope": torch.zeros(21, 7, 32).half()}, "q_rope: expected"),
        ("heads", {"q": torch.zeros(21, 129, 64), "q_rope": torch.zeros(21, 129, 32)},
         "1..128 heads, got 129"),
        ("table", {"block_table": torch.full((8, 20), 99, dtype=torch.int32)}, "pages 0.."),
        ("lengths", {"kv_len": torch.zeros(7, dtype=torch.int32)}, "kv_len: expected"),
        ("plan", {"plan": torch.zeros(20, dtype=torch.int32)}, "plan: expected a plan"),
        ("sinks", {"sinks": torch.zeros(3)}, "sinks: expected"),
    ]  # fmt: skip


@native
@pytest.mark.parametrize("what, change, message", bad_calls(), ids=lambda x: x if x else "")
def test_bad_input_is_refused_before_any_work(what, change, message):
    q, q_rope, cache, b = problem("int4", 7, 64, 32, 16, torch.float32, None)
    names = "q q_rope pages codec Z block_table cu_q kv_len mask tree_bits tree_row scale window"
    names += " softcap sinks plan max_kv_len"
    args = dict.fromkeys(names.split()) | {f: getattr(b, f) for f in vars(b)}
    args |= {"q": q, "q_rope": q_rope, "pages": cache.blob, "codec": "int4", "Z": 16}
    args |= {"scale": 0.1, "window": 20, "softcap": 0.0, "max_kv_len": 0} | change
    out, around = poisoned_output(args["q"])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tessella.mla_decode_out(*(args[n] for n in names.split()), out, None)
    assert_untouched(around)
    assert bool(out.isnan().all())


@native
def test_appends_refuse_what_does_not_fit():
    cache = MLACache.empty(2, 16, 64, 32, MLACodec())
    x, rope, slots = torch.zeros(3, 64), torch.zeros(3, 32), torch.arange(3)
    angle = torch.zeros(3, 8)
    for args, message in [
        ((x, rope[:2], slots, cache), r"rope: expected \[T, n\]"),
        ((x, rope, slots.int(), cache), "slots: expected contiguous int64"),
        ((x[:, :32], rope, slots, cache), "L: expected .* got 32"),
        ((torch.zeros(3, 128), rope, slots, cache), "pages: expected"),
        ((x, rope.bfloat16(), slots, cache), "rope: expected"),
        ((x, rope, slots, cache, (angle, angle)), r"cos: expected contiguous float32 \[3, 16\]"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.mla_append(*args)
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.mla_append(x.requires_grad_(), rope, slots, cache)
    assert not cache.blob.any()


@native
def test_opcheck_fake_and_compile():
    q, q_rope, cache, b = problem("int4", 4, 64, 32, 16, torch.float32, MIXED)
    fields = (b.block_table, b.cu_q, b.kv_len, b.mask, b.tree_bits, b.tree_row)
    args = (q, q_rope, cache.blob, "int4", 16, *fields, 0.125, 20, 0.0, None, None, 0)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.tessella.mla_decode.default, (*args, True), test_utils=checks)
    out = (torch.empty(q.shape), torch.empty(q.shape[:2]))
    op = torch.ops.tessella.mla_decode_out.default
    torch.library.opcheck(op, (*args, *out), test_utils=checks)
    x, rope = torch.randn(3, 64), torch.randn(3, 32)
    append = (x, rope, torch.arange(3), None, None, "int4", 16, cache.blob)
    torch.library.opcheck(torch.ops.tessella.mla_append.default, append, test_utils=checks)

    def attend(q):
        return ops.mla_decode(q * 2, q_rope, cache, b, scale=0.1, window=20) + 1

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q), attend(q))


@native
def test_the_stand_in_agrees():
    from tessella.ops import mla

    q, q_rope, cache, b = problem("int4", 7, 64, 32, 16, torch.float32)
    batch = (b.block_table, b.cu_q, b.kv_len, None, None, None, 0.125, 0, 0.0, None, None, 0)
    args = (q, q_rope, cache.blob, "int4", 16, *batch, True)
    assert_close(torch.ops.tessella.mla_decode(*args), mla._ref_decode(*args), "codes")
    out, lse = torch.empty(q.shape), torch.empty(q.shape[:2])
    mla._ref_decode_out(*args[:-1], out, lse)
    assert_close((out, lse), mla._ref_decode(*args), "tile")


# --- pages


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("L, R, Z", [(64, 0, 16), (192, 32, 48), (512, 64, 64)])
def test_both_layouts_agree(codec, L, R, Z):
    c, g = MLACodec.parse(codec), gen(3)
    assert c.name == codec
    blob = torch.randint(0, 256, (2, c.page_bytes(Z, L, R)), generator=g, dtype=torch.uint8)
    blob |= 17  # no code -8, which nothing writes
    codes = unpack_latents(blob, c, Z, L, R)
    assert torch.equal(pack_latents(codes, c), blob) and blob.shape[1] % Z == 0
    if _native._C is None:
        return
    args = (c.latent_bits, c.rope_bits, Z, L, R)
    assert _native._C.mla_bytes(args) == blob.shape[1]
    bytes_ = blob[0].tolist()
    for t in (0, 1, 15, Z - 1):
        for d in range(0, L, 7):
            byte, shift, rope, scale, rope_scale = _native._C.mla_slots(args, t, d)
            if c.latent_bits == 4:
                assert (bytes_[byte] >> shift & 15) - 8 == codes.latents[0, t, d]
            else:
                assert bytes_[byte] == codes.latents[0, t, d : d + 1].view(torch.uint8)[0]
            if d < R:
                assert bytes_[rope] == codes.rope[0, t, d : d + 1].view(torch.uint8)[0]
        for at, part in ((scale, codes.scales), (rope_scale, codes.rope_scales)):
            if part is not None:
                assert bytes_[at] == part[0, t : t + 1].view(torch.uint8)[0]


@pytest.mark.parametrize("name", ["", "int", "int4-", "int4-r", "int4-rint4", "bf16x", "int4-rx"])
def test_unknown_codecs_are_refused(name):
    with pytest.raises(ValueError, match=r"codec|rope"):
        MLACodec.parse(name)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MLACache.empty(1, 16, 96, 32, MLACodec()), r"64\.\.512, got 96"),
        (lambda: MLACache.empty(1, 16, 1024, 32, MLACodec()), r"64\.\.512, got 1024"),
        (lambda: MLACache.empty(1, 16, 64, 48, MLACodec()), r"0\.\.128, got 48"),
        (lambda: MLACache.empty(1, 20, 64, 32, MLACodec()), "got 20"),
        (lambda: MLACache(torch.zeros(2, 9).byte(), MLACodec(), 16, 64, 32), "blob"),
        (lambda: MLACodec("int3"), "latent: expected one of int4"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
