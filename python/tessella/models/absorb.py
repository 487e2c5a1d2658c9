"""The absorbed projections of latent attention: each head's own product, q~ = q U_K and o U_V^T.

A head's part of `kv_b_proj` has D rows U_K that make its keys from a latent and E rows U_V that
make its values. Absorbed attention multiplies queries by U_K and its totals by U_V (DeepSeek-V2,
section 2.1.2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessella.models.linear import W4AxLinear
from tessella.quant.recipe import Recipe
from tessella.ref.w4ax_gemm import w4_dequant

_MEMO = "_tessella_absorbed"


def absorbed_weights(attention: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U_K [H, D, L] and U_V [H, E, L] of an attention with kv_b_proj, num_heads, qk_nope_head_dim.

    Views of its weight; of a 4-bit one a copy in `dtype`, made once.
    """
    linear = attention.kv_b_proj
    weight = _dequantised(attention, linear, dtype) if isinstance(linear, W4AxLinear) else None
    weight = linear.weight if weight is None else weight
    up_HNL = weight.view(attention.num_heads, -1, weight.shape[-1])
    return up_HNL.split([D := attention.qk_nope_head_dim, up_HNL.shape[1] - D], 1)


def _dequantised(attention: nn.Module, linear: W4AxLinear, dtype: torch.dtype) -> Tensor:
    blob, memo = getattr(attention, _MEMO, (None, None))
    if blob is not linear.blob or memo.dtype != dtype:
        memo = w4_dequant(linear.weight(), torch.float32)[:, : linear.in_features].to(dtype)
        if linear.perm is not None:  # column k of the weight belongs to channel perm[k]
            memo = torch.empty_like(memo).index_copy_(1, linear.perm.long(), memo)
        object.__setattr__(attention, _MEMO, (linear.blob, memo))
    return memo


def multiply_heads(x_THN: Tensor, w_HNM: Tensor) -> Tensor:
    """[T, H, M] = x of each head times its own matrix."""
    return torch.bmm(x_THN.transpose(0, 1), w_HNM).transpose(0, 1)


class HeadLinears(nn.Module):
    """Per-head products with 4-bit weights: y[:, h] = x[:, h] W_h^T, one w4ax_gemm a head.

    Four times fewer bytes than :func:`multiply_heads` reads, against two calls for every head:
    which of them is faster, csrc/mla/README.md has measured.
    """

    def __init__(self, weight_HMN: Tensor, recipe: Recipe):
        """Quantise each head's matrix [M, N] as `recipe` says. Raises ValueError on NaN or inf."""
        super().__init__()
        self.heads = nn.ModuleList()
        for w_MN in weight_HMN.detach():
            linear = nn.Linear(w_MN.shape[1], w_MN.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(w_MN, requires_grad=False)
            self.heads.append(W4AxLinear.from_linear(linear, recipe))

    def forward(self, x_THN: Tensor) -> Tensor:
        """[T, H, N] -> [T, H, M]"""
        return torch.stack([head(x) for head, x in zip(self.heads, x_THN.unbind(1))], 1)
