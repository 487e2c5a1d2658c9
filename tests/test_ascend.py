"""The Ascend kernels on the host emulator, compared with the references: strict and random order.

The emulator refuses a kernel that breaks a rule of the hardware (see docs/ascend.md), so each of
these is also a check of flags, bounds and initialisation.
"""

from __future__ import annotations

import pytest
import torch

from ascend_twin import CORES, fields, gemm, ops, pack
from tessella import layout
from tessella.formats import W4Weight
from tessella.ref import act_quant as ref_quant
from tessella.ref import w4ax_gemm as ref_gemm
from tessella.testing.cases import HURTFUL_NK, random_activations, random_weight
from tessella.testing.metrics import assert_gemm_close

SCHEMES = ("channel", "g128", "twolevel")
MODES = {"split": -1, "direct": 0, "widen": -1}  # mode -> k8 of its activations
SEEDS = (-1, 1, 2)  # strict order, and two random ones


def case(M, N, K, scheme, k8, granularity, rng):
    """Activations and a weight that fit."""
    x = random_activations(M, K, torch.bfloat16, rng)
    return ref_quant.act_quant(x, k8, granularity), random_weight(scheme, N, K, rng)


def check(
    M, N, K, scheme, mode, rng, granularity="token", dtype=torch.bfloat16, seeds=SEEDS, cores=CORES
):
    a, w = case(M, N, K, scheme, MODES[mode], granularity, rng)
    bias = torch.randn(N, generator=rng).to(dtype)
    want = ref_gemm.w4ax_gemm(a, w, bias)
    results = [gemm(a, w, bias, dtype, mode, seed, cores) for seed in seeds]
    for seed, y in zip(seeds, results):
        assert_gemm_close(y, want, f"{mode}, order {seed}")
        assert torch.equal(y, results[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("M", [1, 3, 8, 63, 127, 130])
def test_gemm_any_number_of_tokens(M, scheme, mode, rng):
    check(M, 130, 384, scheme, mode, rng)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("NK", [*HURTFUL_NK, (192, 1100), (300, 640)])
def test_gemm_any_shape(NK, scheme, mode, rng):
    check(5, *NK, scheme, mode, rng)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("granularity", ["class", "block"])
def test_gemm_scales_per_class_and_block(granularity, scheme, mode, rng):
    # several tiles on one core, so that each follows another in the same buffers
    check(17, 200, 640, scheme, mode, rng, granularity, torch.float16, cores=1)


@pytest.mark.parametrize("mode", MODES)
def test_gemm_many_tiles_on_one_core_and_on_many(mode, rng):
    a, w = case(140, 320, 512, "twolevel", MODES[mode], "token", rng)
    results = [gemm(a, w, mode=mode, cores=cores) for cores in (1, 2, 5, 24)]
    assert_gemm_close(results[0], ref_gemm.w4ax_gemm(a, w))
    for y in results[1:]:
        assert torch.equal(y, results[0])


@pytest.mark.parametrize("mode", MODES)
def test_gemm_integers_are_exact(mode, rng):
    """With scales of 1 results are integers: every mode gives the same, to the last bit."""
    a, w = case(9, 70, 256, "channel", MODES[mode], "token", rng)
    a.scales.fill_(1.0)
    w = random_weight("channel", 70, 256, rng, unit_scales=True)
    want = ref_gemm.w4ax_gemm(a, w)
    assert torch.equal(gemm(a, w, mode=mode), want.to(torch.bfloat16))


@pytest.mark.parametrize("mode", MODES)
def test_gemm_a_bad_token_stays_alone(mode, rng):
    a, w = case(6, 70, 256, "twolevel", MODES[mode], "token", rng)
    clean = gemm(a, w, mode=mode)
    a.scales[2] = torch.nan
    y = gemm(a, w, mode=mode)
    assert torch.isnan(y[2]).all()
    keep = torch.arange(6) != 2
    assert torch.equal(y[keep], clean[keep])


@pytest.mark.parametrize("mode", ["split", "widen"])
def test_gemm_rows_do_not_depend_on_the_batch(mode, rng):
    """Rows past M are neither read nor written: a token gives the same in every batch."""
    a, w = case(40, 130, 384, "twolevel", -1, "token", rng)
    whole = gemm(a, w, mode=mode)
    for M in (1, 7, 39):
        part = type(a)(a.codes8[:, :M].contiguous(), a.codes4[:, :M].contiguous(),
                       a.sums[:, :M].contiguous(), a.scales[:M].contiguous(), "token")  # fmt: skip
        assert torch.equal(gemm(part, w, mode=mode), whole[:M])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(8))
def test_gemm_random_shapes_and_orders(seed, scheme, mode, rng):
    rng.manual_seed(seed)
    M, N, K = (int(torch.randint(1, most, (), generator=rng)) for most in (200, 400, 1500))
    granularity = ("token", "block")[seed % 2]
    check(M, N, K, scheme, mode, rng, granularity, seeds=(-1, seed, seed + 100, seed + 200))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "M, K, k8, granularity",
    [
        (1, 1, -1, "token"),
        (5, 127, -1, "token"),
        (7, 384, 128, "class"),
        (4, 256, -1, "class"),
        (4, 256, 0, "class"),
        (5, 640, 256, "block"),
        (3, 300, 0, "block"),
        (3, 9000, 0, "token"),
        (2, 8500, 8320, "block"),
    ],
)
def test_act_quant_gives_the_codes_of_the_reference(M, K, k8, granularity, dtype, rng):
    x = random_activations(M, K, dtype, rng)
    if M >= 4:
        x[0] = 0
        x[1, 0], x[2, K - 1] = torch.inf, torch.nan
        x[3] = 1e-7 if dtype == torch.float16 else 1e-38
    want = ref_quant.act_quant(x, k8, granularity)
    for seed in SEEDS:
        got = ops().act_quant(x, k8, granularity, None, CORES, seed)
        for y, name in zip(got, ("codes8", "codes4", "sums", "scales")):
            expected = getattr(want, name)
            assert y.dtype == expected.dtype and y.shape == expected.shape
            nan = torch.isnan(expected.double())
            assert torch.equal(torch.isnan(y.double()), nan), name
            assert torch.equal(y[~nan], expected[~nan]), name


