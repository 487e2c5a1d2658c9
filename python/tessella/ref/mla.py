"""Reference of mla: coding of latents, attention over them, and the absorbed projections."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.formats_kv import MsmBatch
from tessella.formats_mla import MLACache
from tessella.layout_mla import LatentCodes, pack_latents, unpack_latents
from tessella.ref import msm


def quantise(x: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """(codes int8, scale fp16) of rows x [..., n]; the scale is [...].

    In fp32, each step rounded once, so that kernels give the same codes::

        s = fp16(max |x| / qmax);  q = clamp(rne(x * (1 / s)), -qmax, qmax)

    inf, NaN and scales over fp16 give a NaN scale and codes of 0; so does a scale of 0 codes.
    """
    x = x.float()
    s = (x.abs().amax(-1) / x.new_tensor(float(qmax))).half()
    bad = ~torch.isfinite(x).all(-1) | torch.isinf(s)
    inv = 1.0 / s.float()
    q = torch.round((x * inv[..., None]).clamp(-qmax, qmax))
    nothing = bad | (s == 0)
    return (
        q.masked_fill(nothing[..., None], 0).to(torch.int8),
        s.masked_fill(bad, torch.nan),
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs (x[2i], x[2i + 1]) of x [..., R], in fp32.

    cos and sin are [..., R/2], broadcast over x; products and sums are rounded one by one.
    """
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def mla_append(
    latent_TL: Tensor,
    rope_TR: Tensor,
    slots: Tensor,
    cache: MLACache,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Code latents and rope keys (rotated) into their slots; slots outside are skipped."""
    codec, Z, L, R = cache.codec, cache.Z, cache.L, cache.R
    rope = rope_TR.float() if rotation is None else rotate(rope_TR, *rotation)
    for t, slot in enumerate(slots.tolist()):
        if not 0 <= slot < len(cache.blob) * Z:
            continue
        page, at = divmod(slot, Z)
        c = unpack_latents(cache.blob[page], codec, Z, L, R)
        for part, scales, x, bits in (
            (c.latents, c.scales, latent_TL[t], codec.latent_bits),
            (c.rope, c.rope_scales, rope[t], codec.rope_bits),
        ):
            if scales is None:
                part[at] = x.float().to(part.dtype)
            else:
                part[at], scales[at] = quantise(x, 2 ** (bits - 1) - 1)
        cache.blob[page] = pack_latents(c, codec)


def dequantise(c: LatentCodes, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Latents [..., Z, L] and rope keys [..., Z, R] that the contents of pages stand for."""
    latents, rope = c.latents.to(dtype), c.rope.to(dtype)
    if c.scales is not None:
        latents = latents * c.scales.to(dtype)[..., None]
    if c.rope_scales is not None:
        rope = rope * c.rope_scales.to(dtype)[..., None]
    return latents, rope


def gather(cache: MLACache, batch: MsmBatch, b: int) -> tuple[Tensor, Tensor]:
    """Latents [kv_len, L] and rope keys [kv_len, R] of request b."""
    kv_len = int(batch.kv_len[b])
    page = batch.block_table[b, : -(-kv_len // cache.Z)].long()
    codes = unpack_latents(cache.blob[page], cache.codec, cache.Z, cache.L, cache.R)
    latents, rope = (t.flatten(0, 1)[:kv_len] for t in dequantise(codes))
    return latents, rope


def mla_decode(
    q_THL: Tensor, q_rope_THR: Tensor, cache: MLACache, batch: MsmBatch, **how
) -> tuple[Tensor, Tensor]:
    """Absorbed attention in fp64: (out [T, H, L], lse [T, H]); `how` as in :func:`msm.attend`."""

    def keys_values(b: int) -> tuple[Tensor, Tensor]:
        latents, rope = gather(cache, batch, b)
        keys = torch.cat([latents, rope], -1)[:, None]
        return keys, torch.nn.functional.pad(latents, (0, cache.R))[:, None]

    q = torch.cat([q_THL, q_rope_THR], -1)
    out, lse = msm.attend(q, batch, keys_values, **how)
    return out[..., : cache.L], lse


def absorb_query(q_THN: Tensor, w_uk_HNL: Tensor) -> Tensor:
    """q~ [T, H, L] = q W_UK of each head (DeepSeek-V2, section 2.1.2), in fp64."""
    return torch.einsum("thn,hnl->thl", q_THN.double(), w_uk_HNL.double())


def absorb_value(o_THL: Tensor, w_uv_HVL: Tensor) -> Tensor:
    """Heads' outputs [T, H, V] = W_UV o of each head, in fp64."""
    return torch.einsum("thl,hvl->thv", o_THL.double(), w_uv_HVL.double())
