"""How far a quantised linear's results are from the exact ones, on inputs that were seen."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.formats import W4Weight
from tessella.ref.act_quant import act_quant
from tessella.ref.w4ax_gemm import act_dequant, w4_dequant

ROWS = 512
"""Most out features that an error is estimated from, evenly spaced."""


def some_rows(w_NK: Tensor, most: int = ROWS) -> Tensor:
    """Evenly spaced rows of a weight."""
    N = len(w_NK)
    return w_NK if most >= N else w_NK[torch.arange(most, device=w_NK.device) * N // most]


def output_error(
    w_NK: Tensor, q: W4Weight, x_SK: Tensor, *, k8: int = -1, granularity: str = "token"
) -> float:
    """||x' w'^T - x w^T|| / ||x w^T||, with x' and w' what a kernel multiplies.

    Args:
        w_NK: the weight that `q` stands for.
        x_SK: inputs; permuted already where the linear permutes them.
        k8, granularity: how activations are quantised, see :func:`tessella.ops.act_quant`.
    """
    x = x_SK.float()
    acts = act_dequant(act_quant(x, k8, granularity), torch.float32)[:, : q.K]
    exact = x @ w_NK.float().T
    difference = acts @ w4_dequant(q, torch.float32)[:, : q.K].T - exact
    norm = exact.double().norm().item()
    return difference.double().norm().item() / norm if norm else 0.0
