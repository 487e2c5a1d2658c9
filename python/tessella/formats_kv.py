"""Key/value caches and the batches that attend to them, as frozen dataclasses.

Letters: B requests, T query tokens in all, H query heads, J kv heads, D head dim, P pages, Z tokens
of a page, G channels that share a scale, F rows of per-sequence factors, m channels of a factor
block. One formula holds for coded pages too: ``real = (q - z) * s``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from tessella.formats import FLOAT_DTYPES, _expect

KV_VERSION = 1
"""Version of the coded page layout; a cache that is stored carries it."""

MASKS = {"full": 0, "causal": 1, "window": 2, "tree": 3}
"""Codes of the mask kinds, one a request."""

_NAME = re.compile(r"k([248])v([248])(?:-g(\d+))?(-channel)?")


@dataclass(frozen=True)
class KVCodec:
    """How a page codes keys and values.

    * `k_bits`, `v_bits`: 8, 4 or 2
    * `group`: channels that share a scale and a zero, a multiple of 16; 0: the whole head
    * `k_axis`: "token" scales keys per (token, group); "channel" per (page, channel), as KIVI does
      (section 3); values are always scaled per (token, group)

    Raises ValueError on other values.
    """

    k_bits: int = 4
    v_bits: int = 4
    group: int = 0
    k_axis: str = "token"

    def __post_init__(self):
        for name in ("k_bits", "v_bits"):
            if getattr(self, name) not in (2, 4, 8):
                raise ValueError(f"KVCodec.{name}: expected 2, 4 or 8, got {getattr(self, name)}")
        if self.group < 0 or self.group % 16:
            raise ValueError(
                f"KVCodec.group: expected 0 or a multiple of 16 channels, got {self.group}"
            )
        if self.k_axis not in ("token", "channel"):
            raise ValueError(f"KVCodec.k_axis: expected token or channel, got {self.k_axis!r}")

    @property
    def name(self) -> str:
        """What ops take: "k4v4", "k8v8", "k4v2-g64", "k4v4-g32-channel"..."""
        group = f"-g{self.group}" if self.group else ""
        return f"k{self.k_bits}v{self.v_bits}{group}" + "-channel" * (self.k_axis == "channel")

    @classmethod
    def parse(cls, name: str) -> KVCodec:
        """The inverse of :attr:`name`. Raises ValueError on anything else."""
        m = _NAME.fullmatch(name)
        if m is None:
            raise ValueError(
                "codec: expected k{8,4,2}v{8,4,2}, optionally -g<channels> and -channel, "
                f"got {name!r}"
            )
        return cls(int(m[1]), int(m[2]), int(m[3] or 0), "channel" if m[4] else "token")

    def groups(self, D: int) -> int:
        """Scales of a token and head. Raises ValueError when D is not whole groups."""
        if self.group and D % self.group:
            raise ValueError(f"codec {self.name}: expected D a multiple of {self.group}, got D={D}")
        return D // self.group if self.group else 1

    def padded(self, D: int) -> int:
        """D, or for values D rounded up to the channels of a 64-byte step."""
        step = 16 * (8 // self.v_bits)
        return -(-D // step) * step

    def parts(self, Z: int, D: int) -> dict[str, tuple[int, int]]:
        """(first byte, bytes) of every part of a page of one kv head, in order."""
        rows = self.groups(D) * Z * 2
        k_rows = D * 2 if self.k_axis == "channel" else rows
        step = 4 * (8 // self.k_bits)
        sizes = {
            "k_codes": Z * (-(-D // step) * step) * self.k_bits // 8,
            "v_codes": Z * self.padded(D) * self.v_bits // 8,
            "k_scales": k_rows,
            "k_zeros": k_rows,
            "v_scales": rows,
            "v_zeros": rows,
        }
        parts, at = {}, 0
        for name, size in sizes.items():
            parts[name] = (at, size)
            at = -(-(at + size) // 16) * 16
        return parts

    def page_bytes(self, Z: int, D: int) -> int:
        """Bytes of a page of Z tokens and one kv head: a multiple of Z."""
        at, size = self.parts(Z, D)["v_zeros"]
        return -(-(at + size) // Z) * Z


PAGE_DTYPES = (*FLOAT_DTYPES, torch.float8_e4m3fn)
"""Of uncoded pages."""


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as pages of this dtype keep it: E4M3 has no infinity and ends at 448."""
    if dtype == torch.float8_e4m3fn:
        x = x.float().clamp(-448, 448)
    return x.to(dtype)


