"""Benches of mla: absorbed decode over latents, and appending to them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tessella import _native, ops
from tessella.bench import attention as shared
from tessella.bench.msm import BF16_MACS
from tessella.bench.suite import Case, Family, Prepared, Selection, Subject
from tessella.formats_mla import MLACache, MLACodec
from tessella.testing.attention import make_batch

PAGE = 64


def case(H: int, L: int = 512, R: int = 64, B: int = 1, ctx: int = 4096, q: int = 1) -> Case:
    """A case as records name it: B requests with q tokens each over ctx latents each."""
    return {"B": B, "ctx": ctx, "q": q, "H": H, "L": L, "R": R}


MODELS = (28, 40, 32, 64, 128)
"""Heads of converted models, and of DeepSeek-V3."""
SLICES = (4, 5, 7, 8, 10, 14, 16, 20, 96)
"""Those of a part of them on one of several devices, and of other models with latents."""

CASES = [
    *(case(H) for H in MODELS),
    *(case(H) for H in SLICES),
    *(case(H, *shape) for shape in ((448, 128), (256, 64)) for H in MODELS[:3]),
    *(case(H, B=8) for H in (28, 40, 32, 16)),
    *(case(H, ctx=16384) for H in (28, 40)),
    case(28, q=4),  # verification of a chain of drafts
]
QUICK = [case(7, 128, 32, ctx=512)]
LATENTS = ("bf16", "int8", "int4")


def prepare(c: Case, selection: Selection) -> Prepared:
    """Our codecs and torch's bf16 on one case."""
    B, ctx, q_len, H, L, R = (c[k] for k in ("B", "ctx", "q", "H", "L", "R"))
    g = torch.Generator().manual_seed(0)
    batch, pages = make_batch([q_len] * B, [ctx] * B, PAGE, g)
    q = torch.randn(B * q_len, H, L + R, generator=g).to(torch.bfloat16)
    split = q[..., :L], q[..., L:]
    plan = ops.msm_plan(batch, H, 1)
    pairs = B * sum(ctx - q_len + i + 1 for i in range(q_len)) * H
    scale = (128 + R) ** -0.5
    isa = _native._C.cpu_isa()
    subjects = []
    for name in LATENTS:
        if not selection({"latent": name}):
            continue
        codec = MLACodec(name)
        nbytes = B * ctx * codec.page_bytes(PAGE, L, R) // PAGE
        caches = resident(codec, pages, L, R, shared.copies(nbytes))
        tile = ("bf16" if isa["bf16"] else "tile") if name == "bf16" else "codes"
        code_macs = 2 * L if tile == "codes" else 0
        subjects.append(
            Subject(
                name=name,
                kernel=f"mla.{isa['best']}.{tile}",
                case={"latent": name},
                call=lambda i, caches=caches: ops.mla_decode(
                    *split, caches[i % len(caches)], batch, scale=scale, plan=plan
                ),
                nbytes=nbytes + 2 * B * q_len * H * (2 * L + R),
                macs=pairs * (code_macs + (2 * L + R - code_macs) * BF16_MACS),
                parts={"append": append_call(caches[0], B * q_len)},
            )
        )
    return Prepared(subjects, rivals(c, q, scale))


def resident(codec: MLACodec, pages: int, L: int, R: int, n: int) -> list[MLACache]:
    """n caches of random latents, where a cache keeps its pages."""
    one = MLACache.empty(pages, PAGE, L, R, codec)
    x = torch.randn(PAGE, L + R, dtype=torch.bfloat16)
    for page in range(pages):
        slots = page * PAGE + torch.arange(PAGE)
        ops.mla_append(x[:, :L], x[:, L:], slots, one)
    return [MLACache(shared.resident(one.blob), codec, PAGE, L, R) for _ in range(n)]


def append_call(cache: MLACache, T: int) -> Callable[[int], None]:
    """Rotating and coding the latents of the query tokens."""
    x = torch.randn(T, cache.L + cache.R, dtype=torch.bfloat16)
    rotation = torch.rand(T, cache.R // 2), torch.rand(T, cache.R // 2)
    slots = torch.arange(T)
    scratch = MLACache(cache.blob.clone(), cache.codec, cache.Z, cache.L, cache.R)
    return lambda _: ops.mla_append(x[:, : cache.L], x[:, cache.L :], slots, scratch, rotation)


def rivals(c: Case, q: Tensor, scale: float) -> dict[str, Callable[[int], Tensor]]:
    """The best form in torch: absorbed, all heads as rows of one product, bf16.

    The cache is contiguous [B, ctx, L + R], which no paged one is, so keys and values are read
    from the same memory.
    """
    B, ctx, q_len, H, L, R = (c[k] for k in ("B", "ctx", "q", "H", "L", "R"))
    n = shared.copies(2 * B * ctx * (L + R))
    caches = [torch.randn(B, ctx, L + R, dtype=torch.bfloat16) for _ in range(n)]
    rows = q.view(B, q_len * H, L + R)
    hidden = torch.ones(q_len, ctx, dtype=torch.bool).triu(ctx - q_len + 1)
    mask = hidden.repeat_interleave(H, 0) if q_len > 1 else None

    def folded(i: int) -> Tensor:
        kv = caches[i % n]
        s = torch.matmul(rows, kv.transpose(1, 2)) * scale
        if mask is not None:
            s = s.masked_fill(mask, -torch.inf)
        return torch.matmul(torch.softmax(s, -1), kv[..., :L])

    return {"torch_folded_bf16": folded}


VALUE_KEYS = ("B", "ctx", "q", "H", "L", "R")


def family(device: str) -> Family | None:
    """mla on "cpu"; None elsewhere."""
    if device != "cpu":
        return None
    every = [*CASES, *QUICK]
    return Family(
        "mla",
        device,
        lambda quick: QUICK if quick else CASES,
        prepare,
        {k: sorted({c[k] for c in every}) for k in VALUE_KEYS} | {"latent": list(LATENTS)},
        [*LATENTS, "torch_folded_bf16"],
    )
