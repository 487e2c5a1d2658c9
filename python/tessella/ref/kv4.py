"""Reference of kv4: coding of keys and values, and attention over coded pages."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.formats_kv import KV4Pages, KVCodec, KVFactors, MsmBatch
from tessella.layout_kv import PageCodes, pack_page, unpack_page
from tessella.ref import msm

FLAT = 2.0**-10
"""Where the range of a group is this share of its magnitude or less, it is stored as a constant."""


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8, scale fp16, zero fp16) of groups x [..., G]; scale and zero are [...].

    In fp32, each step rounded once, so that kernels give the same codes::

        s = fp16((hi - lo) / qmax);  inv = 1 / s;  z = fp16(-lo * inv);  q = rne(x * inv + z)

    A nearly constant group is ``(0 - z) * s`` with s = \\|c\\|; inf, NaN and scales over fp16 give
    a NaN scale.
    """
    x = x.float()
    qmax = x.new_tensor(2.0**bits - 1)
    lo, hi = x.amin(-1), x.amax(-1)
    bad = ~torch.isfinite(x).all(-1)
    s = ((hi - lo) / qmax).half()
    bad |= torch.isinf(s)
    flat = ((hi - lo) <= torch.maximum(lo.abs(), hi.abs()) * FLAT) | (s == 0)
    inv = 1.0 / s.float()
    z = (-lo * inv).half()
    q = torch.round(x * inv[..., None] + z.float()[..., None]).clamp(0, float(qmax))
    c = 0.5 * (lo + hi)
    s, z = torch.where(flat, c.abs().half(), s), torch.where(flat, (0.0 - torch.sign(c)).half(), z)
    nothing = flat | bad
    s, z = s.masked_fill(bad, torch.nan), z.masked_fill(bad, 0)
    return q.masked_fill(nothing[..., None], 0).to(torch.uint8), s, z


def _fold(x_TJD: Tensor, factor: Tensor | None, rows: Tensor) -> Tensor:
    """x[block] @ factor[row, head, block], in fp32."""
    if factor is None:
        return x_TJD
    f = factor[rows.long()]  # T, J, blocks, m, m
    x = x_TJD.reshape(*x_TJD.shape[:2], f.shape[2], 1, f.shape[3])
    return (x @ f.to(x.dtype)).reshape(x_TJD.shape)


def kv4_append(
    k_TJD: Tensor,
    v_TJD: Tensor,
    slots: Tensor,
    cache: KV4Pages,
    rope: tuple[Tensor, Tensor] | None = None,
    factors: KVFactors | None = None,
    rows: Tensor | None = None,
    tail_row: Tensor | None = None,
) -> None:
    """Code keys (rotated, mean subtracted, folded) and values into their slots."""
    f = factors or KVFactors()
    T, codec, Z, D = len(slots), cache.codec, cache.Z, cache.D
    rows = torch.zeros(T, dtype=torch.int32) if rows is None else rows
    k = k_TJD.float() if rope is None else msm.rotate(k_TJD, *rope)
    if f.k_mean is not None:
        k = k - f.k_mean[rows.long()]
    k, v = _fold(k, f.k_fold, rows), _fold(v_TJD.float(), f.v_fold, rows)
    for t, slot in enumerate(slots.tolist()):
        if not 0 <= slot < len(cache.blob) * Z:
            continue
        page, at = divmod(slot, Z)
        c = unpack_page(cache.blob[page], codec, Z, D)
        groups = codec.groups(D)
        codes, s, z = quantise(v[t].unflatten(-1, (groups, -1)), codec.v_bits)
        c.v[:, at], c.v_scales[:, at], c.v_zeros[:, at] = codes.flatten(-2), s, z
        if codec.k_axis == "token":
            codes, s, z = quantise(k[t].unflatten(-1, (groups, -1)), codec.k_bits)
            c.k[:, at], c.k_scales[:, at], c.k_zeros[:, at] = codes.flatten(-2), s, z
        else:
            tail = cache.k_tail[int(tail_row[t])]
            tail[:, at] = k[t].to(tail.dtype)
            if at == Z - 1:
                codes, s, z = quantise(tail.transpose(-1, -2), codec.k_bits)
                c.k.copy_(codes.transpose(-1, -2))
                c.k_scales.copy_(s)
                c.k_zeros.copy_(z)
        cache.blob[page] = pack_page(c, codec)


def dequantise(c: PageCodes, codec: KVCodec, D: int) -> tuple[Tensor, Tensor]:
    """Keys and values [..., Z, D] in fp64 that the contents of pages stand for."""
    G = D // codec.groups(D)

    def real(q, s, z):
        if s.dim() == q.dim():
            s, z = s.repeat_interleave(G, -1), z.repeat_interleave(G, -1)
        else:
            s, z = s[..., None, :], z[..., None, :]
        return (q.double() - z.double()) * s.double()

    return real(c.k, c.k_scales, c.k_zeros), real(c.v, c.v_scales, c.v_zeros)


def gather(
    cache: KV4Pages, batch: MsmBatch, b: int, tail_row: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keys and values [kv_len, J, D] of request b as they were coded: folded, mean subtracted."""
    Z, kv_len = cache.Z, int(batch.kv_len[b])
    page = batch.block_table[b, : -(-kv_len // Z)].long()
    c = unpack_page(cache.blob[page], cache.codec, Z, cache.D)
    k, v = dequantise(c, cache.codec, cache.D)
    if cache.k_tail is not None and kv_len % Z:
        k[-1] = cache.k_tail[int(tail_row[b])].double()
    k, v = (t.transpose(1, 2).flatten(0, 1)[:kv_len] for t in (k, v))
    return k, v


def kv4_attn(
    q_THD: Tensor,
    cache: KV4Pages,
    batch: MsmBatch,
    *,
    factors: KVFactors | None = None,
    rows: Tensor | None = None,
    tail_row: Tensor | None = None,
    **how,
) -> tuple[Tensor, Tensor]:
    """Attention over coded pages in fp64; keys and values are unfolded first, `how` as in msm."""
    f = factors or KVFactors()

    def keys_values(b: int) -> tuple[Tensor, Tensor]:
        k, v = gather(cache, batch, b, tail_row)
        row = torch.full((len(k),), 0 if rows is None else int(rows[b]))
        if f.q_fold is not None:  # q (k' q_fold^T)^T = (q q_fold) k'^T
            k = _fold(k, f.q_fold.double().transpose(-1, -2), row)
        if f.k_mean is not None:
            k = k + f.k_mean[row].double()
        return k, _fold(v, f.o_fold, row)

    return msm.attend(q_THD, batch, keys_values, **how)
