"""Cases and rivals of attention on CPU, shared by the families msm and kv4.

A case is a batch over paged keys and values: decode, prefill (with a cached prefix or not), trees
to verify, or a mixture. Rivals get them contiguous, which no paged cache has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tessella import _native, ops
from tessella.bench.suite import Case
from tessella.bench.timing import last_level_cache_bytes, rotations
from tessella.formats_kv import MsmBatch
from tessella.testing.attention import make_batch

HEADS = (32, 8, 128)
"""Query heads, kv heads and head dim of Llama-3-8B: what the targets are stated for."""


def case(kind: str, B: int, ctx: int, q: int, page: int = 64) -> Case:
    """A case as records name it: B requests with q tokens each over ctx keys each."""
    H, J, D = HEADS
    return {"kind": kind, "B": B, "ctx": ctx, "q": q, "H": H, "J": J, "D": D, "page": page}


DECODE = [case("decode", B, 4096, 1) for B in (1, 2, 4, 8)]
MORE_DECODE = [
    case("decode", 16, 1024, 1),
    case("decode", 1, 32768, 1),
    case("decode", 4, 4096, 1, page=16),
]
VERIFY = [case("verify", 4, 4096, 31), case("verify", 8, 4096, 15)]
PREFILL = [
    case("prefill", 1, 1024, 1024),
    case("prefill", 1, 4096, 4096),
    *(case("prefill", 1, 1024 + n, 1024) for n in (37, 1000, 3001)),  # a cached prefix
    case("prefill", 1, 16384, 512),  # a chunk of a long prompt
]
TRACES = {
    "code": (
        (51, 137, 245, 462, 700, 915, 1093, 1342, 1605, 1885, 2195, 2539, 2982, 3776, 5511, 7435),
        (6, 7, 8, 9, 9, 10, 11, 12, 14, 15, 18, 21, 27, 37, 58, 126),
    ),
    "conv": (
        (165, 206, 374, 391, 401, 412, 818, 1001, 1037, 1067, 1100, 1147, 1312, 1770, 3018, 4089),
        (33, 53, 68, 81, 89, 95, 104, 118, 141, 171, 223, 389, 397, 411, 427, 502),
    ),
}
"""Prompt and generated tokens of requests to a coding and a chat service: the middles of 16 equal
shares of Microsoft's Azure LLM inference trace of 2023 (Patel et al., Splitwise, ISCA 2024)."""

MIXED = [
    case("mixed", 12, 4096, 256),
    case("mixed", 24, 1024, 128),
    case("mixed-code", 16, 7435, 512),
    case("mixed-conv", 16, 4089, 512),
]
"""One chunk of q tokens, then decodes and trees of 8 in turn, with ctx / 8 to ctx keys each, or
with the lengths of a trace (:data:`TRACES`) half-way through what they generate."""