@pytest.mark.parametrize("K, k8", [(1, -1), (127, 0), (300, 128), (9000, 4224)])
def test_act_quant_permutes_channels(K, k8, rng):
    x = random_activations(5, K, torch.bfloat16, rng)
    perm = torch.randperm(K, generator=rng).int()
    want = ref_quant.act_quant(x, k8, "block", perm)
    for seed in SEEDS:
        got = ops().act_quant(x, k8, "block", perm, CORES, seed)
        for y, name in zip(got, ("codes8", "codes4", "sums", "scales")):
            assert torch.equal(y, getattr(want, name)), name


def test_act_quant_permutes_no_longer_than_its_buffer():
    x, perm = torch.zeros(1, 45057, dtype=torch.bfloat16), torch.arange(45057).int()
    with pytest.raises(RuntimeError, match="none for more than 45056 channels on ascend"):
        ops().act_quant(x, -1, "token", perm, 1, -1)
    longest = ops().act_quant(x[:, 1:].contiguous(), -1, "token", perm[:-1].contiguous(), 1, -1)
    assert longest[0].shape == (352, 1, 128)


def test_act_quant_takes_any_stride_of_tokens(rng):
    x = random_activations(6, 300, torch.bfloat16, rng)[::2, :200]
    want = ref_quant.act_quant(x)
    assert torch.equal(ops().act_quant(x, -1, "token", None, CORES, -1)[0], want.codes8)


