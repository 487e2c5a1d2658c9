"""The fused producers on a GPU: the codes of the CPU reference, whatever the launch looks like."""

from __future__ import annotations

import pytest
import torch

from tessella import ops
from tessella.formats import ActBlocks
from tessella.ops.act_quant import empty_blocks
from tessella.ref import act_quant as ref
from tessella.ref.w4ax_gemm import act_codes
from tessella.testing.cases import random_activations, random_weight
from tessella.testing.force import environment
from tessella.testing.poison import assert_untouched, guarded, poisoned_output

pytestmark = pytest.mark.gpu
FIELDS = ("codes8", "codes4", "sums", "scales")
DTYPES = (torch.bfloat16, torch.float16)
STEP = {torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Two roundings of a result, as one: a flip of the first can show as two steps."""

PRECISIONS = ((-1, "token"), (0, "token"), (128, "class"), (128, "block"), (-1, "block"))
SHAPES = ((1, 127), (3, 200), (5, 1024), (17, 4096), (2, 8192), (65, 520), (3, 14336), (1, 40000))
"""One vector a thread, several, clusters of thread blocks, tails, and too long to be held."""


def on_cpu(a: ActBlocks) -> ActBlocks:
    return ActBlocks(*(getattr(a, f).cpu() for f in FIELDS), a.granularity)


def assert_same(got: ActBlocks, want: ActBlocks) -> None:
    for f in FIELDS:
        g, w = getattr(got, f).cpu(), getattr(want, f).cpu()
        assert torch.equal(g.nan_to_num(-1.0), w.nan_to_num(-1.0)), f


def assert_nearly_same(got: ActBlocks, want: ActBlocks) -> None:
    """Codes may differ, rarely, where a sum or an exponential rounded the other way.

    By one, or by two where both of two roundings to bf16 did. In a single token the norm's
    factor is one number, and all channels with the same mantissa round alike: 1 of 128 flips.
    """
    difference = (act_codes(got).int() - act_codes(want).int()).abs()
    assert int(difference.max()) <= 2 and float((difference > 1).float().mean()) < 1e-3
    assert float((difference > 0).float().mean()) < 1e-2
    assert torch.equal(got.sums, act_codes(got).int().view(got.M, -1, 128).sum(2).T)
    assert torch.allclose(got.scales, want.scales, rtol=1e-2, equal_nan=True)


def operands(M: int, K: int, dtype: torch.dtype, rng) -> tuple[torch.Tensor, ...]:
    """x, residual and norm weight on the GPU."""
    x, residual = (random_activations(M, K, dtype, rng) for _ in range(2))
    weight = (torch.rand(K, generator=rng) + 0.5).to(dtype)
    return x.cuda(), residual.cuda(), weight.cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("k8,granularity", PRECISIONS)
def test_rms_norm(dtype, residual, k8, granularity, rng):
    for M, K in SHAPES:
        if k8 > 0 and k8 >= K:
            continue
        x, r, w = operands(M, K, dtype, rng)
        r = r if residual else None
        blocks, y, h = ops.rms_norm_quant(x, w, 1e-5, r, k8=k8, granularity=granularity)
        args = (x.cpu(), w.cpu(), 1e-5, r.cpu() if residual else None)
        want_y, want_h = ref.rms_norm(*args)
        assert torch.equal(h.cpu(), want_h)
        assert torch.allclose(y.cpu().float(), want_y.float(), rtol=STEP[dtype], atol=1e-6)
        assert float((y.cpu() != want_y).float().mean()) < 2e-2
        assert_same(blocks, ops.act_quant(y.cpu(), k8=k8, granularity=granularity))
        cpu, _, _ = ops.rms_norm_quant(*args, k8=k8, granularity=granularity)
        assert_nearly_same(on_cpu(blocks), cpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k8,granularity", PRECISIONS)
def test_silu_mul(dtype, k8, granularity, rng):
    for M, K in SHAPES:
        if k8 > 0 and k8 >= K:
            continue
        gate, up, _ = operands(M, K, dtype, rng)
        got = on_cpu(ops.silu_mul_quant(gate, up, k8=k8, granularity=granularity))
        want = ref.silu_mul(gate.cpu(), up.cpu())
        assert_nearly_same(got, ref.act_quant(want, k8, granularity))


def test_silu_over_its_whole_range():
    gate = torch.cat([torch.linspace(-120, 120, 500), torch.tensor([0.0, -1e30, 1e30, 1e-30])])
    gate = torch.stack([gate, -gate]).bfloat16().cuda()
    up = torch.ones_like(gate)
    got = ops.silu_mul_quant(gate[:, :500], up[:, :500], granularity="block")
    want = ref.silu_mul(gate[:, :500].cpu(), up[:, :500].cpu())
    assert_nearly_same(on_cpu(got), ref.act_quant(want, -1, "block"))
    everything = ops.silu_mul_quant(gate, up, granularity="block")
    assert not bool(everything.scales.isnan().any())


@pytest.mark.parametrize("K", (2048, 4096, 8192, 14336))
def test_a_token_depends_on_itself_alone(K, rng):
    """Not on the batch, which decides the launch, nor on how the operands lie in memory."""
    M = 300
    x, r, w = operands(M, K, torch.bfloat16, rng)
    norm, y, h = ops.rms_norm_quant(x, w, 1e-6, r)
    gate = ops.silu_mul_quant(x, r)
    plain = ops.act_quant(x)
    wide = torch.empty(M, K + 3, dtype=x.dtype, device="cuda")[:, 1 : K + 1]  # not aligned
    wide.copy_(x)
    again, y2, h2 = ops.rms_norm_quant(wide, w, 1e-6, r)
    assert torch.equal(y2, y) and torch.equal(h2, h)
    assert_same(again, norm)
    assert_same(ops.silu_mul_quant(wide, r), gate)
    for rows in (slice(7, 8), slice(4, 20), slice(100, 160), slice(0, 131)):
        part, y3, _ = ops.rms_norm_quant(x[rows], w, 1e-6, r[rows])
        assert torch.equal(y3, y[rows])
        for small, large in (
            (part, norm),
            (ops.silu_mul_quant(x[rows], r[rows]), gate),
            (ops.act_quant(x[rows]), plain),
        ):
            assert torch.equal(small.codes8, large.codes8[:, rows])
            assert torch.equal(small.sums, large.sums[:, rows])
            assert torch.equal(small.scales, large.scales[rows])


def test_strides_and_permutation(rng):
    wide = random_activations(9, 8300, torch.bfloat16, rng).cuda()
    perm = torch.randperm(300, generator=rng).int().cuda()
    gate, up = wide[::2, :300], wide[::2, 350:650]
    got = ops.silu_mul_quant(gate, up, perm=perm)
    want = ref.silu_mul(gate.cpu(), up.cpu())[:, perm.long().cpu()]
    assert_nearly_same(on_cpu(got), ref.act_quant(want))
    x, whole = guarded(random_activations(5, 300, torch.bfloat16, rng).cuda())
    w, around = guarded(torch.ones(300, device="cuda").bfloat16())
    blocks, y, _ = ops.rms_norm_quant(x, w, 1e-6, up, k8=128, granularity="block", perm=perm)
    assert_same(blocks, ops.act_quant(y.cpu()[:, perm.long().cpu()], k8=128, granularity="block"))
    assert_untouched(whole)
    assert_untouched(around)
    halves = wide[:, :8192].chunk(2, 1)  # what one product for gate and up gives
    assert_same(ops.silu_mul_quant(*halves), ops.silu_mul_quant(*(t.contiguous() for t in halves)))


@pytest.mark.parametrize("M,K", ((3, 300), (33, 520), (2, 14336), (200, 4096)))
def test_out_variants_write_all_and_only_their_tensors(M, K, rng):
    inputs = [guarded(t) for t in operands(M, K, torch.bfloat16, rng)]
    x, r, w = (t[0] for t in inputs)

    def poisoned(*like):
        return [poisoned_output(t) for t in like]

    blocks, y, h = ops.rms_norm_quant(x, w, 1e-5, r, k8=128, granularity="class")
    want = [*(getattr(blocks, f) for f in FIELDS), y, h]
    pairs = poisoned(*want)
    out = torch.ops.tessella.rms_norm_quant_out
    out(x, w, 1e-5, r, 128, "class", None, *(p[0] for p in pairs))
    without_y = poisoned(*want[:4], h)
    args = (x, w, 1e-5, r, 128, "class", None, *(p[0] for p in without_y[:4]), None)
    out(*args, without_y[4][0])
    gate = ops.silu_mul_quant(x, r)
    want_gate = [getattr(gate, f) for f in FIELDS]
    of_gate = poisoned(*want_gate)
    torch.ops.tessella.silu_mul_quant_out(x, r, -1, "token", None, *(p[0] for p in of_gate))
    found = [*pairs, *without_y, *of_gate]
    for (inner, around), expected in zip(found, [*want, *want[:4], h, *want_gate], strict=True):
        assert torch.equal(inner, expected)
        assert_untouched(around)
    for _, whole in inputs:
        assert_untouched(whole)


def test_non_finite_and_empty_rows():
    x = torch.ones(3, 256, device="cuda").half()
    w = torch.ones(256, device="cuda").half()
    x[1, 7] = torch.nan
    blocks, _, _ = ops.rms_norm_quant(x, w, 1e-5)
    assert blocks.scales.isnan().tolist() == [False, True, False]
    assert ops.rms_norm_quant(x[:0], w, 1e-5)[1].shape == (0, 256)
    assert ops.silu_mul_quant(x[:0], x[:0]).M == 0
    zero, _, _ = ops.rms_norm_quant(torch.zeros_like(x), w, 1e-5)
    assert not bool(zero.scales.any()) and not bool(zero.codes8.any())


def test_bad_input():
    x, w = torch.ones(2, 128, device="cuda").half(), torch.ones(128, device="cuda").half()
    with pytest.raises(RuntimeError, match="x: expected bfloat16 or float16 on cuda"):
        ops.rms_norm_quant(x.float(), w.float(), 1e-5)
    with pytest.raises(RuntimeError, match=r"weight: expected .*on cuda, got .*on cpu"):
        ops.rms_norm_quant(x, w.cpu(), 1e-5)
    with pytest.raises(RuntimeError, match="up: expected a tensor like x"):
        ops.silu_mul_quant(x, x.cpu())
    blocks = empty_blocks(x, -1, "token")
    for residual, h, text in ((x, None, r"x \+ residual, got none"), (None, x, "got one")):
        with pytest.raises(RuntimeError, match=f"h: expected .*{text}"):
            torch.ops.tessella.rms_norm_quant_out(
                x, w, 1e-5, residual, -1, "token", None, *blocks, None, h
            )


def test_opcheck_and_compile(rng):
    x, r, w = operands(3, 200, torch.bfloat16, rng)
    tessella = torch.ops.tessella
    for residual in (None, r):
        args = (x, w, 1e-5, residual, 128, "class", None)
        torch.library.opcheck(tessella.rms_norm_quant.default, args)
        blocks = empty_blocks(x, 128, "class")
        h = None if residual is None else torch.empty_like(x)
        outs = (*args, *blocks, torch.empty_like(x), h)
        torch.library.opcheck(tessella.rms_norm_quant_out.default, outs)
    torch.library.opcheck(tessella.silu_mul_quant.default, (x, r, -1, "token", None))
    blocks = empty_blocks(x, -1, "token")
    torch.library.opcheck(tessella.silu_mul_quant_out.default, (x, r, -1, "token", None, *blocks))

    @torch.compile(fullgraph=True)
    def f(x, r):
        *blocks, y, h = tessella.rms_norm_quant(x * 2, w, 1e-5, r, -1, "token", None)
        return blocks[0], tessella.silu_mul_quant(y, h, -1, "token", None)[0] + 0

    blocks, y, h = ops.rms_norm_quant(x * 2, w, 1e-5, r)
    got = f(x, r)
    assert torch.equal(got[0], blocks.codes8)
    assert torch.equal(got[1], ops.silu_mul_quant(y, h).codes8)


def layer(x, r, norm, packed, N):
    """norm -> product -> gate -> product, as a model runs them."""
    a, _, h = ops.rms_norm_quant(x, norm, 1e-5, r)
    gate_up = ops.w4ax_gemm(a, packed[0])
    y = ops.w4ax_gemm(ops.silu_mul_quant(*gate_up.view(-1, 2 * N).chunk(2, 1)), packed[1])
    return y, h


@pytest.mark.parametrize("M", (1, 16, 70))
def test_chains_keep_their_order(M, rng):
    """Programmatic launch gives what plain launches give: in graphs, streams, behind slow work."""
    K, N = 1024, 1536
    x, r, norm = operands(M, K, torch.bfloat16, rng)
    weights = [random_weight("twolevel", 2 * N, K, rng), random_weight("twolevel", K, N, rng)]
    weights = [type(w).from_tensors(_cuda(w.tensors()), w.scheme, w.K) for w in weights]
    packed = [ops.w4_pack(w) for w in weights]
    with environment(PDL="0"):
        want = [(x, r)]
        for _ in range(4):
            want.append(layer(*want[-1], norm, packed, N))
        torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        got = x * 1, r * 1
        for i in range(4):
            # weights packed in this stream just before the layer that reads them
            fresh = [ops.w4_pack(w) for w in weights]
            got = layer(*got, norm, fresh, N)
            assert torch.equal(got[0], want[i + 1][0]) and torch.equal(got[1], want[i + 1][1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = x, r
        for _ in range(4):
            captured = layer(*captured, norm, packed, N)
    for _ in range(10):
        captured[0].zero_()
        graph.replay()
        assert torch.equal(captured[0], want[-1][0]) and torch.equal(captured[1], want[-1][1])


def _cuda(tensors):
    return {name: t.cuda() for name, t in tensors.items()}
