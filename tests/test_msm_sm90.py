"""The Hopper bodies of attention, for tiles of 64 and 128 rows, against the fp64 reference."""

import pytest
import torch

from attention_cases import assert_close, gen, paged_problem
from tessella import ops
from tessella.formats_kv import KVPages
from tessella.ref import msm as ref
from tessella.testing.force import environment, force, gpu_kernels
from test_msm_cuda import DIFF, DTYPES, attend, on_gpu

KERNELS = ["msm.sm90.t64", "msm.sm90.t128"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not set(KERNELS) <= set(gpu_kernels("msm")), reason="built without sm_90a"),
]
DIMS = (64, 80, 96, 128, 256)
MIXED = ["causal", "full", "window", "tree", "tree", "causal", "full", "causal", "causal"]
Q_LEN = [77, 33, 64, 50, 70, 1, 130, 0, 3]
KV_LEN = [333, 500, 700, 50, 300, 129, 1, 10, 3]


def check(H, J, D, Z, dtype=torch.bfloat16, mask=None, q_len=Q_LEN, kv_len=KV_LEN, **how):
    """With plans that split much, little and at fixed lengths, and with none."""
    q, pages, batch = paged_problem(H, J, D, Z, dtype, mask, q_len, kv_len, seed=H + D + Z)
    how = {"scale": D**-0.5, **how}
    want = ref.msm_attn(q, pages, batch, **how)
    window = how.get("window", 0)
    shapes = ((1, 0), (40, 0), (1, 256))
    plans = [ops.msm_plan(batch, H, J, window=window, units=u, split=s) for u, s in shapes]
    for kernel in KERNELS:
        with force(kernel):
            for plan in (*plans, None):
                assert_close(attend(q, pages, batch, plan, **how), want, DIFF[dtype])


@pytest.mark.parametrize("D", DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_dim_and_mask(D, dtype):
    check(6, 2, D, 48, dtype, MIXED, window=100)


@pytest.mark.parametrize("G", [1, 2, 3, 5, 6, 7, 8, 16])
def test_every_group(G):
    """Tiles that begin and end within a token's heads."""
    check(2 * G, 2, 128, 32, mask=["causal", "tree"], q_len=[150, 97], kv_len=[400, 300])


@pytest.mark.parametrize("Z", [16, 32, 48, 64, 80, 128, 144, 256])
def test_every_page_size(Z):
    lengths = {"q_len": [100, 64, 64, 63], "kv_len": [900, 511, 257, 127]}
    check(8, 2, 128, Z, mask=["causal", "window", "full", "causal"], window=130, **lengths)


@pytest.mark.parametrize("window", [1, 17, 64, 128, 129, 1000])
def test_every_window(window):
    check(8, 2, 128, 64, mask=["window"], q_len=[200], kv_len=[1300], window=window)


@pytest.mark.parametrize("how", [
    {"softcap": 5.0}, {"scale": -0.1}, {"scale": 0.0}, {"scale": 4.0},
    {"sinks": torch.linspace(-3, 3, 8)}, {"sinks": torch.full((8,), -torch.inf)},
], ids=str)  # fmt: skip
def test_scores(how):
    check(8, 2, 128, 16, q_len=[64, 64], kv_len=[300, 64], **how)


def test_requests_without_keys():
    for sinks in (None, torch.zeros(8)):
        lengths = {"q_len": [50, 64], "kv_len": [0, 300]}
        check(8, 2, 128, 16, mask=["full", "causal"], sinks=sinks, **lengths)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("G, q", [(4, 8), (4, 15), (4, 31), (8, 16), (1, 70), (16, 4)])
def test_trees_of_every_size(D, G, q):
    """Trees whose bits fill a word or two lie across blocks of keys, in few and many parts."""
    kv_len = [q, q + 1, 63 + q, 64 + q, 127, 128, 129 + q, 640, 1000]
    check(2 * G, 2, D, 64, mask=["tree"] * 9, q_len=[q] * 9, kv_len=kv_len)


@pytest.mark.parametrize("B, q", [(3, 5), (3, 16), (5, 17), (300, 8)])
def test_what_is_chosen_for_trees(B, q):
    """As many rows as each body takes, alike and ragged, with a long request among them."""
    for more in (0, 3, 300):
        q_len, kv_len = [q] * (B - 1) + [q + more], [q + 29 * i % 700 for i in range(B)]
        kv_len[-1] += more
        q4, pages, batch = paged_problem(8, 2, 64, 16, torch.bfloat16, ["tree"] * B, q_len, kv_len)
        want = ref.msm_attn(q4, pages, batch, scale=0.125)
        for plan in (ops.msm_plan(batch, 8, 2, units=198), None):
            assert_close(attend(q4, pages, batch, plan), want, DIFF[torch.bfloat16])


def test_many_requests_over_all_multiprocessors():
    q_len, kv_len = [20 + i * 37 % 70 for i in range(60)], [90 + i * 101 % 600 for i in range(60)]
    mask = [["full", "causal", "window"][i % 3] for i in range(60)]
    check(8, 2, 128, 16, mask=mask, q_len=q_len, kv_len=kv_len, window=50)


@pytest.mark.parametrize("kernel", KERNELS)
def test_runs_and_replays_give_the_same_bits(kernel):
    lengths = [500, 1, 300], [2000, 900, 300]
    q, pages, batch = paged_problem(32, 8, 128, 64, torch.bfloat16, None, *lengths)
    cache, b, gq = KVPages(pages.cuda()), on_gpu(batch), q.cuda()
    plan = ops.msm_plan(batch, 32, 8, units=132).cuda()
    with force(kernel):
        want = ops.msm_attn(gq, cache, b, plan=plan).clone()
        for _ in range(20):
            assert torch.equal(ops.msm_attn(gq, cache, b, plan=plan), want)
        graph, out = torch.cuda.CUDAGraph(), torch.empty_like(gq)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            ops.msm_attn(gq, cache, b, plan=plan, out=out)
        for _ in range(5):
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, want)


def test_strided_queries():
    q, pages, batch = paged_problem(4, 2, 64, 16, torch.float16, None, [90], [200])
    wide = torch.randn(len(q), 12, 64, generator=gen()).half().cuda()
    wide[:, 4:8] = q.cuda()
    cache, b = KVPages(pages.cuda()), on_gpu(batch)
    for kernel in KERNELS:
        with force(kernel):
            got = ops.msm_attn(wide[:, 4:8], cache, b)
            assert torch.equal(got, ops.msm_attn(q.cuda(), cache, b))


def test_what_it_cannot_run_is_refused():
    q, pages, batch = paged_problem(4, 2, 48, 16, torch.float16, None, [90], [200])
    for kernel in KERNELS:
        with environment(FORCE=kernel), pytest.raises(RuntimeError, match="cannot run this"):
            ops.msm_attn(q.cuda(), KVPages(pages.cuda()), on_gpu(batch))
