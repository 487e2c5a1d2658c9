"""The fused producers: the same codes as the torch modules they replace, followed by act_quant."""

from __future__ import annotations

import importlib

import pytest
import torch

from tessella import _native, ops
from tessella.formats import ActBlocks
from tessella.ops.act_quant import empty_blocks
from tessella.ref import act_quant as ref
from tessella.ref.w4ax_gemm import act_codes
from tessella.testing.cases import random_activations
from tessella.testing.force import force, runnable
from tessella.testing.poison import assert_untouched, guarded

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
stand_ins = importlib.import_module("tessella.ops.act_quant")
KERNELS = runnable("act_quant") or [""]
pytestmark = pytest.mark.skipif(not _native.HAS_OPS, reason="needs the compiled kernels")


def assert_nearly_same_codes(got, want):
    """Codes may differ by one where a sum or an exponential rounded the other way, rarely."""
    difference = (act_codes(got).int() - act_codes(want).int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 2e-3
    assert torch.equal(got.sums, act_codes(got).int().view(got.M, -1, 128).sum(2).T)
    assert torch.allclose(got.scales, want.scales, rtol=1e-2, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", (False, True))
def test_rms_norm(kernel, dtype, residual, rng):
    for M, K in ((1, 127), (5, 1024), (3, 300)):
        x = random_activations(M, K, dtype, rng)
        r = random_activations(M, K, dtype, rng) if residual else None
        w = (torch.rand(K, generator=rng) + 0.5).to(dtype)
        with force(kernel):
            blocks, y, h = ops.rms_norm_quant(x, w, 1e-5, r)
        want_y, want_h = ref.rms_norm(x, w, 1e-5, r)
        assert torch.equal(h, want_h)
        # two roundings, so a flip of the first can show as two steps
        step = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-5}[dtype]
        assert torch.allclose(y.float(), want_y.float(), rtol=step, atol=1e-6)
        assert (y != want_y).float().mean() < (2e-3 if dtype != torch.float32 else 1.1)
        assert_nearly_same_codes(blocks, ref.act_quant(want_y))
        assert torch.equal(act_codes(blocks), act_codes(ref.act_quant(y)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k8,granularity", ((-1, "token"), (128, "class"), (128, "block")))
def test_silu_mul(kernel, dtype, k8, granularity, rng):
    for M, K in ((1, 129), (5, 1024), (3, 300)):
        gate, up = (random_activations(M, K, dtype, rng) for _ in range(2))
        with force(kernel):
            got = ops.silu_mul_quant(gate, up, k8=k8, granularity=granularity)
        assert_nearly_same_codes(got, ref.act_quant(ref.silu_mul(gate, up), k8, granularity))


@pytest.mark.parametrize("kernel", KERNELS)
def test_silu_over_its_whole_range(kernel):
    """Large, small, zero and opposite-signed arguments: nothing overflows into NaN."""
    gate = torch.cat([torch.linspace(-120, 120, 500), torch.tensor([0.0, -1e30, 1e30, 1e-30])])
    gate = torch.stack([gate, -gate])
    up = torch.ones_like(gate)
    with force(kernel):
        got = ops.silu_mul_quant(gate[:, :500], up[:, :500], granularity="block")
        inf_free = ops.silu_mul_quant(gate, up, granularity="block")
    assert_nearly_same_codes(got, ref.act_quant(ref.silu_mul(gate, up)[:, :500], -1, "block"))
    assert not bool(inf_free.scales.isnan().any())


@pytest.mark.parametrize("kernel", KERNELS)
def test_strides_permutation_and_memory(kernel, rng):
    wide = random_activations(4, 700, torch.bfloat16, rng)
    gate, up = wide[:, :300], wide[:, 350:650]
    perm = torch.randperm(300, generator=rng).int()
    with force(kernel):
        got = ops.silu_mul_quant(gate, up, perm=perm)
        assert_nearly_same_codes(got, ref.act_quant(ref.silu_mul(gate, up)[:, perm.long()]))
        x, whole = guarded(random_activations(4, 300, torch.bfloat16, rng))
        w, around = guarded(torch.ones(300).bfloat16())
        blocks, y, _ = ops.rms_norm_quant(x, w, 1e-6, up, perm=perm)
        want, _ = ref.rms_norm(x, w, 1e-6, up)
        assert_nearly_same_codes(blocks, ref.act_quant(want[:, perm.long()]))
        assert (y != want).float().mean() < 2e-3
    assert_untouched(whole)
    assert_untouched(around)


def test_non_finite_and_empty_rows():
    x = torch.ones(3, 256)
    x[1, 7] = torch.nan
    blocks, _, _ = ops.rms_norm_quant(x, torch.ones(256), 1e-5)
    assert blocks.scales.isnan().tolist() == [False, True, False]
    up = torch.ones(3, 256)
    up[2, 0] = torch.inf
    assert ops.silu_mul_quant(torch.ones(3, 256), up).scales.isnan().tolist() == [
        False,
        False,
        True,
    ]
    assert ops.silu_mul_quant(x[:0], x[:0]).M == 0
    assert ops.rms_norm_quant(x[:0], torch.ones(256), 1e-5)[1].shape == (0, 256)
    zero, _, _ = ops.rms_norm_quant(torch.zeros(1, 128), torch.ones(128), 1e-5)
    assert zero.scales.tolist() == [0.0] and not bool(zero.codes8.any())


@pytest.mark.parametrize(
    "op,args,text",
    (
        (
            "rms_norm_quant",
            (torch.ones(2, 128), torch.ones(127), 1e-5),
            r"weight: expected .*\[128\]",
        ),
        (
            "rms_norm_quant",
            (torch.ones(2, 128), torch.ones(128).half(), 1e-5),
            r"weight: expected .*float32",
        ),
        (
            "rms_norm_quant",
            (torch.ones(2, 128), torch.ones(128), 1e-5, torch.ones(3, 128)),
            r"residual: expected a tensor like x",
        ),
        (
            "silu_mul_quant",
            (torch.ones(2, 128), torch.ones(2, 127)),
            r"up: expected a tensor like x",
        ),
        ("silu_mul_quant", (torch.ones(128), torch.ones(128)), r"x: expected \[M, K\]"),
    ),
)
def test_bad_input(op, args, text):
    with pytest.raises(RuntimeError, match=rf"tessella::{op}: {text}"):
        getattr(ops, op)(*args)


@pytest.mark.parametrize("native", (True, False))
def test_out_variants(native, rng):
    """The caller's buffers get what the functional ops give, in kernels and references."""
    x, r = (random_activations(5, 300, torch.bfloat16, rng) for _ in range(2))
    w = torch.rand(300, generator=rng).bfloat16()
    how = 128, "class", None
    blocks = empty_blocks(x, 128, "class")
    y, h = torch.empty_like(x), torch.empty_like(x)
    tessella = torch.ops.tessella
    norm, gate = tessella.rms_norm_quant_out, tessella.silu_mul_quant_out
    if not native:
        norm, gate = stand_ins._ref_rms_norm_out, stand_ins._ref_silu_mul_out
    norm(x, w, 1e-5, r, *how, *blocks, y, h)
    want_y, want_h = ref.rms_norm(x, w, 1e-5, r)
    assert torch.equal(h, want_h) and torch.allclose(y.float(), want_y.float(), rtol=2**-6)
    want = ops.act_quant(y, k8=128, granularity="class")
    for got, field in zip(blocks, ("codes8", "codes4", "sums", "scales"), strict=True):
        assert torch.equal(got, getattr(want, field))
    norm(x, w, 1e-5, None, *how, *blocks, None, None)
    assert_nearly_same_codes(
        ActBlocks(*blocks, "class"), ref.act_quant(ref.rms_norm(x, w, 1e-5)[0], 128, "class")
    )
    gate(x, r, *how, *blocks)
    assert_nearly_same_codes(
        ActBlocks(*blocks, "class"), ref.act_quant(ref.silu_mul(x, r), 128, "class")
    )


@pytest.mark.parametrize("residual, text", ((True, "h: expected a tensor"), (False, "got one")))
def test_the_sum_goes_where_there_is_one(residual, text):
    x = torch.ones(2, 128)
    args = (x, torch.ones(128), 1e-5, x.clone() if residual else None, -1, "token", None)
    with pytest.raises(RuntimeError, match=text):
        torch.ops.tessella.rms_norm_quant_out(
            *args, *empty_blocks(x, -1, "token"), None, None if residual else torch.empty_like(x)
        )


def test_opcheck(rng):
    x = random_activations(3, 200, torch.bfloat16, rng)
    w = torch.ones(200).bfloat16()
    for residual in (None, x.clone()):
        args = (x, w, 1e-5, residual, 128, "class", None)
        torch.library.opcheck(torch.ops.tessella.rms_norm_quant.default, args)
    args = (x, x.clone(), -1, "token", None)
    torch.library.opcheck(torch.ops.tessella.silu_mul_quant.default, args)
    blocks = empty_blocks(x, -1, "token")
    args = (x, w, 1e-5, x.clone(), -1, "token", None, *blocks, None, torch.empty_like(x))
    torch.library.opcheck(torch.ops.tessella.rms_norm_quant_out.default, args)
    args = (x, x.clone(), -1, "token", None, *blocks)
    torch.library.opcheck(torch.ops.tessella.silu_mul_quant_out.default, args)
    with pytest.raises(RuntimeError, match="for inference and has no gradient"):
        ops.silu_mul_quant(x.requires_grad_(), x)
