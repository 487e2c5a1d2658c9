"""Problems that tests of attention share, on CPU and GPU: batches of every mask, under poison."""

from __future__ import annotations

import functools

import torch

from tessella import ops
from tessella.formats_kv import KV4Pages, KVCodec, KVFactors
from tessella.ref import kv4, msm
from tessella.testing.attention import make_batch, poison_unused
from tessella.testing.metrics import relative_diff

MIXED = ["full", "causal", "window", "tree", "tree", "tree", "causal", "full"]
KV_LEN = [300, 0, 5, 200, 1, 130, 64, 17]
Q_PAGED, Q_CODED = [1, 0, 5, 37, 1, 70, 9, 0], [1, 0, 5, 37, 1, 9, 9, 0]


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(got, want, limit, lse_limit=2e-3):
    """(out, lse) within `limit` of the reference by :func:`relative_diff`, NaN where it has NaN."""
    (o, lse), (wo, wl) = got, want
    assert torch.equal(torch.isnan(o), torch.isnan(wo))
    diff = relative_diff(o.nan_to_num(), wo.nan_to_num())
    assert diff <= limit, f"{diff:.2e} > {limit:.0e}"
    dead = wl == -torch.inf
    assert torch.equal(lse == -torch.inf, dead) and not o[dead].any()
    assert float((lse - wl)[~dead].nan_to_num().abs().max()) < lse_limit


def options(H: int, D: int) -> dict:
    """Keyword arguments of the attention that differ by D, so that every one is met."""
    return {
        "scale": 0.9 * D**-0.5,
        "window": 20,
        "softcap": 5.0 if D in (64, 96) else 0.0,
        "sinks": torch.randn(H, generator=gen(1)) if D in (64, 128) else None,
    }


# 16-bit pages


def paged_problem(H, J, D, Z, dtype, mask=None, q_len=Q_PAGED, kv_len=KV_LEN, seed=0):
    """(q, pages, batch) with NaN wherever nothing may be read."""
    g = gen(seed)
    batch, P = make_batch(q_len, kv_len, Z, g, mask)
    pages = torch.randn(P, J, 2, Z, D, generator=g).to(dtype)
    poison_unused(pages, batch, Z)
    return torch.randn(sum(q_len), H, D, generator=g).to(dtype), pages, batch


@functools.cache
def paged_case(H, J, D, Z, dtype):
    """(q, pages, batch, keyword arguments, reference)."""
    q, pages, batch = paged_problem(H, J, D, Z, dtype, MIXED if D != 80 else None)
    how = options(H, D)
    return q, pages, batch, how, msm.msm_attn(q, pages, batch, **how)


# Coded pages


def make_factors(F: int, J: int, D: int, g: torch.Generator, m: int = 16) -> KVFactors:
    fold = torch.randn(F, J, D // m, m, m, generator=g) * 0.1 + torch.eye(m)
    inverse = torch.linalg.inv(fold).contiguous()
    mean = torch.randn(F, J, D, generator=g)
    return KVFactors(mean, fold, inverse.transpose(-1, -2).contiguous(), fold, inverse)


def fill(cache, batch, kv_len, dtype, g, factors=None):
    """Append random keys and values of every request; keyword arguments for the attention."""
    J, Z, D = cache.blob.shape[1], cache.Z, cache.D
    channel = cache.codec.k_axis == "channel"
    for b, n in enumerate(kv_len):
        pos = torch.arange(n)
        slots = batch.block_table[b, pos // Z].long() * Z + pos % Z
        row = torch.full((n,), b, dtype=torch.int32)
        k, v = (torch.randn(n, J, D, generator=g).to(dtype) for _ in range(2))
        how = {"rows": row if factors else None, "tail_row": row if channel else None}
        ops.kv4_append(k, v, slots, cache, factors=factors, **how)
    rows = torch.arange(len(kv_len), dtype=torch.int32)
    return {"rows": rows if factors else None, "tail_row": rows if channel else None}


def coded_problem(codec, H, J, D, Z, dtype, mask, factors=False, q_len=Q_CODED, kv_len=KV_LEN):
    """(q, cache, batch, keyword arguments) on the CPU; what may not be read decodes to NaN."""
    g, codec = gen(), KVCodec.parse(codec)
    batch, P = make_batch(q_len, kv_len, Z, g, mask)
    cache = KV4Pages.empty(P, J, Z, D, codec, len(kv_len))
    cache.blob.fill_(255)  # fp16 0xffff is NaN
    if cache.k_tail is not None:
        cache.k_tail.fill_(torch.nan)
    f = make_factors(len(kv_len), J, D, g) if factors else None
    how = fill(cache, batch, kv_len, dtype, g, f) | {"factors": f}
    return torch.randn(sum(q_len), H, D, generator=g).to(dtype), cache, batch, how


@functools.cache
def coded_cases(codec, shapes):
    """(arguments, plan, keyword arguments, reference) of every shape that the codec takes.

    `shapes` are (H, J, D, Z, dtype, with factors).
    """
    cases = []
    for H, J, D, Z, dtype, factors in shapes:
        group = KVCodec.parse(codec).group
        if group and D % group:
            continue
        mask = MIXED if D != 80 else None
        *args, how = coded_problem(codec, H, J, D, Z, dtype, mask, factors)
        how |= options(H, D)
        plan = ops.msm_plan(args[2], H, J, window=20, units=9)
        cases.append((args, plan, how, kv4.kv4_attn(*args, **how)))
    return cases
