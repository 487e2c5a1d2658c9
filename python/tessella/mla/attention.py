"""A layer's attention before, between and after: GQA, partial RoPE, latents. Plain torch.

All are frozen dataclasses of weights with ``run(x, angles)``, so that a conversion can put one in
another's place. :func:`partial_rope` and :func:`to_latent` are the conversion of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from tessella.mla.attend import causal, rotate_pairs
from tessella.mla.lowrank import Components, hadamard
from tessella.mla.shape import Heads, check_rank

Angles = tuple[Tensor, Tensor]
"""cos and sin [T, D / 2] of the original head's frequencies."""


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention [B, T, H * E] for q, k [B, T, heads, D] and v [B, T, heads, E]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    group = q.shape[1] // v.shape[1]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    v = v.repeat_interleave(group, 1)
    T = q.shape[2]
    if window is None or window >= T:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        mask = causal(T, T, window, q.device)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2)


def _rotate_halves(x: Tensor, angles: Angles) -> Tensor:
    """RoPE on channels (i, i + D / 2) of [B, T, heads, D], transformers' layout."""
    cos, sin = (t[:, None] for t in angles)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _rotate_kept(x: Tensor, angles: Angles, rope: int) -> Tensor:
    """RoPE on pairs (2i, 2i + 1) of [B, T, heads, R], every (D / R)-th frequency."""
    step = 2 * angles[0].shape[1] // rope
    cos, sin = (t[:, None, ::step] for t in angles)
    return rotate_pairs(x, cos, sin)


