"""Pages of E4M3 numbers: every number, appends, attention on every body, and in a model's cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_cases import MIXED, assert_close, gen, options, paged_problem
from tessella import ops
from tessella.formats_kv import KVPages, MsmBatch, as_stored
from tessella.quant.kv import parse
from tessella.ref import msm as ref
from tessella.testing.force import force, gpu_kernels, runnable

E4M3 = torch.float8_e4m3fn
HEADS = [(8, 2, 64, 16), (4, 4, 80, 32), (7, 1, 96, 64), (8, 2, 128, 16), (2, 1, 256, 48)]
# |x - y|^2 / (|x|^2 + |y|^2): rounding of the result, and on a GPU of queries and probabilities to
# fp16
DIFF = {torch.float32: 1e-12, torch.float16: 4e-7, torch.bfloat16: 4e-6}
CPU = [k for k in runnable("msm") if k.endswith("tile")]
GPU = [
    pytest.param(("cuda", torch.bfloat16), marks=pytest.mark.gpu),
    pytest.param(("cuda", torch.float16), marks=pytest.mark.gpu),
]


def problem(H, J, D, Z, dtype):
    """(q, pages, batch, keyword arguments, reference); what nothing may read is NaN."""
    mask = MIXED if D != 80 else None
    q, pages, batch = paged_problem(H, J, D, Z, torch.float32, mask)
    q, pages, how = q.to(dtype), pages.to(E4M3), options(H, D)
    return q, pages, batch, how, ref.msm_attn(q, pages, batch, **how)


def attend(q, pages, batch, device="cpu", plan=None, **how):
    there = MsmBatch(*(None if t is None else t.to(device) for t in vars(batch).values()))
    how = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in how.items()}
    plan = None if plan is None else plan.to(device)
    out = ops.msm_attn(q.to(device), KVPages(pages.to(device)), there, plan=plan, lse=True, **how)
    return tuple(t.cpu() for t in out)


@pytest.mark.parametrize("H, J, D, Z", HEADS)
@pytest.mark.parametrize("dtype", DIFF, ids=str)
@pytest.mark.parametrize("kernel", CPU or [""])
def test_attention(kernel, dtype, H, J, D, Z):
    q, pages, batch, how, want = problem(H, J, D, Z, dtype)
    with force(kernel):
        for split in (0, 256):
            plan = ops.msm_plan(batch, H, J, window=20, units=3, split=split)
            assert_close(attend(q, pages, batch, plan=plan, **how), want, DIFF[dtype])


@pytest.mark.parametrize("H, J, D, Z", HEADS)
@pytest.mark.parametrize("where", GPU, ids=str)
def test_attention_on_a_gpu(where, H, J, D, Z):
    device, dtype = where
    q, pages, batch, how, want = problem(H, J, D, Z, dtype)
    plans = [ops.msm_plan(batch, H, J, window=20, units=u, split=s) for u, s in ((9, 0), (3, 256))]
    for plan in (None, *plans):
        assert_close(attend(q, pages, batch, device, plan, **how), want, DIFF[dtype])


@pytest.mark.gpu
def test_many_rows_and_large_queries_on_a_gpu():
    """Prompts in parts, groups of 8 to 32 rows, and queries beyond fp16's range."""
    for D, q_len in ((128, [600, 1]), (64, [1] * 2), (128, [2, 9]), (256, [40, 3])):
        q, pages, batch = paged_problem(8, 2, D, 64, torch.float32, None, q_len, [700, 900])
        q, pages = (q * 1e5).bfloat16(), pages.to(E4M3)
        how = {"scale": 1e-5 * D**-0.5}
        want = ref.msm_attn(q, pages, batch, **how)
        for units in (1, 100):
            plan = ops.msm_plan(batch, 8, 2, units=units)
            assert_close(attend(q, pages, batch, "cuda", plan, **how), want, DIFF[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.skipif(not gpu_kernels("msm"), reason="needs a build with CUDA")
def test_the_hopper_body_refuses():
    q, pages, batch, how, _ = problem(8, 2, 128, 16, torch.bfloat16)
    if "msm.sm90.t128" in gpu_kernels("msm"):
        with force("msm.sm90.t128"), pytest.raises(RuntimeError, match="cannot run this problem"):
            attend(q, pages, batch, "cuda", **how)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_every_number_is_read(device):
    """A lone key's value is the result, so each of the 256 bytes shows what it stands for."""
    D, Z = 256, 16
    pages = torch.zeros(1, 1, 2, Z, D, dtype=torch.uint8)
    pages[0, 0, 1, 0] = torch.arange(256, dtype=torch.uint8)
    batch = MsmBatch(torch.zeros(1, 1).int(), torch.tensor([0, 1]).int(), torch.tensor([1]).int())
    q = torch.zeros(1, 1, D, dtype=torch.bfloat16)
    out, _ = attend(q, pages.view(E4M3), batch, device)
    want = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    assert torch.equal(out[0, 0].float().isnan(), want.isnan())
    assert torch.equal(out[0, 0].float().nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DIFF, ids=str)
@pytest.mark.parametrize("D, R", [(64, 64), (80, 32), (128, 0)])
def test_append(device, dtype, D, R):
    P, J, Z, T, g = 3, 2, 16, 21, gen()
    k, v = (torch.randn(T, J, D, generator=g) * 30 for _ in range(2))
    k[0, 0, :4], v[1, 1, :4] = torch.tensor([1e6, -torch.inf, torch.nan, 2.0**-10]), 463.9
    k, v = k.to(dtype), v.to(dtype)
    slots = torch.randperm(P * Z, generator=g)[:T]
    slots[3], slots[4] = -1, P * Z
    angle = torch.rand(T, R // 2, generator=g) * 6
    rope = (angle.cos(), angle.sin()) if R else None
    got, want = (torch.full((P, J, 2, Z, D), 9.0).to(E4M3) for _ in range(2))
    ref.msm_append(k, v, slots, want, *(rope or ()))
    there = KVPages(got.to(device))
    turned = None if rope is None else tuple(t.to(device) for t in rope)
    ops.msm_append(k.to(device), v.to(device), slots.to(device), there, turned)
    got = there.pages.cpu().float()
    assert torch.equal(got.isnan(), want.float().isnan())
    assert torch.equal(got.nan_to_num(), want.float().nan_to_num())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32), min_size=16, max_size=16))
