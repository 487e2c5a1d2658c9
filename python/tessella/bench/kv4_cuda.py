"""Benches of kv4 on a GPU: attention over coded pages, and appending to them."""

from __future__ import annotations

import torch

from tessella import ops
from tessella.bench import attention_cuda as shared
from tessella.bench.kv4 import CODECS, coded_pages
from tessella.bench.msm import BF16_MACS
from tessella.bench.suite import Case, Family, Prepared, Selection, Subject
from tessella.formats_kv import KV4Pages, KVCodec

MOST_CODED = 256
"""Pages whose scales are drawn one by one; larger caches repeat them."""


def caches_of(c: Case, codec: KVCodec, pages: int, n: int) -> list[KV4Pages]:
    """n caches of random codes with the scales of a real cache."""
    some = coded_pages(c, codec, min(pages, MOST_CODED)).blob.cuda()
    caches = []
    for _ in range(n):
        pick = torch.randint(len(some), (pages,), device="cuda")
        caches.append(KV4Pages(some[pick], codec, c["page"], c["D"]))
    return caches


def kernel_of(c: Case, codec: KVCodec) -> str:
    """Which body runs on Hopper: one of its own for up to 8 packed rows and one scale a token."""
    few = c["q"] * c["H"] <= 8 * c["J"] and codec in (KVCodec(4, 4), KVCodec(8, 8))
    own = torch.cuda.get_device_capability() == (9, 0)
    return "kv4.sm90.few" if few and own else "kv4.sm80.plain"


def prepare(c: Case, selection: Selection) -> Prepared:
    """Our codecs and bf16 SDPA on one case."""
    p, batch = shared.problem(c)
    subjects, inner = [], 20
    for name, codec in CODECS.items():
        if not selection({"kv": name}) or (name != "int4" and c != shared.TARGET):
            continue
        nbytes = p.keys * c["J"] * codec.page_bytes(c["page"], c["D"]) // c["page"]
        n = shared.copies(nbytes)
        inner = min(inner, shared.inner(nbytes))
        caches = caches_of(c, codec, p.pages, n)
        subjects.append(
            Subject(
                name=name,
                kernel=kernel_of(c, codec),
                case={"kv": name},
                call=lambda i, caches=caches, n=n: ops.kv4_attn(
                    p.q, caches[i % n], batch, plan=p.plan
                ),
                nbytes=nbytes + 2 * p.q.numel() * 2,
                macs=p.macs * BF16_MACS,
                parts={"append": append_call(c, caches[0], len(p.q))},
                notes={"plan_us": round(shared.plan_call(c, p), 2)},
            )
        )
    calls, absent = shared.rivals(c, p)
    return Prepared(subjects, calls, absent=absent, inner=inner)


def append_call(c: Case, cache: KV4Pages, T: int):
    """Coding the keys and values of the query tokens."""
    k = torch.randn(T, c["J"], c["D"], dtype=torch.bfloat16, device="cuda")
    slots = torch.arange(T, device="cuda") % (len(cache.blob) * cache.Z)
    rope = tuple(torch.rand(T, c["D"] // 2, device="cuda") for _ in range(2))
    scratch = KV4Pages(cache.blob.clone(), cache.codec, cache.Z, cache.D)
    return lambda _: ops.kv4_append(k, k, slots, scratch, rope)


def family(device: str) -> Family:
    """kv4 on "cuda"."""
    return Family(
        "kv4",
        device,
        lambda quick: shared.QUICK if quick else shared.CASES,
        prepare,
        shared.values(list(CODECS)),
        [*CODECS, "sdpa_cudnn", "sdpa_flash"],
    )