@dataclass(frozen=True)
class _Weights:
    """Tensors [out, in] and biases of one attention, for `heads`; `window`: of sliding ones."""

    heads: Heads

    def to(self: W, *args) -> W:
        """The same with every tensor converted as Tensor.to does."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{n: t.to(*args) for n, t in tensors.items() if isinstance(t, Tensor)}
        )


W = TypeVar("W", bound=_Weights)


@dataclass(frozen=True)
class GQA(_Weights):
    """The original: q [H * D, hidden], k and v [J * D, hidden], o [hidden, H * D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    window: int | None = None

    def keys_values(self, x: Tensor) -> Tensor:
        """Keys before RoPE, then values: [..., 2 * J * D]."""
        return torch.cat((linear(x, self.k, self.k_bias), linear(x, self.v, self.v_bias)), -1)

    def queries(self, x: Tensor) -> Tensor:
        """Queries before RoPE: [..., H * D]."""
        return linear(x, self.q, self.q_bias)

    def run(self, x: Tensor, angles: Angles) -> Tensor:
        """Normalised hidden states [B, T, hidden] to the attention's output [B, T, hidden]."""
        D = self.heads.D
        q = self.queries(x).unflatten(-1, (-1, D))
        k, v = self.keys_values(x).unflatten(-1, (2, -1, D)).unbind(-3)
        q, k = _rotate_halves(q, angles), _rotate_halves(k, angles)
        return linear(_attend(q, k, v, D**-0.5, self.window), self.o, self.o_bias)


@dataclass(frozen=True)
class PartialRope(_Weights):
    """RoPE on R rotated channels that all heads share; full rank still.

    A query head has its D channels, unrotated, and R rope channels; a key/value head has D key
    channels without RoPE (the merged keys less their rope part), and all share one rope key.
    """

    q: Tensor  # [H * (D + R), hidden], each head's D, then R; scaled for 1 / sqrt(D + R)
    k_rope: Tensor  # [R, hidden]
    k_nope: Tensor  # [J * D, hidden]
    v: Tensor
    o: Tensor
    rope: int
    q_bias: Tensor | None = None
    k_rope_bias: Tensor | None = None
    k_nope_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    window: int | None = None

    def run(self, x: Tensor, angles: Angles) -> Tensor:
        """As :meth:`GQA.run`."""
        J, D, R = self.heads.J, self.heads.D, self.rope
        q = linear(x, self.q, self.q_bias).unflatten(-1, (-1, D + R))
        q = torch.cat((q[..., :D], _rotate_kept(q[..., D:], angles, R)), -1)
        k_rope = linear(x, self.k_rope, self.k_rope_bias)[..., None, :]
        k_rope = _rotate_kept(k_rope, angles, R).expand(-1, -1, J, -1)
        k_nope = linear(x, self.k_nope, self.k_nope_bias).unflatten(-1, (J, D))
        v = linear(x, self.v, self.v_bias).unflatten(-1, (J, D))
        out = _attend(q, torch.cat((k_nope, k_rope), -1), v, (D + R) ** -0.5, self.window)
        return linear(out, self.o, self.o_bias)


@dataclass(frozen=True)
class Latent(_Weights):
    """Latent attention: what a converted checkpoint stores."""

    q: Tensor  # [H * (D + R), hidden], as in PartialRope
    kv_a: Tensor  # [L + R, hidden], the latent, then the rope key
    kv_b: Tensor  # [H * 2D, L], each head's D key rows, then its D value rows
    o: Tensor
    rope: int
    q_bias: Tensor | None = None
    kv_a_bias: Tensor | None = None
    o_bias: Tensor | None = None
    window: int | None = None

    def run(self, x: Tensor, angles: Angles) -> Tensor:
        """As :meth:`GQA.run`, expanded."""
        H, D, R = self.heads.H, self.heads.D, self.rope
        q = linear(x, self.q, self.q_bias).unflatten(-1, (-1, D + R))
        q = torch.cat((q[..., :D], _rotate_kept(q[..., D:], angles, R)), -1)
        latent, k_rope = linear(x, self.kv_a, self.kv_a_bias).tensor_split([-R], -1)
        k_rope = _rotate_kept(k_rope[..., None, :], angles, R).expand(-1, -1, H, -1)
        k, v = linear(latent, self.kv_b).unflatten(-1, (H, 2, D)).unbind(-2)
        out = _attend(q, torch.cat((k, k_rope), -1), v, (D + R) ** -0.5, self.window)
        return linear(out, self.o, self.o_bias)


def balanced(gqa: GQA, scale_JP: Tensor) -> GQA:
    """The same attention: key pair (j, l) times `scale_JP` [J, D / 2], its queries divided by it.

    RoPE turns the two channels of a pair together, so scores stay as they are.
    """
    scale = torch.cat((scale_JP, scale_JP), -1)  # channels l and l + D / 2
    keys = scale.flatten()[:, None]
    queries = scale.repeat_interleave(gqa.heads.H // gqa.heads.J, 0).flatten()[:, None]
    return replace(
        gqa,
        q=gqa.q / queries,
        k=gqa.k * keys,
        q_bias=None if gqa.q_bias is None else gqa.q_bias / queries[:, 0],
        k_bias=None if gqa.k_bias is None else gqa.k_bias * keys[:, 0],
    )


def _queries(gqa: GQA, rotated: Tensor, rope: int) -> tuple[Tensor, Tensor | None]:
    """q of PartialRope and its bias: each head's own rows, then its rows along the rope key.

    The scale becomes 1 / sqrt(D + R), so rows are multiplied by sqrt((D + R) / D).
    """
    heads = gqa.heads
    ratio = ((heads.D + rope) / heads.D) ** 0.5

    def extend(t: Tensor) -> Tensor:
        rows = []
        for h, own in enumerate(t.view(heads.H, heads.D, -1)):
            rows += [own, rotated[:rope, heads.group(h)] @ own]
        return ratio * torch.cat(rows)

    bias = None if gqa.q_bias is None else extend(gqa.q_bias).flatten()
    return extend(gqa.q), bias


def _times(m: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else m @ bias


def partial_rope(gqa: GQA, rotated: Tensor, rope: int) -> PartialRope:
    """The layer with RoPE on the first `rope` channels of its rotated merged keys only.

    `gqa` in fp64; `rotated` [J * D, J * D] of :func:`tessella.mla.rotate.rotation`.
    """
    q, q_bias = _queries(gqa, rotated, rope)
    kept, rest = rotated[:rope], rotated[rope:]
    without = rest.T @ rest  # merged keys less their part along the rope key's channels
    return PartialRope(
        heads=gqa.heads,
        q=q,
        k_rope=kept @ gqa.k,
        k_nope=without @ gqa.k,
        v=gqa.v,
        o=gqa.o,
        rope=rope,
        q_bias=q_bias,
        k_rope_bias=_times(kept, gqa.k_bias),
        k_nope_bias=_times(without, gqa.k_bias),
        v_bias=gqa.v_bias,
        o_bias=gqa.o_bias,
        window=gqa.window,
    )


def to_latent(
    gqa: GQA, rotated: Tensor, rope: int, parts: Components, rank: int, spread: bool = False
) -> Latent:
    """The layer on latents of `rank` numbers.

    Args:
        gqa: the original, fp64.
        rotated: its rotation.
        rope: R.
        parts: principal components of its keys without RoPE and its values.
        rank: L.
        spread: multiply latents by :func:`tessella.mla.lowrank.hadamard`, which changes nothing
            but how they quantise.
    """
    heads = gqa.heads
    check_rank(heads, rope, rank)
    q, q_bias = _queries(gqa, rotated, rope)
    kept, rest = rotated[:rope], rotated[rope:]
    down_K, down_V = parts.down(rank)
    up_K, up_V = parts.up(rank)
    turn = hadamard(rank).to(gqa.q) if spread else torch.eye(rank).to(gqa.q)

    def latent_and_rope(k: Tensor, v: Tensor) -> Tensor:
        return torch.cat((turn @ (down_K @ (rest @ k) + down_V @ v), kept @ k))

    kv_bias = None
    if gqa.k_bias is not None:
        kv_bias = latent_and_rope(gqa.k_bias, gqa.v_bias)
    per_head = []
    for h in range(heads.H):
        group = heads.group(h)
        per_head += [rest[:, group].T @ up_K, up_V[group]]
    return Latent(
        heads=heads,
        q=q,
        kv_a=latent_and_rope(gqa.k, gqa.v),
        kv_b=torch.cat(per_head) @ turn.T,
        o=gqa.o,
        rope=rope,
        q_bias=q_bias,
        kv_a_bias=kv_bias,
        o_bias=gqa.o_bias,
        window=gqa.window,
    )
