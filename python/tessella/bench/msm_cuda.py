"""Benches of msm on a GPU: decode and verification over 16-bit pages."""

from __future__ import annotations

import torch

from tessella import ops
from tessella.bench import attention_cuda as shared
from tessella.bench.msm import BF16_MACS
from tessella.bench.suite import Case, Family, Prepared, Selection, Subject
from tessella.formats_kv import KVPages


def kernel(c: Case) -> str:
    """The body that a case's longest request takes."""
    rows = shared.rows(c)
    return "msm.sm80.plain" if rows <= 16 else "msm.sm90.t64" if rows <= 64 else "msm.sm90.t128"


def prepare(c: Case, selection: Selection) -> Prepared:
    """Our kernel and SDPA's on one case."""
    p, batch = shared.problem(c)
    nbytes = p.keys * c["J"] * 2 * c["D"] * 2
    n = shared.copies(nbytes)
    shape = (p.pages, c["J"], 2, c["page"], c["D"])
    caches = [KVPages(torch.randn(shape, dtype=torch.bfloat16, device="cuda")) for _ in range(n)]
    ours = Subject(
        name="bf16",
        kernel=kernel(c),
        case={"kv": "bf16"},
        call=lambda i: ops.msm_attn(p.q, caches[i % n], batch, plan=p.plan),
        nbytes=nbytes + 2 * p.q.numel() * 2,
        macs=p.macs * BF16_MACS,
        notes={"plan_us": round(shared.plan_call(c, p), 2)},
    )
    calls, absent = shared.rivals(c, p)
    subjects = [ours] if selection({"kv": "bf16"}) else []
    return Prepared(subjects, calls, absent=absent, inner=shared.inner(nbytes))


def family(device: str) -> Family:
    """msm on "cuda"."""
    return Family(
        "msm",
        device,
        lambda quick: shared.QUICK if quick else [*shared.CASES, *shared.LARGE],
        prepare,
        shared.values(["bf16"]),
        ["bf16", "sdpa_cudnn", "sdpa_flash", "sdpa_separate"],
    )
