"""Benches of kv4: attention over coded pages, and appending to them."""

from __future__ import annotations

import torch

from tessella import _native, ops
from tessella.bench import attention as shared
from tessella.bench.msm import BF16_MACS
from tessella.bench.suite import Case, Family, Prepared, Selection, Subject
from tessella.formats_kv import KV4Pages, KVCodec

CASES = [*shared.DECODE, *shared.MORE_DECODE, *shared.VERIFY, *shared.PREFILL[:3], *shared.MIXED]
QUICK = [shared.case("decode", 1, 1024, 1), shared.case("prefill", 1, 256, 256)]
CODECS = {
    "int4": KVCodec(),
    "int4g32": KVCodec(group=32),
    "int8": KVCodec(8, 8),
    "int2": KVCodec(2, 2),
}
"""Codecs by the name that records give them."""
MOST_CODE_ROWS = 32
"""Packed rows up to which codes are multiplied as they are (csrc/kv4/cpu.cpp)."""


def coded_pages(c: Case, codec: KVCodec, pages: int) -> KV4Pages:
    """Pages of random codes with the scales of a real cache."""
    Z, D, J = c["page"], c["D"], c["J"]
    cache = KV4Pages.empty(pages, J, Z, D, codec)
    cache.blob.copy_(torch.randint(0, 256, cache.blob.shape, dtype=torch.uint8))
    for name, (at, size) in codec.parts(Z, D).items():
        if name.endswith("codes"):
            continue
        middle = (2**codec.k_bits - 1) / 2
        numbers = torch.rand(pages, J, size // 2)
        numbers = (0.1 + 0.1 * numbers) * 8 / middle if "scales" in name else middle + numbers
        cache.blob[:, :, at : at + size] = numbers.half().view(torch.uint8)
    return cache


def prepare(c: Case, selection: Selection) -> Prepared:
    """Our codecs and torch's bf16 on one case."""
    p = shared.problem(c)
    isa = _native._C.cpu_isa()
    tile = "codes" if c["q"] * c["H"] // c["J"] <= MOST_CODE_ROWS else "tile"
    if tile == "tile" and isa["bf16"]:
        tile = "bf16"
    subjects = []
    for name, codec in CODECS.items():
        plain = {k: c[k] for k in shared.VALUE_KEYS} in shared.DECODE
        if not selection({"kv": name}) or (name != "int4" and not plain):
            continue
        nbytes = p.keys * c["J"] * codec.page_bytes(c["page"], c["D"]) // c["page"]
        n = shared.copies(nbytes)
        one = coded_pages(c, codec, p.pages)
        caches = [KV4Pages(shared.resident(one.blob), codec, one.Z, one.D) for _ in range(n)]
        subjects.append(
            Subject(
                name=name,
                kernel=f"kv4.{isa['best']}.{tile}",
                case={"kv": name},
                call=lambda i, caches=caches, n=n: ops.kv4_attn(
                    p.q, caches[i % n], p.batch, plan=p.plan
                ),
                nbytes=nbytes + 2 * p.q.numel() * 2,
                macs=p.macs * (1 if tile == "codes" else BF16_MACS),
                parts={"plan": shared.plan_call(c, p), "append": append_call(c, caches[0], p)},
            )
        )
    return Prepared(subjects, shared.rivals(c, p))


def append_call(c: Case, cache: KV4Pages, p: shared.Problem):
    """Coding the keys and values of the query tokens."""
    T = len(p.q)
    k = torch.randn(T, c["J"], c["D"], dtype=torch.bfloat16)
    slots = torch.arange(T) % (len(cache.blob) * cache.Z)
    rope = torch.rand(T, c["D"] // 2), torch.rand(T, c["D"] // 2)
    scratch = KV4Pages(cache.blob.clone(), cache.codec, cache.Z, cache.D)
    return lambda _: ops.kv4_append(k, k, slots, scratch, rope)


def family(device: str) -> Family | None:
    """kv4 on "cpu"; None elsewhere."""
    if device != "cpu":
        return None
    return Family(
        "kv4",
        device,
        lambda quick: QUICK if quick else CASES,
        prepare,
        shared.values([*CASES, *QUICK], list(CODECS)),
        [*CODECS, "torch_folded_bf16", "sdpa"],
    )