@dataclass(frozen=True)
class KVPages:
    """Pages of plain numbers: bf16, fp16, E4M3 or (CPU) fp32 [P, J, 2, Z, D], keys then values.

    E4M3 (``torch.float8_e4m3fn``) goes with queries of any dtype and has no scale: what is appended
    is rounded to nearest and ends at 448. Where keys or values need one, divide them by it before,
    and multiply the scores (``scale``) or the result.

    Raises ValueError on another dtype or shape.
    """

    pages: Tensor

    def __post_init__(self):
        t = self.pages
        if t.dtype not in PAGE_DTYPES or t.dim() != 5 or t.shape[2] != 2:
            raise ValueError(
                "KVPages.pages: expected bfloat16, float16, float32 or float8_e4m3fn "
                f"[P, J, 2, Z, D], got {t.dtype} {tuple(t.shape)}"
            )

    @classmethod
    def empty(cls, P: int, J: int, Z: int, D: int, dtype=torch.bfloat16, device="cpu") -> KVPages:
        """Pages of zeros."""
        return cls(torch.zeros(P, J, 2, Z, D, dtype=dtype, device=device))

    @property
    def Z(self) -> int:
        """Tokens of a page."""
        return self.pages.shape[3]

    @property
    def D(self) -> int:
        """Head dim."""
        return self.pages.shape[4]


@dataclass(frozen=True)
class KV4Pages:
    """Coded pages: one blob for each (page, kv head), in the order of csrc/layout/kv.h.

    * blob: uint8 [P, J, codec.page_bytes(Z, D)]
    * k_tail: with ``k_axis="channel"`` [S, J, Z, D] in bf16, fp16 or fp32: the keys of the page
      that is not full yet, of up to S sequences; else None

    Raises ValueError on another dtype or shape.
    """

    blob: Tensor
    codec: KVCodec
    Z: int
    D: int
    k_tail: Tensor | None = None

    def __post_init__(self):
        if self.Z not in range(16, 257, 16) or self.D not in range(16, 257, 16):
            raise ValueError(
                f"KV4Pages: expected Z and D multiples of 16 in 16..256, got Z={self.Z} D={self.D}"
            )
        shape = (*self.blob.shape[:2], self.codec.page_bytes(self.Z, self.D))
        _expect("KV4Pages", "blob", self.blob, torch.uint8, shape)
        tail = self.k_tail
        if (tail is not None) != (self.codec.k_axis == "channel"):
            raise ValueError("KV4Pages.k_tail: expected a tensor with k_axis='channel', else None")
        if tail is not None:
            if tail.dtype not in FLOAT_DTYPES:
                raise ValueError(f"KV4Pages.k_tail: expected a float dtype, got {tail.dtype}")
            shape = (tail.shape[0], self.blob.shape[1], self.Z, self.D)
            _expect("KV4Pages", "k_tail", tail, tail.dtype, shape)

    @classmethod
    def empty(
        cls, P: int, J: int, Z: int, D: int, codec: KVCodec, sequences: int = 0, dtype=torch.float32
    ) -> KV4Pages:
        """Pages of zeros on the CPU; `sequences` rows of tail where the codec has one."""
        blob = torch.zeros(P, J, codec.page_bytes(Z, D), dtype=torch.uint8)
        channel = codec.k_axis == "channel"
        tail = torch.zeros(sequences, J, Z, D, dtype=dtype) if channel else None
        return cls(blob, codec, Z, D, tail)


@dataclass(frozen=True)
class KVFactors:
    """What is done to keys and values before coding, and undone around attention.

    Row f of every tensor belongs to a sequence; all are fp32 and optional. With x[block] the m
    channels of a block::

        k' = (k - k_mean)[block] @ k_fold      q' = q[block] @ q_fold,  q_fold = inv(k_fold)^T
        v' = v[block] @ v_fold                 o  = o'[block] @ o_fold, o_fold = inv(v_fold)

    * k_mean [F, J, D]; the folds [F, J, D/m, m, m]

    A Hadamard rotation is a fold with itself; DecoQuant's second factor is one (ACL 2024, section
    3.2), so no product rebuilds the keys.
    """

    k_mean: Tensor | None = None
    k_fold: Tensor | None = None
    q_fold: Tensor | None = None
    v_fold: Tensor | None = None
    o_fold: Tensor | None = None


@dataclass(frozen=True)
class MsmBatch:
    """What one launch of attention works on: B requests with ragged queries over paged keys.

    * block_table int32 [B, most]: pages of each request; entries past ceil(kv_len / Z) are not read
    * cu_q int32 [B + 1]: request b has query tokens cu_q[b]..cu_q[b + 1] - 1
    * kv_len int32 [B]: keys of a request, its query tokens included
    * mask int32 [B], codes of :data:`MASKS`, or None: all causal
    * tree_bits int64 [N, W], or None: bit j % 64 of word j // 64 of row tree_row[b] + i says that
      query token i sees query token j
    * tree_row int32 [B], or None: first row of a request's bits, -1 without a tree
    """

    block_table: Tensor
    cu_q: Tensor
    kv_len: Tensor
    mask: Tensor | None = None
    tree_bits: Tensor | None = None
    tree_row: Tensor | None = None
