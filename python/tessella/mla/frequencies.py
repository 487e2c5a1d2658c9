"""Angles of RoPE: which frequencies a configuration means, for the kinds that survive a collapse.

A converted model's rope key of R = D / c channels uses every c-th frequency of the original. For
plain RoPE, for linear scaling and for Llama 3's, which map each frequency by itself, these are the
frequencies of a head of width R under the same settings. Others depend on the width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tessella.mla.shape import MLAError

KINDS = ("default", "linear", "llama3")


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The `rope_parameters` of a model's config.json, also from the older fields.

    Raises MLAError for a kind of scaling that a conversion does not keep.
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found["rope_type"] = found.pop("type", None) or found.get("rope_type") or "default"
    found.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    if found["rope_type"] not in KINDS:
        raise MLAError(
            f"rope: expected a rope_type of {', '.join(KINDS)}, whose frequencies do not depend "
            f"on the width that they are made for; got {found['rope_type']!r}"
        )
    if (part := found.get("partial_rotary_factor") or 1) != 1:
        raise MLAError(f"rope: expected RoPE on whole heads, got partial_rotary_factor {part}")
    return found


def frequencies(rope: dict[str, Any], width: int) -> Tensor:
    """fp64 [width / 2]: radians a position, for :func:`settings` and a head of `width`."""
    steps = torch.arange(0, width, 2, dtype=torch.float64) / width
    inv = float(rope["rope_theta"]) ** -steps
    if rope["rope_type"] == "linear":
        return inv / rope["factor"]
    if rope["rope_type"] == "llama3":
        return _llama3(inv, rope)
    return inv


def _llama3(inv: Tensor, rope: dict[str, Any]) -> Tensor:
    """Long wavelengths stretched by `factor`, short ones kept, a blend between the two."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * inv / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inv * (kept + (1 - kept) / rope["factor"])
