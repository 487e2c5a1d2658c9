"""A decoder as a conversion sees it: layers one at a time, whose attention can be exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from tessella.mla.attention import GQA, Angles, Latent, PartialRope
from tessella.mla.shape import Heads

BATCH_TOKENS = 4096
"""Tokens that pass a layer together."""

LOGIT_ELEMENTS = 1 << 24
"""Most logits held at a time."""

Attention = GQA | PartialRope | Latent


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its attention, and what surrounds it, in fp32."""

    attention: GQA
    input_norm: Tensor
    post_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    eps: float

    def normed(self, h: Tensor) -> Tensor:
        """What the attention reads of hidden states [B, T, hidden]."""
        return rms_norm(h, h.shape[-1:], self.input_norm, self.eps)

    def run(self, h: Tensor, angles: Angles, attention: Attention | None = None) -> Tensor:
        """Hidden states [B, T, hidden] to those of the next layer, with another attention."""
        h = h + (attention or self.attention).run(self.normed(h), angles)
        x = rms_norm(h, h.shape[-1:], self.post_norm, self.eps)
        gated = silu(linear(x, self.gate, self.gate_bias)) * linear(x, self.up, self.up_bias)
        return h + linear(gated, self.down, self.down_bias)


class Decoder(Protocol):
    """Where layers come from; an implementation may keep or reload them as it likes."""

    heads: Heads
    count: int
    device: torch.device

    def embed(self, ids: Tensor) -> Tensor:
        """fp32 [B, T, hidden] of token ids [B, T]."""

    def layer(self, i: int) -> Layer:
        """Decoder layer i."""

    def angles(self, T: int) -> Angles:
        """cos and sin fp32 [T, D / 2]."""

    def head(self, h: Tensor) -> Tensor:
        """Logits [..., V] of the last layer's hidden states."""


def batches(t: Tensor) -> Iterator[Tensor]:
    """Rows of [N, T, ...] in pieces of about :data:`BATCH_TOKENS` tokens."""
    return iter(t.split(max(1, BATCH_TOKENS // t.shape[1])))


def advance(decoder: Decoder, i: int, h: Tensor, attention: Attention | None = None) -> Tensor:
    """Hidden states [N, T, hidden] through layer i, with another attention if one is given."""
    layer, angles = decoder.layer(i), decoder.angles(h.shape[1])
    return torch.cat([layer.run(piece, angles, attention) for piece in batches(h)])


def moments(decoder: Decoder, i: int, h: Tensor) -> Tensor:
    """fp64 sum_t [k; v][k; v]^T [2W, 2W] of layer i's keys (before RoPE) and values."""
    layer = decoder.layer(i)
    width = 2 * decoder.heads.width
    total = torch.zeros(width, width, dtype=torch.float64, device=h.device)
    for piece in batches(h):
        kv = layer.attention.keys_values(layer.normed(piece)).flatten(0, 1).double()
        total += kv.T @ kv
    return total


def query_energies(decoder: Decoder, i: int, h: Tensor) -> Tensor:
    """fp64 [J, D / 2]: energy of the queries that read each pair of channels of layer i's keys."""
    layer, heads = decoder.layer(i), decoder.heads
    total = torch.zeros(heads.J, heads.D // 2, dtype=torch.float64, device=h.device)
    for piece in batches(h):
        q = layer.attention.queries(layer.normed(piece)).double()
        total += q.view(-1, heads.J, heads.H // heads.J, 2, heads.D // 2).square().sum((0, 2, 3))
    return total


def divergence(decoder: Decoder, h: Tensor, reference: Tensor | None, ids: Tensor) -> float:
    """How bad the last hidden states h [N, T, hidden] are, in nats a token.

    With `reference`, the original's last hidden states: mean KL(original || h). Without: the mean
    negative log-likelihood of the next tokens of ids [N, T].
    """
    total, count = 0.0, 0
    flat = h[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten().to(h.device)
    ref = None if reference is None else reference[:, :-1].flatten(0, 1)
    rows = max(1, LOGIT_ELEMENTS // decoder.head(flat[:1]).shape[-1])
    for start in range(0, len(flat), rows):
        piece = slice(start, start + rows)
        logp = decoder.head(flat[piece]).float().log_softmax(-1)
        if ref is None:
            total -= float(logp.gather(1, targets[piece, None]).sum(dtype=torch.float64))
        else:
            logq = decoder.head(ref[piece]).float().log_softmax(-1)
            total += float((logq.exp() * (logq - logp)).sum(dtype=torch.float64))
        count += len(logp)
    return total / count
