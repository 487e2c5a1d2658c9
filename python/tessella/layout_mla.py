"""Pack and unpack pages of latents in plain torch, from the comment of csrc/layout/mla.h.

Codes are int8 [..., Z, n], plain numbers keep their dtype, scales are fp16 [..., Z] (None where the
codec has none). Shares no code with the C++ layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessella.formats_mla import FLOATS, MLACodec


@dataclass(frozen=True)
class LatentCodes:
    """The contents of pages [..., Z, L] and [..., Z, R], unpacked."""

    latents: Tensor
    rope: Tensor
    scales: Tensor | None = None
    rope_scales: Tensor | None = None


def _bytes(t: Tensor) -> Tensor:
    """Numbers [..., n] -> uint8 [..., n * itemsize]."""
    return t.contiguous().view(torch.uint8)


def pack_latents(c: LatentCodes, codec: MLACodec) -> Tensor:
    """Contents of pages -> blobs uint8 [..., page_bytes]."""
    *batch, Z, L = c.latents.shape
    R = c.rope.shape[-1]
    latents = c.latents
    if codec.latent == "int4":
        low, high = (latents + 8).to(torch.uint8).unflatten(-1, (L // 64, 2, 32)).unbind(-2)
        latents = (low | high << 4).flatten(-2)
    data = {
        "latents": _bytes(latents),
        "rope": _bytes(c.rope) if R else None,
        "scales": None if c.scales is None else _bytes(c.scales),
        "rope_scales": None if c.rope_scales is None else _bytes(c.rope_scales),
    }
    blob = torch.zeros(*batch, codec.page_bytes(Z, L, R), dtype=torch.uint8)
    for name, (at, size) in codec.parts(Z, L, R).items():
        if size:
            blob[..., at : at + size] = data[name].reshape(*batch, size)
    return blob


def unpack_latents(blob: Tensor, codec: MLACodec, Z: int, L: int, R: int) -> LatentCodes:
    """The inverse of :func:`pack_latents`."""
    batch = blob.shape[:-1]
    part = {
        n: blob[..., a : a + s].contiguous() if s else None
        for n, (a, s) in codec.parts(Z, L, R).items()
    }

    def numbers(data: Tensor | None, kind: str, n: int) -> Tensor:
        dtype = FLOATS.get(kind, torch.int8)
        if data is None:
            return torch.zeros(*batch, Z, 0, dtype=dtype)
        return data.view(dtype).reshape(*batch, Z, n)

    if codec.latent == "int4":
        both = part["latents"].reshape(*batch, Z, L // 64, 32)
        codes = torch.stack([both & 15, both >> 4], -2).flatten(-3)
        latents = codes.to(torch.int8) - 8
    else:
        latents = numbers(part["latents"], codec.latent, L)
    scales, rope_scales = (
        None if part[n] is None else part[n].view(torch.float16) for n in ("scales", "rope_scales")
    )
    return LatentCodes(latents, numbers(part["rope"], codec.rope, R), scales, rope_scales)
