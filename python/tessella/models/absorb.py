"""The absorbed projections of latent attention: each head's own product, q~ = q U_K and o U_V^T.

A head's part of `kv_b_proj` has D rows U_K that make its keys from a latent and E rows U_V that
make its values. Absorbed attention multiplies queries by U_K and its totals by U_V (DeepSeek-V2,
section 2.1.2). All heads are one product of batched matrices or, of a 4-bit weight, one
`w4ax_grouped`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tessella.models.linear import W4AxLinear, compiled
from tessella.ops import w4_pack
from tessella.quant import eight
from tessella.quant.fmpq import rotate_blocks
from tessella.ref.w4ax_gemm import w4_dequant

_MEMO = "_tessella_absorbed"
_PANEL = 64  # out features that a packed weight keeps together

_w4ax_grouped = torch.ops.tessella.w4ax_grouped.default


def absorbed(attention: nn.Module, dtype: torch.dtype) -> DenseHeads | CodedHeads:
    """The absorbed products of an attention with kv_b_proj, num_heads, qk_nope_head_dim.

    `dtype` is that of queries and totals. A 4-bit `kv_b_proj` is used in the form that its kernels
    take, where they can; what that needs is made once and kept with the module.
    """
    linear = attention.kv_b_proj
    if not isinstance(linear, W4AxLinear):
        return DenseHeads(attention, linear.weight)
    blob, made, products = getattr(attention, _MEMO, (None, None, None))
    now = (_version(linear.blob), dtype)
    if blob is not linear.blob or made != now:
        make = CodedHeads if CodedHeads.fits(attention) else DenseHeads
        products = make(attention, _dequantised(linear).to(dtype))
        object.__setattr__(attention, _MEMO, (linear.blob, now, products))
    return products


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


def _dequantised(linear: W4AxLinear) -> Tensor:
    """The real weight [N, K], fp32, its columns in the order of the input's channels."""
    weight = w4_dequant(linear.weight(), torch.float32)[:, : linear.in_features]
    if linear.hadamard:
        weight = rotate_blocks(weight, linear.k8)
    if linear.perm is not None:  # column k of the weight belongs to channel perm[k]
        weight = torch.empty_like(weight).index_copy_(1, linear.perm.long(), weight)
    return weight


class DenseHeads:
    """U_K [H, D, L] and U_V [H, E, L] as matrices: views of `weight` [H * (D + E), L]."""

    def __init__(self, attention: nn.Module, weight: Tensor):
        up_HNL = weight.view(attention.num_heads, -1, weight.shape[-1])
        D = attention.qk_nope_head_dim
        self.keys, self.values = up_HNL.split([D, up_HNL.shape[1] - D], 1)

    def queries(self, q_THD: Tensor) -> Tensor:
        """q~ [T, H, L] = q U_K of each head."""
        return torch.bmm(q_THD.transpose(0, 1), self.keys).transpose(0, 1)

    def outputs(self, o_THL: Tensor) -> Tensor:
        """[T, H, E] = o U_V^T of each head."""
        # copied first: torch's product of views that are transposed and have gaps is 5 times slower
        w_HLE = self.values.contiguous().transpose(1, 2)
        return torch.bmm(o_THL.transpose(0, 1), w_HLE).transpose(0, 1)


class CodedHeads:
    """The same products with the codes of a 4-bit `kv_b_proj`, queries and totals in INT8.

    The value rows of every head are read from the packed weight itself. The key rows lie across the
    depth of their product; they are kept once more, transposed, in 8 bits, which adds next to
    nothing to the error of the 4 bits they come from.
    """

    def __init__(self, attention: nn.Module, weight: Tensor):
        linear = attention.kv_b_proj
        H, D, L = attention.num_heads, attention.qk_nope_head_dim, linear.in_features
        N = linear.out_features // H
        keys = weight.view(H, N, L)[:, :D].transpose(1, 2).reshape(H * L, D)
        packed = w4_pack(eight.quantize(keys))
        self._keys = (packed.blob, packed.scheme, H * L, L, 0, L, -1, "token", None)
        what = (linear.blob, linear.scheme, linear.out_features, N - D, D, N)
        self._values = (*what, -1, linear.granularity, linear.perm)

    @staticmethod
    def fits(attention: nn.Module) -> bool:
        """Whether a kernel takes the heads of a 4-bit kv_b_proj: whole panels, no rotation."""
        linear = attention.kv_b_proj
        sizes = (linear.out_features // attention.num_heads, attention.qk_nope_head_dim)
        whole = not any(n % _PANEL for n in (*sizes, linear.in_features))
        return whole and not linear.hadamard and compiled("w4ax_grouped", linear.blob.device.type)

    def queries(self, q_THD: Tensor) -> Tensor:
        """q~ [T, H, L] = q U_K of each head."""
        return _w4ax_grouped(torch.cat((q_THD, q_THD), -1), *self._keys)

    def outputs(self, o_THL: Tensor) -> Tensor:
        """[T, H, E] = o U_V^T of each head."""
        return _w4ax_grouped(o_THL, *self._values)
