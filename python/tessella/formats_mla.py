"""Caches of latents (multi-head latent attention), as frozen dataclasses.

Letters: L latent rank, R rope dim, P pages, Z tokens of a page. A token of a layer is one latent of
L numbers, from which all heads' keys and values are made, and one rotary key of R numbers that all
heads share (DeepSeek-V2, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tessella.formats import _expect

MLA_VERSION = 1
"""Version of the page layout; a cache that is stored carries it."""

LATENT_KINDS = {"int4": 4, "int8": 8, "bf16": 16, "fp16": 16, "fp32": 32}
"""Bits of a number, by the name of its kind."""

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Kinds that are plain numbers."""

MOST_RANK, MOST_ROPE, MOST_HEADS = 512, 128, 128
"""Largest L, R and number of heads that kernels take."""


@dataclass(frozen=True)
class MLACodec:
    """How a page codes latents and rope keys.

    * `latent`: int4, int8, bf16, fp16 or fp32
    * `rope`: int8, bf16, fp16 or fp32; empty: as `latent`, and bf16 beside codes

    Codes are symmetric with one fp16 scale a token: ``real = q * scale``, q in -7..7 or -127..127.

    Raises ValueError on other values.
    """

    latent: str = "int4"
    rope: str = ""

    def __post_init__(self):
        if self.latent not in LATENT_KINDS:
            raise ValueError(
                f"MLACodec.latent: expected one of {', '.join(LATENT_KINDS)}, got {self.latent!r}"
            )
        if not self.rope:
            object.__setattr__(self, "rope", self._plain_rope)
        if self.rope not in LATENT_KINDS or self.rope == "int4":
            raise ValueError(f"MLACodec.rope: expected int8, bf16, fp16 or fp32, got {self.rope!r}")

    @property
    def _plain_rope(self) -> str:
        return self.latent if self.latent in FLOATS else "bf16"

    @property
    def name(self) -> str:
        """What ops take: "int4", "int8", "bf16", "int4-rint8", "int8-rfp16"..."""
        return self.latent + (f"-r{self.rope}" if self.rope != self._plain_rope else "")

    @classmethod
    def parse(cls, name: str) -> MLACodec:
        """The inverse of :attr:`name`. Raises ValueError on anything else."""
        latent, dash, rope = name.partition("-r")
        if latent not in LATENT_KINDS or rope not in (LATENT_KINDS if dash else [""]):
            raise ValueError(
                "codec: expected int4, int8, bf16, fp16 or fp32, optionally -r<rope part>, "
                f"got {name!r}"
            )
        return cls(latent, rope)

    @property
    def latent_bits(self) -> int:
        """Of a number of the latent."""
        return LATENT_KINDS[self.latent]

    @property
    def rope_bits(self) -> int:
        """Of a number of the rope key."""
        return LATENT_KINDS[self.rope]

    def parts(self, Z: int, L: int, R: int) -> dict[str, tuple[int, int]]:
        """(first byte, bytes) of every part of a page, in order."""
        sizes = {
            "latents": Z * L * self.latent_bits // 8,
            "rope": Z * R * self.rope_bits // 8,
            "scales": 2 * Z * (self.latent_bits <= 8),
            "rope_scales": 2 * Z * (self.rope_bits == 8 and R > 0),
        }
        parts, at = {}, 0
        for name, size in sizes.items():
            parts[name] = (at, size)
            at += size
        return parts

    def page_bytes(self, Z: int, L: int, R: int) -> int:
        """Bytes of a page of Z tokens: a multiple of Z."""
        return sum(size for _, size in self.parts(Z, L, R).values())


@dataclass(frozen=True)
class MLACache:
    """Pages of latents in the order of csrc/layout/mla.h: uint8 [P, codec.page_bytes(Z, L, R)].

    L is a multiple of 64 in 64..512, R a multiple of 32 in 0..128, Z a multiple of 16 in 16..256.

    Raises ValueError on another dtype or shape.
    """

    blob: Tensor
    codec: MLACodec
    Z: int
    L: int
    R: int

    def __post_init__(self):
        check_sizes("MLACache", self.L, self.R, self.Z)
        shape = (len(self.blob), self.codec.page_bytes(self.Z, self.L, self.R))
        _expect("MLACache", "blob", self.blob, torch.uint8, shape)

    @classmethod
    def empty(cls, P: int, Z: int, L: int, R: int, codec: MLACodec) -> MLACache:
        """Pages of zeros on the CPU."""
        check_sizes("MLACache", L, R, Z)
        return cls(torch.zeros(P, codec.page_bytes(Z, L, R), dtype=torch.uint8), codec, Z, L, R)


def check_sizes(what: str, L: int, R: int, Z: int = 16) -> None:
    """Raise ValueError, naming the limit, unless kernels can have latents of this shape."""
    if L not in range(64, MOST_RANK + 1, 64):
        raise ValueError(
            f"{what}: expected a latent rank that is a multiple of 64 in 64..{MOST_RANK}, got {L}"
        )
    if R not in range(0, MOST_ROPE + 1, 32):
        raise ValueError(
            f"{what}: expected a rope dim that is a multiple of 32 in 0..{MOST_ROPE}, got {R}"
        )
    if Z not in range(16, 257, 16):
        raise ValueError(f"{what}: expected a multiple of 16 in 16..256 tokens a page, got {Z}")