def lengths(c: Case) -> tuple[list[int], list[int], list[str]]:
    """(query tokens, keys, masks) of the requests of a case."""
    B, ctx, q, kind = c["B"], c["ctx"], c["q"], c["kind"]
    if not kind.startswith("mixed"):
        return [q] * B, [ctx] * B, ["tree" if kind == "verify" else "causal"] * B
    if kind == "mixed-decode":  # a chunk beside decodes of half its context
        return [q] + [1] * (B - 1), [ctx] + [ctx // 2] * (B - 1), ["causal"] * B
    if kind == "mixed":
        kv = [ctx] + [ctx // 8 + (ctx * 7 // 8) * (i * 37 % 100) // 100 for i in range(1, B)]
    else:  # the longest prompt is the chunk's; long answers belong to prompts of any length
        prompts, answers = TRACES[kind.removeprefix("mixed-")]
        others = [n + answers[i * 7 % 16] // 2 for i, n in enumerate(prompts[:-1])]
        kv = [ctx, *others[: B - 1]]
    q_len = [q] + [8 if i % 3 == 0 else 1 for i in range(1, B)]
    return q_len, kv, ["causal" if n != 8 else "tree" for n in q_len]


@dataclass(frozen=True)
class Problem:
    """A case's batch, and what it computes."""

    batch: MsmBatch
    pages: int
    q: Tensor
    plan: Tensor
    pairs: int  # visible (query token, key) pairs, for each head
    keys: int  # keys of all requests

    @property
    def macs(self) -> int:
        """Multiply-adds of both products."""
        return 2 * self.pairs * self.q.shape[1] * self.q.shape[2]


def problem(c: Case) -> Problem:
    """The batch of a case with random queries in bf16, and its plan."""
    g = torch.Generator().manual_seed(0)
    q_len, kv_len, mask = lengths(c)
    batch, pages = make_batch(q_len, kv_len, c["page"], g, mask)
    q = torch.randn(sum(q_len), c["H"], c["D"], generator=g).to(torch.bfloat16)
    plan = ops.msm_plan(batch, c["H"], c["J"])
    pairs = sum(n * (k - n) + n * (n + 1) // 2 for n, k in zip(q_len, kv_len, strict=True))
    return Problem(batch, pages, q, plan, pairs, sum(kv_len))


def resident(pages: Tensor) -> Tensor:
    """A copy where a cache keeps its pages."""
    return _native.empty_pages(pages.shape, pages.dtype).copy_(pages)


def copies(nbytes: int) -> int:
    """Copies of a cache to rotate over, so that none is still in the last-level cache."""
    return rotations(nbytes, last_level_cache_bytes(), most=48)


def dense(c: Case, n: int) -> list[tuple[Tensor, Tensor]]:
    """n contiguous caches [B, J, ctx, D] in bf16."""
    shape = (c["B"], c["J"], c["ctx"], c["D"])
    return [
        (torch.randn(shape, dtype=torch.bfloat16), torch.randn(shape, dtype=torch.bfloat16))
        for _ in range(n)
    ]


def rivals(c: Case, p: Problem) -> dict[str, Callable[[int], Tensor]]:
    """What a user of torch would run: the best form we know of, and plain SDPA.

    For decode and trees the query heads of a kv head are folded into rows, so that keys and values
    are read once: 12 to 28 times faster than SDPA's own grouping. Mixed batches have no rival in
    one call: each request is run by itself.
    """
    if c["kind"].startswith("mixed"):
        return {"sdpa": _mixed_rival(c, p)}
    B, q, H, J, D, ctx = (c[k] for k in ("B", "q", "H", "J", "D", "ctx"))
    caches = dense(c, copies(4 * B * J * ctx * D))
    n, scale = len(caches), D**-0.5
    qs = p.q.view(B, q, H, D).transpose(1, 2).contiguous()
    mask = _mask(c, p)
    folded_mask = None if mask is None else mask.repeat_interleave(H // J, 0)
    rows = p.q.view(B, q, J, H // J, D).permute(0, 2, 1, 3, 4).reshape(B, J, -1, D).contiguous()

    def folded(i: int) -> Tensor:
        k, v = caches[i % n]
        s = torch.matmul(rows, k.transpose(2, 3)) * scale
        if folded_mask is not None:
            s = s.masked_fill(~folded_mask, -torch.inf)
        return torch.matmul(torch.softmax(s, -1), v)

    def sdpa(i: int) -> Tensor:
        k, v = caches[i % n]
        causal = c["kind"] == "prefill" and q == ctx
        return torch.nn.functional.scaled_dot_product_attention(
            qs, k, v, None if causal else mask, is_causal=causal, scale=scale, enable_gqa=True
        )

    calls = {"torch_folded_bf16": folded, "sdpa": sdpa}
    if c["kind"] == "prefill":
        del calls["torch_folded_bf16"]  # its scores alone would be gigabytes
    return calls


def _mask(c: Case, p: Problem) -> Tensor | None:
    """Visible keys [q, ctx], of request 0 where requests differ; None where all are visible."""
    q, ctx = c["q"], c["ctx"]
    if q == 1:
        return None
    seen = torch.ones(q, ctx, dtype=torch.bool)
    square = torch.ones(q, q, dtype=torch.bool).tril()
    if c["kind"] == "verify":
        bits = p.batch.tree_bits[:q, 0]
        square = bits[:, None] >> torch.arange(q) & 1 == 1
    seen[:, ctx - q :] = square
    return seen


def _mixed_rival(c: Case, p: Problem) -> Callable[[int], Tensor]:
    q_len, kv_len, _ = lengths(c)
    caches = [dense(c | {"B": 1, "ctx": k}, 1)[0] for k in kv_len]
    qs = [t.transpose(0, 1)[None].contiguous() for t in p.q.split(q_len)]
    masks = [
        None if n == 1 else torch.ones(n, k, dtype=torch.bool).tril(k - n)
        for n, k in zip(q_len, kv_len, strict=True)
    ]

    def run(_: int) -> Tensor:
        for q, (k, v), m in zip(qs, caches, masks, strict=True):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, m, enable_gqa=True)
        return out

    return run


def plan_call(c: Case, p: Problem) -> Callable[[int], Tensor]:
    """Making the plan, which is timed apart: one serves all layers of a model."""
    return lambda _: ops.msm_plan(p.batch, c["H"], c["J"])


VALUE_KEYS = ("kind", "B", "ctx", "q", "H", "J", "D", "page")


def values(cases: list[Case], kv: list[str]) -> dict[str, list]:
    """Possible values of every key of the cases."""
    return {k: sorted({c[k] for c in cases}) for k in VALUE_KEYS} | {"kv": kv}
