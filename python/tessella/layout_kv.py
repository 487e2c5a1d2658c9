"""Pack and unpack coded key/value pages in plain torch, from the comment of csrc/layout/kv.h.

Codes are uint8 [..., Z, D] (values below 2^bits); scales and zeros fp16 [..., Z, groups], or
[..., D] where keys are coded per channel. Shares no code with the C++ layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessella.formats_kv import KVCodec


@dataclass(frozen=True)
class PageCodes:
    """The contents of pages [..., Z, D], unpacked."""

    k: Tensor
    v: Tensor
    k_scales: Tensor
    k_zeros: Tensor
    v_scales: Tensor
    v_zeros: Tensor


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n, bytes] -> bytes [..., bytes]: code i of a byte at bit i * bits."""
    out = torch.zeros_like(codes[..., 0, :])
    for i in range(codes.shape[-2]):
        out |= codes[..., i, :] << (bits * i)
    return out


def _unpack(data: Tensor, bits: int) -> Tensor:
    return torch.stack([data >> (bits * i) & (2**bits - 1) for i in range(8 // bits)], -2)


def pack_page(c: PageCodes, codec: KVCodec) -> Tensor:
    """Contents of pages [..., Z, D] -> blobs uint8 [..., page_bytes]."""
    *batch, Z, D = c.k.shape
    nk, nv, Dv = 8 // codec.k_bits, 8 // codec.v_bits, codec.padded(D)
    blob = c.k.new_zeros(*batch, codec.page_bytes(Z, D))
    k = c.k.view(*batch, Z // 16, 16, D // (4 * nk), nk, 4)  # block, token, step, code, channel
    k = k.movedim(-4, -2)  # block, step, code, token, channel
    v = torch.nn.functional.pad(c.v, (0, Dv - D)).view(*batch, Z // 4, 4, Dv // (16 * nv), nv, 16)
    v = v.movedim(-4, -1)  # quad, step, code, channel, token
    rows = {
        name: t if name[0] == "k" and codec.k_axis == "channel" else t.transpose(-1, -2)
        for name in ("k_scales", "k_zeros", "v_scales", "v_zeros")
        for t in (getattr(c, name),)
    }
    data = {
        "k_codes": _pack(k.flatten(-2), codec.k_bits),
        "v_codes": _pack(v.flatten(-2), codec.v_bits),
    } | {name: t.contiguous().view(torch.uint8) for name, t in rows.items()}
    for name, (at, size) in codec.parts(Z, D).items():
        blob[..., at : at + size] = data[name].reshape(*batch, size)
    return blob


def unpack_page(blob: Tensor, codec: KVCodec, Z: int, D: int) -> PageCodes:
    """The inverse of :func:`pack_page`."""
    batch, Dv = blob.shape[:-1], codec.padded(D)
    nk, nv = 8 // codec.k_bits, 8 // codec.v_bits
    part = {n: blob[..., a : a + s] for n, (a, s) in codec.parts(Z, D).items()}
    k = _unpack(part["k_codes"].reshape(*batch, Z // 16, D // (4 * nk), 64), codec.k_bits)
    k = k.unflatten(-1, (16, 4)).movedim(-2, -4)  # block, token, step, code, channel
    v = _unpack(part["v_codes"].reshape(*batch, Z // 4, Dv // (16 * nv), 64), codec.v_bits)
    v = v.unflatten(-1, (16, 4)).movedim(-1, -4)  # quad, token, step, code, channel

    def rows(name: str) -> Tensor:
        t = part[name].contiguous().view(torch.float16)
        if name[0] == "k" and codec.k_axis == "channel":
            return t
        return t.reshape(*batch, codec.groups(D), Z).transpose(-1, -2).contiguous()

    return PageCodes(
        k.reshape(*batch, Z, D),
        v.reshape(*batch, Z, Dv)[..., :D].contiguous(),
        *(rows(n) for n in ("k_scales", "k_zeros", "v_scales", "v_zeros")),
    )
