"""One decoder layer while a recipe's steps work on it, and the exact changes that they may make.

Every function here leaves what the layer computes as it was (in exact arithmetic): what one tensor
loses another gains, and the statistics of the inputs change along. Weights are [N, K], biases [N].

Letters: N out features, K in features, H query heads, J kv heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tessella.formats import BLOCK_K, padded_k
from tessella.quant.calibrate import SITES, Stats

NORMS = {"attn": "input_layernorm.weight", "mlp": "post_attention_layernorm.weight"}
"""Gains of the norm that a site reads."""

WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""Linears whose result is added to the residual stream."""


@dataclass(frozen=True)
class Heads:
    """Query heads H, kv heads J, head dim D; whether queries and keys have norms of their own."""

    H: int
    J: int
    D: int
    qk_norm: bool = False


@dataclass(frozen=True)
class Target:
    """What a recipe stores and runs: scheme, granularity, share of INT8 channels."""

    scheme: str = "twolevel"
    granularity: str = "token"
    k8: float = 1.0

    def k8_of(self, K: int) -> int:
        """INT8 channels of a linear with K in features, whole blocks of 128; -1 means all."""
        if self.k8 == 1:
            return -1
        return math.ceil(self.k8 * padded_k(K) / BLOCK_K) * BLOCK_K


@dataclass
class Acts:
    """How a site's inputs are quantised at run time.

    `perm` int64 [K] or None: channel k of the codes is channel perm[k] of the input. `k8`: INT8
    channels after it, whole blocks of 128, -1: all, None: as the recipe says. `hadamard`: the INT4
    channels are then rotated in blocks of 128 (:func:`tessella.quant.fmpq.rotate_blocks`).
    """

    perm: Tensor | None = None
    k8: int | None = None
    hadamard: bool = False


@dataclass
class Layer:
    """A decoder layer: its tensors by name relative to the layer, and what is known of them."""

    index: int
    heads: Heads
    target: Target
    tensors: dict[str, Tensor]
    stats: dict[str, Stats] = field(default_factory=dict)
    key_radius: Tensor | None = None
    acts: dict[str, Acts] = field(default_factory=lambda: {site: Acts() for site in SITES})

    def columns(self, site: str) -> list[str]:
        """Names of the weights that multiply a site's inputs."""
        return [f"{linear}.weight" for linear in SITES[site]]

    def rows(self, linear: str, change: Callable[[Tensor], Tensor]) -> None:
        """Change a linear's outputs: `change` maps [N, ...] for the weight, then for the bias."""
        for name in (f"{linear}.weight", f"{linear}.bias"):
            if name in self.tensors:
                self.tensors[name] = change(self.tensors[name])


def scale(layer: Layer, site: str, d: Tensor) -> None:
    """Make a site read x * d, d without zeros.

    `d` is [K]; for "o" [J * D], since the query heads of a kv head share its values. The factor
    goes into what makes x: gains of the norm, rows of up_proj, rows of v_proj.
    """
    d = d.to(next(iter(layer.tensors.values())))
    if site in NORMS:
        layer.tensors[NORMS[site]] = layer.tensors[NORMS[site]] * d
    else:
        maker = "mlp.up_proj" if site == "down" else "self_attn.v_proj"
        layer.rows(maker, lambda t: t * (d[:, None] if t.dim() == 2 else d))
    if site == "o":
        d = by_query_head(d, layer.heads)
    _scale_inputs(layer, site, d, 1 / d)


