"""Codecs of latents: ``mla-int4``, ``mla-int8``, ``mla-bf16``, ``mla-int4-rint8`` and the like.

One symmetric scale a token (:mod:`tessella.formats_mla`). A rotation that evens out the channels
before they are coded costs nothing at run time: conversion folds it into the projections around.
"""

from __future__ import annotations

from dataclasses import dataclass

from tessella.formats_mla import MLACodec
from tessella.quant.kv.base import CodecError

PREFIX = "mla-"
"""What the names of these codecs begin with."""


@dataclass(frozen=True)
class LatentCodec:
    """How a cache keeps latents; what :class:`~tessella.quant.kv.CacheCodec` is to keys."""

    pages: MLACodec
    dtype = None
    parts = ()
    fit_tokens = 0
    token_exact = True
    by_channel = False

    @property
    def name(self) -> str:
        """As :func:`parse` takes it."""
        return PREFIX + self.pages.name

    def check(self, D: int) -> None:
        """Raise CodecError: heads of D channels have keys and values, and no latents."""
        raise CodecError(
            f"kv codec {self.name}: expected a model with latent attention, got heads of {D} "
            "channels; `tessella to-mla` converts one"
        )

    def bytes_per_token(self, L: int, R: int, Z: int) -> float:
        """Bytes of one token in one layer, scales included."""
        return self.pages.page_bytes(Z, L, R) / Z


def parse(name: str) -> LatentCodec:
    """A codec by its name. Raises CodecError."""
    try:
        return LatentCodec(MLACodec.parse(name.removeprefix(PREFIX)))
    except ValueError:
        raise CodecError(
            f"kv codec: expected mla-int4, mla-int8, mla-bf16, mla-fp16 or mla-fp32, optionally "
            f"-r<kind of the rope part>, got {name!r}"
        ) from None
