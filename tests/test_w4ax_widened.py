"""What decoding costs: two-level weights as bytes, in the tiles that the packed ones run in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tessella import _native, layout, ops
from tessella.bench import w4ax_gemm_cuda
from tessella.bench.suite import Selection
from tessella.bench.w4ax_gemm_cuda import dequant_share
from tessella.formats import ActBlocks, W4Weight, padded_k
from tessella.ref import act_quant as ref_act
from tessella.ref.w4ax_gemm import w4_dequant
from tessella.testing.cases import random_activations, random_weight
from tessella.testing.force import environment, force
from tessella.testing.poison import assert_untouched, guarded

needs_c = pytest.mark.skipif(_native._C is None, reason="needs the compiled _C module")
probe = torch.ops.tessella._w4ax_gemm_probe
TILES = (64, 128, 256)


def fragments(register: int, thread: int) -> list[tuple[int, int]]:
    """(row, column) of the four bytes of a thread's register: wgmma m64k32, operand A."""
    warp, lane = divmod(thread, 32)
    row = 16 * warp + lane // 4 + (8 if register in (1, 3) else 0)
    column = 4 * (lane % 4) + (16 if register in (2, 3) else 0)
    return [(row, column + b) for b in range(4)]


@pytest.mark.parametrize("N,K", [(64, 128), (70, 200), (130, 384)])
def test_widened_bytes_are_fragment_registers(N, K, rng):
    """What each thread loads is what wgmma wants of q * s1 + a, and the tail holds the scales."""
    w = random_weight("twolevel", N, K, rng)
    Kp, panels = padded_k(K), -(-N // 64)
    blob = layout.w4_widen_cuda(w).view(panels, Kp // 128 * 8192 + 256)
    unit = W4Weight(w.codes, torch.ones(N), w.group_scales, w.zeros, "twolevel", K)
    want = torch.full((panels * 64, Kp), 0)
    want[:N] = (w4_dequant(unit, torch.float64) + 128).long()
    for p in range(panels):
        for block in range(Kp // 128):
            got = blob[p, block * 8192 :][:8192].tolist()
            at = 0
            for step in range(4):
                tile = want[p * 64 : p * 64 + 64, block * 128 + step * 32 :][:, :32].tolist()
                for thread in range(128):
                    for register in range(4):
                        for row, column in fragments(register, thread):
                            assert got[at] == tile[row][column], (p, block, at)
                            at += 1
    scales = blob[:, -256:].contiguous().view(torch.float32).flatten()
    assert torch.equal(scales[:N], w.channel_scales) and not scales[N:].any()


def test_only_two_level_weights_are_widened(rng):
    with pytest.raises(ValueError, match="expected twolevel, got g128"):
        layout.w4_widen_cuda(random_weight("g128", 64, 128, rng))


def test_other_devices_are_refused(rng):
    w = layout.w4_widen_cuda(random_weight("twolevel", 64, 128, rng))
    a = ops.act_quant(torch.randn(3, 128, generator=rng))
    with pytest.raises(RuntimeError, match="_w4ax_gemm_probe: w: expected a tensor on cuda"):
        probe(a.codes8, a.codes4, a.sums, a.scales, w, 64, True)


def test_fake():
    with FakeTensorMode():
        codes8, codes4 = torch.empty(2, 5, 128, dtype=torch.int8), torch.empty(0, 5, 64).byte()
        sums, scales = torch.empty(2, 5, dtype=torch.int32), torch.empty(5)
        y = probe(codes8, codes4, sums, scales, torch.empty(9, dtype=torch.uint8), 70, True)
    assert y.shape == (5, 70) and y.dtype == torch.bfloat16


@needs_c
@given(
    M=st.integers(1, 9000),
    N=st.integers(1, 60000),
    K=st.integers(1, 65536),
    tokens=st.sampled_from((0, *TILES)),
)
@settings(max_examples=200, deadline=None)
def test_both_weights_get_the_same_tiles(M, N, K, tokens):
    """The cut is the choice for packed weights; widened ones fit, in shallower rings."""
    plan = _native._C.plan_w4ax_gemm_sm90
    tile = str(tokens or "")
    coded, wide = (plan(M, N, K, tile=tile, probe=True, wide=w) for w in (False, True))
    assert wide["tokens"] in TILES and tokens in (0, wide["tokens"]) and wide["stream"] == 0
    for key in ("tokens", "features", "split", "whole", "tiles", "grid"):
        assert wide[key] == coded[key], key
    assert 2 <= wide["stages"] <= coded["stages"] and wide["smem"] <= 227 * 1024
    chosen = plan(M, N, K)
    if not tile and chosen["kernel"].endswith(("t64", "t128", "t256")):
        assert coded == chosen


@needs_c
def test_widened_rings_hold_four_stages_or_more():
    """256 tokens: 32 KB of codes and 16 KB of weights a stage."""
    plan = _native._C.plan_w4ax_gemm_sm90
    for tokens, stages, of_coded in ((64, 4, 6), (128, 6, 7), (256, 4, 4)):
        p = plan(4096, 4096, 8192, tile=str(tokens), probe=True, wide=True)
        assert p["stages"] == stages and "weights widened" in p["text"]
        assert plan(4096, 4096, 8192, tile=str(tokens), probe=True)["stages"] == of_coded


def test_share_of_decoding():
    assert dequant_share({"coded_us": 10.0, "widened_us": 8.0}) == {"dequant_share": 0.2}
    assert dequant_share({"coded_us": 8.0, "widened_us": 10.0}) == {"dequant_share": -0.25}
    assert dequant_share({"quant_us": 1.0}) == {}


def test_only_hopper_says_what_decoding_costs(monkeypatch):
    """No pair for few tokens, other schemes, forced kernels, and other GPUs."""
    monkeypatch.delenv("TESSELLA_FORCE", raising=False)
    hopper, other = ["w4ax_gemm.sm90.t64"], ["w4ax_gemm.sm80.plain"]
    monkeypatch.setattr(w4ax_gemm_cuda, "gpu_kernels", lambda family: hopper)
    probed = w4ax_gemm_cuda.probed
    assert probed(64, "twolevel") and not probed(32, "twolevel") and not probed(64, "g128")
    monkeypatch.setenv("TESSELLA_FORCE", "w4ax_gemm.sm90.t64")
    assert not probed(64, "twolevel")
    monkeypatch.delenv("TESSELLA_FORCE")
    monkeypatch.setattr(w4ax_gemm_cuda, "gpu_kernels", lambda family: other)
    assert not probed(64, "twolevel")


# ---------------------------------------------------------------- on a GPU


def on_gpu(M: int, N: int, K: int, rng) -> tuple[tuple, W4Weight]:
    """Activations as the op takes them, and a weight, both on the GPU."""
    a = ref_act.act_quant(random_activations(M, K, torch.float32, rng), padded_k(K), "token")
    w = random_weight("twolevel", N, K, rng)
    moved = W4Weight.from_tensors({n: t.cuda() for n, t in w.tensors().items()}, w.scheme, K)
    return tuple(t.cuda() for t in (a.codes8, a.codes4, a.sums, a.scales)), moved


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", (0, *TILES))
@pytest.mark.parametrize("N", (64, 128, 200, 4608))
@pytest.mark.parametrize("K", (128, 384, 1024))
def test_same_bits_as_packed_weights(tokens, N, K, rng, hopper):
    """Every tile, and the planner's choice (0), against w4ax_gemm on the packed weight."""
    whole, w = on_gpu(300, N, K, rng)
    packed, widened = ops.w4_pack(w), layout.w4_widen_cuda(w)
    want = ops.w4ax_gemm(ActBlocks(*whole, "token"), packed)
    for M in (1, 63, 64, 127, 128, 129, 256, 300):
        acts = (*(t[:, :M].contiguous() for t in whole[:3]), whole[3][:M].contiguous())
        with environment(**({"FORCE": f"w4ax_gemm.sm90.t{tokens}"} if tokens else {})):
            for blob, wide in ((widened, True), (packed.blob, False)):
                got = probe(*acts, blob, N, wide)
                assert torch.equal(got, want[:M]), f"M{M} wide={wide}"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TILES)
def test_many_tiles(tokens, rng, hopper):
    """More tiles than SMs, halves among them; with and without programmatic launch; in a graph."""
    for M, N, K in ((300, 8576, 256), (700, 5768, 128), (1030, 4104, 640)):
        acts, w = on_gpu(M, N, K, rng)
        packed, widened = ops.w4_pack(w), layout.w4_widen_cuda(w)
        want = ops.w4ax_gemm(ActBlocks(*acts, "token"), packed)
        for launch in ("0", "1"):
            with environment(PDL=launch, FORCE=f"w4ax_gemm.sm90.t{tokens}"):
                probe(*acts, widened, N, True)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for _ in range(3):
                        y = probe(*acts, widened, N, True)
            for _ in range(3):
                y.zero_()
                graph.replay()
                assert torch.equal(y, want), f"M{M} N{N} K{K} launch {launch}"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TILES)
def test_only_its_own_memory(tokens, rng, hopper):
    acts, w = on_gpu(131, 200, 640, rng)
    fields = [guarded(t) for t in (*acts, layout.w4_widen_cuda(w))]
    with force(f"w4ax_gemm.sm90.t{tokens}"):
        got = probe(*[f[0] for f in fields], 200, True)
    assert torch.equal(got, ops.w4ax_gemm(ActBlocks(*acts, "token"), ops.w4_pack(w)))
    for _, memory in fields:
        assert_untouched(memory)


@pytest.mark.gpu
def test_a_bench_case_times_both(monkeypatch, hopper):
    monkeypatch.setattr(w4ax_gemm_cuda, "ROTATE_BYTES", 1 << 20)
    monkeypatch.setattr(w4ax_gemm_cuda, "_shape", None)
    for M, has in ((32, False), (64, True), (300, True)):
        case = {"M": M, "N": 384, "K": 512}
        for s in w4ax_gemm_cuda.prepare(case, Selection()).subjects:
            assert ({"coded", "widened"} <= s.parts.keys()) == (has and s.name == "twolevel")
            for i in range(3) if "coded" in s.parts else ():
                want = s.call(i)
                assert torch.equal(s.parts["coded"](i), want)
                assert torch.equal(s.parts["widened"](i), want)


@pytest.mark.gpu
def test_bad_input(rng, hopper):
    acts, w = on_gpu(4, 64, 256, rng)
    widened = layout.w4_widen_cuda(w)
    with pytest.raises(RuntimeError, match=r"w: expected .*16640"):
        probe(*acts, ops.w4_pack(w).blob, 64, True)
    with pytest.raises(RuntimeError, match=r"w: expected .* got .*16640"):
        probe(*acts, widened, 64, False)
    for body in ("sm90.t32", "sm90.t64x192", "sm90.s64", "sm80.plain"):
        kernel = f"w4ax_gemm.{body}"
        with force(kernel), pytest.raises(RuntimeError, match=f"'{kernel}' has no body for"):
            probe(*acts, widened, 64, True)
    mixed = ops.act_quant(torch.randn(4, 256).bfloat16().cuda(), k8=128, granularity="class")
    with pytest.raises(RuntimeError):
        probe(mixed.codes8, mixed.codes4, mixed.sums, mixed.scales, widened, 64, True)
    int4 = ops.act_quant(torch.randn(4, 256).bfloat16().cuda(), k8=0)
    with pytest.raises(RuntimeError, match="activations that are all INT8"):
        probe(int4.codes8, int4.codes4, int4.sums, int4.scales, widened, 64, True)


@pytest.mark.gpu
def test_opcheck(rng, hopper):
    acts, w = on_gpu(70, 200, 384, rng)
    torch.library.opcheck(probe.default, (*acts, layout.w4_widen_cuda(w), 200, True))
