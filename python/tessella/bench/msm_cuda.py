"""Benches of msm on a GPU: decode, verification, prefill and both over 16- and 8-bit pages."""

from __future__ import annotations

import torch

from tessella import ops
from tessella.bench import attention_cuda as shared
from tessella.bench.msm import BF16_MACS
from tessella.bench.suite import Case, Family, Prepared, Selection, Subject
from tessella.formats_kv import KVPages

DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
"""Of the pages; E4M3 is measured where 4 bits are compared with others."""
FP8_CASES = (shared.TARGET, shared.VERIFY, shared.DECODE[0])


def kernel(c: Case, kv: str) -> str:
    """The body that a case's longest request takes."""
    rows = shared.rows(c)
    if rows <= 16 or kv == "fp8":
        return "msm.sm80.plain"
    return "msm.sm90.t64" if rows <= 64 else "msm.sm90.t128"


def prepare(c: Case, selection: Selection) -> Prepared:
    """Our kernel and SDPA's on one case."""
    p, batch = shared.problem(c)
    shape = (p.pages, c["J"], 2, c["page"], c["D"])
    subjects, inner = [], 20
    for kv, dtype in DTYPES.items():
        if not selection({"kv": kv}) or (kv == "fp8" and c not in FP8_CASES):
            continue
        nbytes = p.keys * c["J"] * 2 * c["D"] * dtype.itemsize
        n = shared.copies(nbytes)
        inner = min(inner, shared.inner(nbytes))
        numbers = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(n))
        caches = [KVPages(x.to(dtype)) for x in numbers]
        subjects.append(
            Subject(
                name=kv,
                kernel=kernel(c, kv),
                case={"kv": kv},
                call=lambda i, caches=caches, n=n: ops.msm_attn(
                    p.q, caches[i % n], batch, plan=p.plan
                ),
                nbytes=nbytes + 2 * p.q.numel() * 2,
                macs=p.macs * BF16_MACS,
                notes={"plan_us": round(shared.plan_call(c, p), 2)},
            )
        )
    calls, absent = shared.rivals(c, p)
    return Prepared(subjects, calls, absent=absent, inner=inner)


def family(device: str) -> Family:
    """msm on "cuda"."""
    return Family(
        "msm",
        device,
        lambda quick: shared.QUICK if quick else [*shared.CASES, *shared.LARGE],
        prepare,
        shared.values([*DTYPES]),
        [*DTYPES, "sdpa_cudnn", "sdpa_flash", "sdpa_separate"],
    )
