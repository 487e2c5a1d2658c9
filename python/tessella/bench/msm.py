"""Benches of msm: attention over 16-bit pages."""

from __future__ import annotations

import torch

from tessella import _native, ops
from tessella.bench import attention as shared
from tessella.bench.suite import Case, Family, Prepared, Selection, Subject
from tessella.formats_kv import KVPages

CASES = [*shared.DECODE, *shared.MORE_DECODE, *shared.VERIFY, *shared.PREFILL, *shared.MIXED]
QUICK = [shared.case("decode", 1, 1024, 1), shared.case("prefill", 1, 256, 256)]
BF16_MACS = 2
"""8-bit multiply-adds that a bf16 one takes the time of."""


def prepare(c: Case, selection: Selection) -> Prepared:
    """Our kernel and torch's on one case."""
    p = shared.problem(c)
    nbytes = p.keys * c["J"] * 2 * c["D"] * 2
    n = shared.copies(nbytes)
    shape = (p.pages, c["J"], 2, c["page"], c["D"])
    random = torch.randn(shape, dtype=torch.bfloat16)
    caches = [KVPages(shared.resident(random)) for _ in range(n)]
    isa = _native._C.cpu_isa()
    ours = Subject(
        name="bf16",
        kernel=f"msm.{isa['best']}." + ("bf16" if isa["bf16"] else "tile"),
        case={"kv": "bf16"},
        call=lambda i: ops.msm_attn(p.q, caches[i % n], p.batch, plan=p.plan),
        nbytes=nbytes + 2 * p.q.numel() * 2,
        macs=p.macs * BF16_MACS,
        parts={"plan": shared.plan_call(c, p)},
    )
    return Prepared([ours] if selection({"kv": "bf16"}) else [], shared.rivals(c, p))


def family(device: str) -> Family | None:
    """msm on "cpu"; None elsewhere."""
    if device != "cpu":
        return None
    return Family(
        "msm",
        device,
        lambda quick: QUICK if quick else CASES,
        prepare,
        shared.values([*CASES, *QUICK], ["bf16"]),
        ["bf16", "torch_folded_bf16", "sdpa"],
    )
