"""QoQ's exact changes of a model (QServe, sections 4.2 and 4.3), as steps of a recipe.

Block-input rotation, SmoothAttention, block-output smoothing and activation-aware reordering; the
folds themselves are in :mod:`tessella.quant.layer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tessella.quant import layer as layers
from tessella.quant import rtn
from tessella.quant.calibrate import SITES
from tessella.quant.error import output_error, some_rows
from tessella.quant.layer import Layer
from tessella.quant.rotation import Rotation
from tessella.quant.steps import (
    PERMUTE,
    ROTATE,
    SCALE,
    STATS,
    RecipeError,
    Step,
    expect_bool,
    expect_number,
)

ALPHAS = tuple(i / 20 for i in range(13))
"""Exponents that a search tries besides leaving the channels as they are."""

PROBES = 256
"""Out features on which a search compares errors."""

FLOOR = 1e-4
"""Smallest magnitude that counts, as a part of the largest: keeps factors finite."""


@dataclass(frozen=True)
class Rotate(Step):
    """Turn the residual stream, after folding the norms' gains into the linears.

    A channel that is large for all tokens is spread over all channels. `values` turns each head's
    values too (o_proj turns them back). A tied output head gets a weight of its own.
    """

    seed: int = 0
    values: bool = False
    stage: ClassVar[int] = ROTATE

    def __post_init__(self):
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise RecipeError(
                f"recipe: steps.rotate.seed: expected a whole number, got {self.seed!r}"
            )
        expect_bool("steps.rotate.values", self.values)

    @property
    def turns(self) -> bool:
        return True

    def change(self, layer: Layer) -> None:
        layers.fold_norms(layer)
        K = layer.tensors["self_attn.o_proj.weight"].shape[0]
        layers.rotate(layer, Rotation(K, self.seed))
        if self.values:
            layers.rotate_values(layer, Rotation(layer.heads.D, None))

    def change_outer(self, role: str, rows: Tensor, gain_K: Tensor) -> Tensor:
        if role == "norm":
            return torch.ones_like(rows)
        turn = Rotation(rows.shape[-1], self.seed)
        return turn(rows * gain_K.to(rows) if role == "head" else rows)


@dataclass(frozen=True)
class SmoothAttention(Step):
    """Move the outlier channels of keys into queries, which stay in 16 bits.

    k / d and q * d with d = r^alpha, where r is the largest length of a RoPE pair of the key's
    channels: at least its largest magnitude after RoPE, and RoPE commutes with the factor.
    """

    alpha: float = 0.5
    stage: ClassVar[int] = SCALE

    def __post_init__(self):
        expect_number("steps.smooth_attention.alpha", self.alpha, 0, 1)

    @property
    def needs(self) -> frozenset[str]:
        return STATS

    def change(self, layer: Layer) -> None:
        r = layer.key_radius
        if layer.heads.qk_norm:  # one gain for all heads
            r = r.amax(0)
        r = r.clamp_min(float(r.max()) * FLOOR or 1.0)
        layers.scale_keys(layer, r**self.alpha)


@dataclass(frozen=True)
class SmoothOutput(Step):
    """Even out the channels that the block's last linears read (`sites`: "down", "o").

    x / d with d = max|x|^alpha / max|w|^(1 - alpha) for each channel. With `search`, alpha is the
    one of :data:`ALPHAS` with the smallest error of the site's results, activations quantised, or
    none where nothing is better than the channels as they are.
    """

    sites: tuple[str, ...] = ("down",)
    alpha: float = 0.3
    search: bool = True
    stage: ClassVar[int] = SCALE

    def __post_init__(self):
        _check_sites("steps.smooth_output.sites", self, ("down", "o"))
        expect_number("steps.smooth_output.alpha", self.alpha, 0, 1)
        expect_bool("steps.smooth_output.search", self.search)

    @property
    def needs(self) -> frozenset[str]:
        return STATS

    def change(self, layer: Layer) -> None:
        for site in self.sites:
            tried = [_factors(layer, site, a) for a in ALPHAS] if self.search else []
            tried = tried or [_factors(layer, site, self.alpha)]
            if self.search:
                same = torch.ones_like(tried[0])
                tried = sorted([same, *tried], key=lambda d: _error(layer, site, d))
            layers.scale(layer, site, 1 / tried[0])


@dataclass(frozen=True)
class Reorder(Step):
    """Sort channels by the size of their activations, so that a group holds alike ones.

    The inputs of down_proj are sorted by permuting the linears before; other `sites` permute
    activations when they are quantised.
    """

    sites: tuple[str, ...] = ("down",)
    stage: ClassVar[int] = PERMUTE

    def __post_init__(self):
        _check_sites("steps.reorder.sites", self, tuple(SITES))

    @property
    def needs(self) -> frozenset[str]:
        return STATS

    @property
    def permutes(self) -> tuple[str, ...]:
        return tuple(site for site in self.sites if site != "down")

    def change(self, layer: Layer) -> None:
        for site in self.sites:
            amax = layer.stats[site].amax
            layers.permute(layer, site, amax.argsort(descending=True, stable=True))


def _check_sites(where: str, step: Step, valid: tuple[str, ...]) -> None:
    sites = step.sites
    if isinstance(sites, str) or not sites or any(s not in valid for s in sites):
        raise RecipeError(
            f"recipe: {where}: expected a list of sites from {', '.join(valid)}, got {sites!r}"
        )
    object.__setattr__(step, "sites", tuple(sites))


def _factors(layer: Layer, site: str, alpha: float) -> Tensor:
    """What a site's channels are divided by: [K], for "o" [J * D]; geometric mean 1."""
    x = layer.stats[site].amax
    w = torch.stack([layer.tensors[name].abs().amax(0) for name in layer.columns(site)]).amax(0)
    if site == "o":
        heads = layer.heads
        x, w = (t.view(heads.J, -1, heads.D).amax(1).reshape(-1) for t in (x, w))
    x, w = (t.clamp_min(float(t.max()) * FLOOR or 1.0).to(x) for t in (x, w))
    d = x**alpha / w ** (1 - alpha)
    return d / d.log().mean().exp()


def _error(layer: Layer, site: str, d: Tensor) -> float:
    """Error of some of the site's results if its channels were divided by d."""
    target = layer.target
    d = layers.by_query_head(d, layer.heads) if site == "o" else d
    x, total = layer.stats[site].rows / d, 0.0
    for name in layer.columns(site):
        w = some_rows(layer.tensors[name], PROBES) * d.to(layer.tensors[name])
        q = rtn.quantize(w, target.scheme)
        k8 = target.k8_of(w.shape[1])
        total += output_error(w, q, x, k8=k8, granularity=target.granularity)
    return total
