"""How close is close: one definition for tests, benches and users.

Codes, packed bytes and integer sums are compared with torch.equal. Floats are compared with an
fp64 reference that was fed the same codes, by these rules, all of which must hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

GEMM_DIFF = {torch.bfloat16: 4e-6, torch.float16: 1e-7, torch.float32: 1e-12}
"""Largest :func:`relative_diff` of a GEMM result, by dtype: about three times pure rounding."""

STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}
"""Largest error of one element, relative to itself or to the result's root mean square."""


def relative_diff(x: Tensor, y: Tensor) -> float:
    """``|x - y|^2 / (|x|^2 + |y|^2)`` over all elements, in fp64; 0 for two zero tensors."""
    x, y = x.double(), y.double()
    norm = (x.square() + y.square()).sum()
    return float((x - y).square().sum() / norm) if norm > 0 else 0.0


def assert_gemm_close(got: Tensor, want: Tensor, context: str = "") -> None:
    """Raise AssertionError unless `got` matches the fp64 reference `want` as a GEMM result must."""
    assert got.shape == want.shape, f"{context}: shape {tuple(got.shape)} != {tuple(want.shape)}"
    nan = torch.isnan(want)
    assert torch.equal(torch.isnan(got), nan), f"{context}: NaN in other places"
    g, w = got.double().masked_fill(nan, 0), want.double().masked_fill(nan, 0)
    if g.numel() == 0:
        return
    diff = relative_diff(g, w)
    error = (g - w).abs()
    step = STEP[got.dtype]
    allowed = step * torch.maximum(w.abs(), w.square().mean().sqrt())
    worst = int((error - allowed).argmax())
    text = (
        f"{context}: relative diff {diff:.2e} (allowed {GEMM_DIFF[got.dtype]:.0e}); worst element "
        f"{worst}: got {g.flatten()[worst]:.8g}, want {w.flatten()[worst]:.8g}; "
        f"{(error <= allowed).double().mean():.1%} of the elements pass"
    )
    assert diff <= GEMM_DIFF[got.dtype], text
    assert bool((error <= allowed).all()), text