def test_quantise_then_multiply(rng):
    """The two kernels in a row, as a layer runs them."""
    x = random_activations(33, 300, torch.bfloat16, rng)
    w = random_weight("twolevel", 100, 300, rng)
    a = type(ref_quant.act_quant(x))(*ops().act_quant(x, -1, "token", None, CORES, -1), "token")
    assert_gemm_close(gemm(a, w), ref_gemm.w4ax_gemm(ref_quant.act_quant(x), w))


def test_no_tokens(rng):
    a, w = case(0, 70, 256, "channel", -1, "token", rng)
    assert gemm(a, w).shape == (0, 70)
    x = torch.empty(0, 256, dtype=torch.bfloat16)
    assert ops().act_quant(x, -1, "token", None, 1, -1)[0].shape == (2, 0, 128)


def pack_by_the_drawing(w: W4Weight) -> torch.Tensor:
    """Codes of csrc/layout/w4_cube.h in their blocks, written from its comment, index by index."""
    N, Kp = w.codes.shape[0], w.codes.shape[1] * 2
    panels, blocks = -(-N // 64), Kp // 128
    q = torch.zeros(panels * 64, Kp, dtype=torch.uint8)
    q[:N] = (layout.unpack_nibbles(w.codes) - 8) & 15
    # [panel][16 features: 4][row 16][block][64 channels: 2][nibble 2][byte 32]
    q = q.view(panels, 4, 16, blocks, 2, 2, 32).permute(0, 3, 4, 1, 2, 5, 6)
    both = q[..., 0, :] | q[..., 1, :] << 4  # [panel][block][2][4][16][32]
    return both.reshape(panels, blocks, 4096)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("N, K", [(64, 128), (70, 300), (1, 1)])
def test_packed_codes_are_where_the_drawing_says(N, K, scheme, rng):
    w = random_weight(scheme, N, K, rng)
    blob = pack(w)
    panels, blocks = -(-N // 64), w.codes.shape[1] // 64
    rows = {"channel": 0, "g128": 192, "twolevel": 128}[scheme]
    per_panel = blob.view(panels, -1)[:, : blocks * (4096 + rows)]
    codes = per_panel.reshape(panels, blocks, 4096 + rows)[..., :4096]
    want = pack_by_the_drawing(w)
    features = torch.arange(panels * 64).view(panels, 1, 1, 4, 16, 1) < N
    keep = features.expand(panels, blocks, 2, 4, 16, 32).reshape(panels, blocks, 4096)
    assert torch.equal(codes[keep], want[keep])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pack_and_unpack_are_inverses(scheme, rng):
    w = random_weight(scheme, 130, 384, rng)
    back = [torch.empty_like(t) for t in fields(w)]
    ops().w4_unpack(pack(w), *back, scheme)
    for got, want in zip(back, fields(w)):
        assert torch.equal(got, want)
    assert pack(w).numel() == layout.w4_cpu_bytes(scheme, 130, 384)


REFUSED = [
    (dict(dtype=torch.float32), "dtype: expected bfloat16 or float16 on ascend, got float32"),
    (dict(mode="direct"), "mode: expected split or widen for these activations, got 'direct'"),
    (dict(cores=0), "cores: expected 1..64, got 0"),
]


@pytest.mark.parametrize("arguments, message", REFUSED)
def test_what_the_kernel_does_not_take(arguments, message, rng):
    a, w = case(3, 64, 128, "channel", -1, "token", rng)
    with pytest.raises(RuntimeError, match=message):
        gemm(a, w, **arguments)


def test_schemes_and_mixtures_that_the_kernel_does_not_take(rng):
    a, w = case(3, 64, 256, "g64", -1, "token", rng)
    with pytest.raises(RuntimeError, match="expected channel, g128 or twolevel on ascend"):
        gemm(a, w)
    a, w = case(3, 64, 256, "channel", 128, "class", rng)
    with pytest.raises(RuntimeError, match="activations of one precision on ascend, got K8=128"):
        gemm(a, w)
    with pytest.raises(RuntimeError, match="expected bfloat16 or float16 on ascend"):
        ops().act_quant(torch.zeros(2, 128), -1, "token", None, 1, -1)
