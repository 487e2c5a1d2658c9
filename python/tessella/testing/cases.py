"""Shapes and random inputs, shared by tests and benches."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.formats import W4Weight

HURTFUL_M = (1, 2, 3, 5, 7, 16, 17, 63, 97, 127)
"""Token counts around the sizes of register tiles and row chunks."""

HURTFUL_NK = ((1, 1), (16, 128), (63, 127), (65, 200), (130, 384))
"""Features around the 64-wide panels, channels around the 128-wide blocks."""

PRECISIONS = (  # k8 as a share of K, granularity
    (1.0, "token"),
    (0.0, "token"),
    (0.5, "class"),
    (1.0, "class"),
    (0.0, "class"),
    (0.5, "block"),
    (1.0, "block"),
    (0.0, "block"),
)

LLM_NK = ((4096, 4096), (6144, 4096), (14336, 4096), (4096, 14336))
"""Linears of Llama-3-8B: what the CPU targets are stated for."""


def k8_of(share: float, K: int) -> int:
    """The INT8 channels that make up about `share` of K, in whole blocks."""
    blocks = -(-K // 128)
    return round(share * blocks) * 128


def random_weight(
    scheme: str, N: int, K: int, generator: torch.Generator, *, unit_scales: bool = False
) -> W4Weight:
    """A random weight that uses all codes and every legal zero; twolevel bytes reach 255.

    With `unit_scales` float scales are 1, so that results are integers.
    """
    t: dict[str, Tensor] = {}
    for name, (dtype, shape) in W4Weight.spec(scheme, N, K).items():
        if name == "codes":
            t[name] = torch.randint(0, 256, shape, generator=generator, dtype=dtype)
        elif dtype == torch.uint8:
            t[name] = torch.randint(1, 16, shape, generator=generator, dtype=dtype)
        else:
            s = torch.rand(shape, generator=generator) * 0.02 + 0.005
            t[name] = (torch.ones(shape) if unit_scales else s).to(dtype)
    if scheme == "twolevel":
        most = 255 - 15 * t["group_scales"].int()
        share = torch.randint(0, 5, most.shape, generator=generator)
        t["zeros"] = (most * share // 4).to(torch.uint8)
    return W4Weight(
        t["codes"], t.get("channel_scales"), t.get("group_scales"), t["zeros"], scheme, K
    )


def random_activations(
    M: int, K: int, dtype: torch.dtype, generator: torch.Generator, outliers: int = 2
) -> Tensor:
    """Gaussian activations with a few channels 30 times larger, as language models have."""
    x = torch.randn(M, K, generator=generator)
    hot = torch.randperm(K, generator=generator)[: min(outliers, K)]
    x[:, hot] *= 30
    return x.to(dtype)
