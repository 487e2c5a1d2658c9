"""Attention for decoding on CPU: all query heads of a KV head are rows of one product.

Keys of a paged cache (:mod:`tessella.integrations.paged`) are attended in its pages. For others:
with one query token torch's attention reads the keys and values of a KV head once for each query
head that shares it. Folding those heads into rows reads them once, and is the same sum. Everything
else (prefill, training, GPUs) is torch's own attention, untouched.

Importing this registers the implementation with transformers as ``attn_implementation="tessella"``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tessella.integrations.paged import NOTE, PagedLength

NAME = "tessella"
"""What transformers calls it."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args:
        query: [B, H, S, D], H a multiple of J.
        key, value: [B, J, T, D].
        attention_mask: None, bool (True: attend) or additive, broadcastable to [B, H, S, T].

    Returns:
        ([B, S, H, D], None)
    """
    B, H, S, D = query.shape
    if (layer := getattr(key, NOTE, None)) is not None:
        how = {
            "scale": D**-0.5 if scaling is None else scaling,
            "window": kwargs.get("sliding_window") or 0,
            "softcap": kwargs.get("softcap") or 0.0,
            "sinks": kwargs.get("s_aux"),
        }
        return layer.attend(query, key, value, attention_mask, **how), None
    J = key.shape[1]
    one_mask = attention_mask is None or attention_mask.shape[1] == 1  # the same for all heads
    decoding = S == 1 and H > J and dropout == 0.0 and not torch.is_grad_enabled()
    if not (decoding and one_mask and query.device.type == "cpu"):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = D**-0.5 if scaling is None else scaling
    rows = query.reshape(B, J, H // J, D)
    out = _attend(rows, key, value, attention_mask, scale)
    return out.reshape(B, 1, H, D).to(query.dtype), None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T * scale + mask) v for q [B, J, R, D] and k, v [B, J, T, D]; softmax in fp32."""
    if not _fast_bf16():
        q, k, v = q.float(), k.float(), v.float()
    scores = torch.matmul(q, k.transpose(2, 3)).float() * scale
    if mask is not None:
        dead = mask.logical_not() if mask.dtype == torch.bool else None
        scores = scores + mask if dead is None else scores.masked_fill(dead, float("-inf"))
    return torch.matmul(torch.softmax(scores, -1).to(v.dtype), v)


def _fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than fp32 ones."""
    return torch.cpu._is_avx512_bf16_supported()


def use(model: nn.Module) -> bool:
    """Make a model of transformers that uses torch's attention use this one; whether it did."""
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return False
    model.set_attn_implementation(NAME)
    return True


def mask(*args, kv_length: int, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
    """transformers' mask interface: torch's mask, or for a paged cache the padding [B, T] if any.

    What a query of a paged cache sees follows from its position; no mask is made for that.
    """
    if not isinstance(kv_length, PagedLength):
        return sdpa_mask(*args, kv_length=kv_length, attention_mask=attention_mask, **kwargs)
    padded = attention_mask is not None and not bool(attention_mask.all())
    return attention_mask if padded else None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
