"""Linears that read the same tensor, as one product: q, k and v, or gate and up.

A packed weight is a sequence of panels of 64 out features, on every device, so weights whose out
features fill whole panels can follow each other in one blob and be multiplied in one call. Each
linear keeps its own module, names and state_dict; its `blob` becomes a view of the common one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tessella import _native
from tessella.layout import PANEL_N
from tessella.models.linear import W4AxLinear, shared


class Joined:
    """Linears that are multiplied together whenever the first of them is called.

    The common blob is built at the first product and again after the linears moved to another
    device, so a model may be moved at any time.

    Args:
        linears: for which :meth:`fits` holds.
    """

    def __init__(self, linears: Sequence[W4AxLinear]):
        self.linears = tuple(linears)
        self.out_features = sum(linear.out_features for linear in linears)
        self._blob: Tensor | None = None
        self._bias: Tensor | None = None
        self._views: list[Tensor] = []
        for linear in linears:
            linear.join(self)

    @staticmethod
    def fits(linears: Sequence[W4AxLinear]) -> bool:
        """Whether linears quantise alike, have a bias all or none, and fill panels but the last."""

        def kind(x: W4AxLinear) -> tuple:
            bias = None if x.bias is None else x.bias.dtype
            return x.scheme, x.in_features, x.k8, x.granularity, x.order, bias

        alike = len({kind(x) for x in linears}) == 1
        return alike and all(x.out_features % PANEL_N == 0 for x in linears[:-1])

    def forget(self) -> None:
        """Let the common blob go; the next product builds it again from the linears' own."""
        self._blob, self._bias, self._views = None, None, []

    def product(self, linear: W4AxLinear, x: Tensor) -> Tensor | None:
        """linear(x) [..., N], a part of all linears' product; None where that cannot be had.

        It can when x [..., K] came quantised from a fused norm, which nobody changes. Every part
        is handed out once: the next time the linear is on its own.
        """
        if torch.compiler.is_compiling():
            return None
        blocks = shared(x, linear.k8, linear.granularity, linear.order)
        if blocks is None:
            return None
        note = getattr(x, "_tessella_products", None)
        if note is None or note[0] is not blocks:
            note = x._tessella_products = blocks, self._multiply(blocks, x)
        return note[1].pop(linear, None)

    def _multiply(self, blocks: Sequence[Tensor], x: Tensor) -> dict[W4AxLinear, Tensor]:
        first = self.linears[0]
        if self._blob is None or first.blob is not self._views[0]:
            self._build()
        y_MN = torch.ops.tessella.w4ax_gemm.default(
            *blocks,
            self._blob,
            first.scheme,
            self.out_features,
            first.granularity,
            self._bias,
            x.dtype,
        )
        y = y_MN.view(*x.shape[:-1], self.out_features)
        return dict(zip(self.linears, y.split([w.out_features for w in self.linears], -1)))

    def _build(self) -> None:
        """One blob of all weights, of which the linears keep views."""
        blobs = [linear.blob for linear in self.linears]
        self._blob = _native.empty_pages(
            [sum(b.numel() for b in blobs)], torch.uint8, blobs[0].device
        )
        self._views = list(self._blob.split([b.numel() for b in blobs]))
        for linear, view, blob in zip(self.linears, self._views, blobs):
            linear.blob = view.copy_(blob)
        biases = [linear.bias for linear in self.linears]
        self._bias = None if biases[0] is None else torch.cat(biases)
