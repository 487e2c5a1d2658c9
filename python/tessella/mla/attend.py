"""Latent attention in plain torch, expanded and absorbed: the same sums in another order.

A token's cache record is a latent c [L] and one rope key [R] that all heads share. Head h has an
up-projection of the latent to keys, U_K [D, L], and to values, U_V [E, L] (`kv_b`), and

    expanded:  s = (q . (U_K c) + q_rope . k_rope) * scale,    o = sum_t softmax(s)_t (U_V c_t)
    absorbed:  s = ((U_K^T q) . c + q_rope . k_rope) * scale,  o = U_V (sum_t softmax(s)_t c_t)

The absorbed form reads L + R numbers a token, whatever the number of heads (DeepSeek-V2,
arXiv 2405.04434, section 2.1.2).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on neighbouring channels (2i, 2i + 1), DeepSeek's layout.

    Args:
        x: [..., S, R].
        cos, sin: [..., S, >= R / 2], of angle i in column i; further columns are not read.
    """
    half = x.shape[-1] // 2
    c, s = cos[..., :half], sin[..., :half]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * c - odd * s, odd * c + even * s), -1).flatten(-2)


def split_up(kv_b: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """U_K [H, D, L] and U_V [H, E, L] of a kv_b weight [H * (D + E), L]; `nope` is D."""
    up_HNL = kv_b.view(heads, -1, kv_b.shape[-1])
    return up_HNL[:, :nope], up_HNL[:, nope:]


def expand(latent: Tensor, k_rope: Tensor, kv_b: Tensor, heads: int, nope: int):
    """Keys [B, H, T, D + R] and values [B, H, T, E] of latents [B, T, L], rope keys [B, T, R]."""
    up_K, up_V = split_up(kv_b, heads, nope)
    keys = torch.einsum("btl,hdl->bhtd", latent, up_K)
    shared = k_rope[:, None].expand(-1, heads, -1, -1)
    return torch.cat((keys, shared), -1), torch.einsum("btl,hel->bhte", latent, up_V)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T * scale) v for [B, H, S, .] queries and [B, H, T, .] keys and values.

    `mask` is bool, True where a query sees a key; a query that sees none gives 0.
    """
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


def absorbed(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    kv_b: Tensor,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention over latents without expanding them.

    Args:
        q_nope, q_rope: [B, H, S, D], [B, H, S, R], the latter rotated.
        latent, k_rope: [B, T, L], [B, T, R], the latter rotated.
        kv_b: [H * (D + E), L], for each head the rows of its keys, then those of its values.
        scale: of the scores, 1 / sqrt(D + R) in DeepSeek's models.
        mask: bool, broadcastable to [B, H, S, T]; True where a query sees a token.

    Returns:
        [B, H, S, E]
    """
    heads, nope = q_nope.shape[1], q_nope.shape[-1]
    up_K, up_V = split_up(kv_b, heads, nope)
    q_latent = torch.einsum("bhsd,hdl->bhsl", q_nope, up_K)
    q = torch.cat((q_latent, q_rope), -1)
    k = torch.cat((latent, k_rope), -1)[:, None]
    out = attend(q, k, latent[:, None], scale, mask)
    return torch.einsum("bhsl,hel->bhse", out, up_V)


def causal(S: int, T: int, window: int | None = None, device=None) -> Tensor:
    """bool [S, T]: what S queries at the end of T tokens see; `window` counts the token itself."""
    row = torch.arange(T - S, T, device=device)[:, None]
    column = torch.arange(T, device=device)
    seen = column <= row
    return seen if window is None else seen & (column > row - window)
