"""The packed formats, as frozen dataclasses: the contract between algorithms, kernels and devices.

One formula holds for every format: ``real = (q - z) * s``. Codes are exact; scales are floats.

Letters: M tokens, N out features, K in features, G group size, and Kp = K rounded up to a
multiple of 128 (:data:`BLOCK_K`). Channels K..Kp-1 are padding: activation codes are zero there,
so whatever the weight holds does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORMAT_VERSION = 1
"""Version of every layout in this file; stored in checkpoints, checked when they are read."""

BLOCK_K = 128
"""Channels in one activation block: the unit of precision (INT8 or INT4) and of block scales."""

SCHEMES: dict[str, int] = {"channel": 0, "g32": 32, "g64": 64, "g128": 128, "twolevel": 128}
"""Weight schemes and their group size G (0: one group of all K)."""

GRANULARITIES = ("token", "class", "block")
"""Activation scales: per token [M], token and precision [2, M], token and block [Kp/128, M]."""

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""dtypes of activations and results (CUDA: the first two)."""


def padded_k(K: int) -> int:
    """K rounded up to whole blocks of 128 channels."""
    return -(-K // BLOCK_K) * BLOCK_K


def group_size(scheme: str, K: int) -> int:
    """Group size G of `scheme` for K in features. Raises ValueError on an unknown scheme."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    return SCHEMES[scheme] or padded_k(K)


def _expect(owner: str, name: str, t: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]):
    """Raise ValueError unless `t` has this dtype and shape."""
    if t is None or t.dtype != dtype or tuple(t.shape) != shape:
        got = "None" if t is None else f"{t.dtype} {tuple(t.shape)}"
        raise ValueError(f"{owner}.{name}: expected {dtype} {shape}, got {got}")


@dataclass(frozen=True)
class W4Weight:
    """A 4-bit weight [N, K] in the canonical, unshuffled order that checkpoints store.

    Two codes a byte along K, the even channel in the low nibble. What the scales mean depends
    on `scheme` (one of :data:`SCHEMES`):

    ============ ============================== ======================== =======================
    scheme       channel_scales                 group_scales             zeros
    ============ ============================== ======================== =======================
    channel      fp32 [N]                       --                       uint8 [N], 0..15
    g32/g64/g128 --                             fp16 [N, Kp/G]           uint8 [N, Kp/G], 0..15
    twolevel     fp32 [N]                       uint8 [N, Kp/128], 1..16 uint8 [N, Kp/128]
    ============ ============================== ======================== =======================

    * channel: ``real = (q - zeros[n]) * channel_scales[n]``
    * groups: ``real = (q - zeros[n, g]) * group_scales[n, g]``
    * twolevel: ``real = (q * group_scales[n, g] + zeros[n, g] - 128) * channel_scales[n]``;
      `zeros` is the byte that code 0 maps to, and the byte never exceeds 255. QServe's
      ``(q - z) * s1`` and LiquidQuant's shifted form are special cases (QServe section 4.1,
      LiquidGEMM section 4).

    Raises ValueError when a tensor has another dtype or shape than the table says.
    """

    codes: Tensor  # uint8 [N, Kp/2]
    channel_scales: Tensor | None
    group_scales: Tensor | None
    zeros: Tensor
    scheme: str
    K: int

    def __post_init__(self):
        N, Kp, G = self.codes.shape[0], padded_k(self.K), group_size(self.scheme, self.K)
        _expect("W4Weight", "codes", self.codes, torch.uint8, (N, Kp // 2))
        per_group = (N,) if self.scheme == "channel" else (N, Kp // G)
        _expect("W4Weight", "zeros", self.zeros, torch.uint8, per_group)
        if self.scheme in ("channel", "twolevel"):
            _expect("W4Weight", "channel_scales", self.channel_scales, torch.float32, (N,))
        if self.scheme != "channel":
            dtype = torch.uint8 if self.scheme == "twolevel" else torch.float16
            _expect("W4Weight", "group_scales", self.group_scales, dtype, per_group)

    @property
    def N(self) -> int:
        """Out features."""
        return self.codes.shape[0]

    @property
    def G(self) -> int:
        """Group size along K."""
        return group_size(self.scheme, self.K)

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by field name, absent ones left out: what a checkpoint holds."""
        fields = ("codes", "channel_scales", "group_scales", "zeros")
        return {f: t for f in fields if (t := getattr(self, f)) is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], scheme: str, K: int) -> W4Weight:
        """The inverse of :meth:`tensors`. Raises TypeError on an unknown or missing field."""
        absent = dict.fromkeys(("channel_scales", "group_scales"))
        return cls(**{**absent, **tensors}, scheme=scheme, K=K)

    @staticmethod
    def spec(scheme: str, N: int, K: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every tensor that :meth:`tensors` of an [N, K] weight returns."""
        Kp, G = padded_k(K), group_size(scheme, K)
        per_group = (N,) if scheme == "channel" else (N, Kp // G)
        spec = {"codes": (torch.uint8, (N, Kp // 2)), "zeros": (torch.uint8, per_group)}
        if scheme in ("channel", "twolevel"):
            spec["channel_scales"] = (torch.float32, (N,))
        if scheme != "channel":
            dtype = torch.uint8 if scheme == "twolevel" else torch.float16
            spec["group_scales"] = (dtype, per_group)
        return spec


@dataclass(frozen=True)
class PackedW4:
    """A :class:`W4Weight` in the order that one device's kernels stream it (csrc/layout/w4.h).

    The blob is uint8 [bytes]; :func:`tessella.ops.w4_unpack` gives the canonical form back.
    """

    blob: Tensor
    scheme: str
    N: int
    K: int


@dataclass(frozen=True)
class ActBlocks:
    """Quantised activations [M, K], block-major: 128 channels of all tokens, then the next 128.

    The first K8 channels are INT8, the others INT4 in two's complement, two a byte, the even
    channel in the low nibble (COMET's FMPQ: outlier channels are permuted to the front).
    ``real = code * scale``; codes lie in -127..127 and -7..7.

    * codes8 int8 [K8/128, M, 128], codes4 uint8 [(Kp-K8)/128, M, 64]
    * sums int32 [Kp/128, M]: sum of the codes of each block, which folds weight zero points
    * scales fp32, by `granularity`: "token" [M] (needs one precision), "class" [2, M] (INT8
      then INT4 scale of each token), "block" [Kp/128, M]

    Raises ValueError when a tensor has another dtype or shape than this.
    """

    codes8: Tensor
    codes4: Tensor
    sums: Tensor
    scales: Tensor
    granularity: str

    def __post_init__(self):
        B8, B4, M = self.codes8.shape[0], self.codes4.shape[0], self.codes8.shape[1]
        _expect("ActBlocks", "codes8", self.codes8, torch.int8, (B8, M, BLOCK_K))
        _expect("ActBlocks", "codes4", self.codes4, torch.uint8, (B4, M, BLOCK_K // 2))
        _expect("ActBlocks", "sums", self.sums, torch.int32, (B8 + B4, M))
        shape = scales_shape(self.granularity, M, B8 + B4)
        _expect("ActBlocks", "scales", self.scales, torch.float32, shape)
        if self.granularity == "token" and B8 and B4:
            raise ValueError(
                "ActBlocks.granularity: 'token' needs one precision, got "
                f"K8={B8 * BLOCK_K} of Kp={(B8 + B4) * BLOCK_K}; use 'class' or 'block'"
            )

    @property
    def M(self) -> int:
        """Tokens."""
        return self.codes8.shape[1]

    @property
    def K8(self) -> int:
        """Channels stored in INT8."""
        return self.codes8.shape[0] * BLOCK_K

    @property
    def Kp(self) -> int:
        """Channels, padding included."""
        return self.sums.shape[0] * BLOCK_K


def scales_shape(granularity: str, M: int, blocks: int) -> tuple[int, ...]:
    """Shape of activation scales. Raises ValueError on an unknown granularity."""
    shapes = {"token": (M,), "class": (2, M), "block": (blocks, M)}
    if granularity not in shapes:
        raise ValueError(
            f"granularity: expected one of {', '.join(GRANULARITIES)}, got {granularity!r}"
        )
    return shapes[granularity]