def by_query_head(x_JD: Tensor, heads: Heads) -> Tensor:
    """[J * D] -> [H * D]: each kv head's values for the query heads that share it."""
    x = x_JD.view(heads.J, 1, heads.D).expand(-1, heads.H // heads.J, -1)
    return x.reshape(-1)


def scale_keys(layer: Layer, d: Tensor) -> None:
    """Make queries q * d and keys k / d; d [J, D/2] scales both halves of a RoPE pair alike.

    RoPE turns the pair (i, i + D/2), so it commutes with the factor. Where queries and keys are
    normalised, d must be [D/2], the same for all heads, and goes into the gains of those norms.
    """
    heads = layer.heads
    d = d.to(next(iter(layer.tensors.values())))
    d = torch.cat([d, d], -1)
    if heads.qk_norm:
        layer.tensors["self_attn.q_norm.weight"] = layer.tensors["self_attn.q_norm.weight"] * d
        layer.tensors["self_attn.k_norm.weight"] = layer.tensors["self_attn.k_norm.weight"] / d
    else:
        q, k = by_query_head(d.reshape(-1), heads), d.reshape(-1)
        layer.rows("self_attn.q_proj", lambda t: t * (q[:, None] if t.dim() == 2 else q))
        layer.rows("self_attn.k_proj", lambda t: t / (k[:, None] if t.dim() == 2 else k))
    if layer.key_radius is not None:
        layer.key_radius = layer.key_radius / d[..., : heads.D // 2].to(layer.key_radius)


def permute(layer: Layer, site: str, p_K: Tensor, *, fold: bool = True) -> None:
    """Make a site read x[:, p].

    For "down" the rows of gate_proj and up_proj are permuted, and nothing is left to do at run
    time, if `fold`. Elsewhere the order belongs to the residual stream or to the heads, so the
    activations are permuted while they are quantised (:class:`Acts`).
    """
    p = p_K.long()
    if site == "down" and fold:
        for linear in SITES["mlp"]:
            layer.rows(linear, lambda t: t[p])
    else:
        acts = layer.acts[site]
        acts.perm = p if acts.perm is None else acts.perm[p]
    for name in layer.columns(site):
        layer.tensors[name] = layer.tensors[name][:, p]
    if site in layer.stats:
        layer.stats[site].permute(p)


def fold_norms(layer: Layer) -> None:
    """Move the gains of the norms into the linears that read them, and leave ones."""
    for site, norm in NORMS.items():
        gain = layer.tensors[norm]
        layer.tensors[norm] = torch.ones_like(gain)
        # a channel without gain has no weight from now on, so what it holds does not matter
        _scale_inputs(layer, site, torch.where(gain == 0, 0.0, 1 / gain), gain)


def rotate(layer: Layer, turn: Callable[[Tensor], Tensor]) -> None:
    """Turn the residual stream: `turn` is an orthogonal map along the last dimension.

    Norms must not have gains of their own any more (:func:`fold_norms`); embedding and output
    head, outside the layer, have to follow.
    """
    for site in NORMS:
        turn_inputs(layer, site, turn)
    for linear in WRITERS:
        layer.rows(linear, lambda t: turn(t.T.contiguous()).T.contiguous())


def rotate_values(layer: Layer, turn: Callable[[Tensor], Tensor]) -> None:
    """Turn the values of every head, and back where o_proj reads them; `turn` maps [..., D]."""
    heads = layer.heads

    def outputs(t: Tensor) -> Tensor:
        per_head = t.reshape(heads.J, heads.D, -1).transpose(1, 2).contiguous()
        return turn(per_head).transpose(1, 2).reshape(t.shape)

    def inputs(x: Tensor) -> Tensor:
        return turn(x.reshape(*x.shape[:-1], heads.H, heads.D)).reshape(x.shape)

    layer.rows("self_attn.v_proj", outputs)
    turn_inputs(layer, "o", inputs)


def _scale_inputs(layer: Layer, site: str, d: Tensor, inverse: Tensor) -> None:
    """The site reads x * d from now on: its columns take the inverse."""
    for name in layer.columns(site):
        layer.tensors[name] = layer.tensors[name] * inverse
    if site in layer.stats:
        layer.stats[site].scale(d)


def turn_inputs(layer: Layer, site: str, turn: Callable[[Tensor], Tensor]) -> None:
    """The site reads turn(x) from now on, orthogonal along the last dimension."""
    for name in layer.columns(site):
        layer.tensors[name] = turn(layer.tensors[name])
    if site in layer.stats:
        layer.stats[site].rotate(turn)