def test_numbers_round_as_torch_rounds(numbers):
    x = torch.tensor(numbers, dtype=torch.float32).view(1, 1, 16)
    cache = KVPages.empty(1, 1, 16, 16, E4M3)
    ops.msm_append(x, -x, torch.tensor([5]), cache)
    want = as_stored(x, E4M3).float()
    got = cache.pages[0, 0, :, 5].float()
    for row, sign in zip(got, (1, -1), strict=True):
        torch.testing.assert_close(row, sign * want[0, 0], rtol=0, atol=0, equal_nan=True)


def test_the_codec_by_its_name():
    codec = parse("fp8")
    assert codec.pages is None and codec.dtype == E4M3 and codec.token_exact
    assert codec.bytes_per_token(8, 128, 64) == 2048
    x = torch.tensor([[[1e9, 17.0, -0.3, 2.0**-9]]])
    k, v = codec.roundtrip(x, -x, 16)
    assert k.flatten().tolist() == [448.0, 16.0, -0.3125, 2.0**-9] and torch.equal(v, -k)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="or float8_e4m3fn"):
        KVPages.empty(1, 1, 16, 16, torch.float8_e5m2)
    pages = torch.zeros(1, 1, 2, 16, 16, dtype=torch.int8)
    q, _, batch = paged_problem(1, 1, 16, 16, torch.float32, None, [1], [5])
    with pytest.raises(RuntimeError, match=r"pages: expected .* or float8_e4m3fn, got int8"):
        torch.ops.tessella.msm_attn(
            q, pages, *vars(batch).values(), 1.0, 0, 0.0, None, None, 0, False
        )
