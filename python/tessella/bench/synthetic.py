"""FMPQ on layers as wide as those of large models: activations made up, with realistic outliers.

Channels of the normalised hidden state have log-normal sizes; one in a hundred is an outlier, 10 to
100 times as large (COMET section 3), and its columns are smaller by as much, so that every channel
matters to the result. Weights are normal. Errors are those of the results on tokens that no step
has seen, weights and activations quantised, relative to exact results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tessella.bench import records
from tessella.quant.calibrate import Stats
from tessella.quant.error import output_error
from tessella.quant.fmpq import Fmpq, rotate_blocks
from tessella.quant.layer import NORMS, Heads, Layer
from tessella.quant.recipe import Recipe

WIDTHS = (4096, 8192)
"""Hidden sizes: Llama-3-8B's, Llama-3-70B's."""

RECIPES = ("w4a8", "w4a8-b128", "w4a4", "w4ax-comet", "w4ax", "w4ax-class")
FRACTION, SMALLEST, LARGEST = 0.01, 10.0, 100.0
"""Share of outlier channels, and their sizes."""

N, SEEN, UNSEEN = 256, 512, 128
"""Out features of each linear, tokens of the calibration, tokens that errors are measured on."""

SITE = "mlp"


def activations(K: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs [tokens, K] and the factor of each channel [K], 1 for those that are no outliers."""
    size = (0.4 * torch.randn(K, generator=generator)).exp()
    factor = torch.ones(K)
    chosen = torch.randperm(K, generator=generator)[: round(FRACTION * K)]
    spread = torch.rand(len(chosen), generator=generator)
    factor[chosen] = SMALLEST * (LARGEST / SMALLEST) ** spread
    return torch.randn(tokens, K, generator=generator) * size * factor, factor


def measure(recipe: Recipe, K: int, seed: int = 0) -> dict[str, Any]:
    """The record of one recipe on a layer K wide: errors, marks, share of W4A4."""
    g = torch.Generator().manual_seed(seed)
    x, factor = activations(K, SEEN + UNSEEN, g)
    names = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    tensors = {name: torch.randn(N, K, generator=g) / factor * K**-0.5 for name in names}
    exact = dict(tensors)
    seen, unseen = x[:SEEN], x[SEEN:]
    stats = Stats(
        tokens=SEEN,
        amax=seen.abs().amax(0),
        mean=seen.mean(0),
        moment=seen.square().mean(0),
        rows=torch.cat([seen[:: SEEN // 256], unseen]),  # the last ones are not shown to steps
        hessian=seen.T @ seen / SEEN if "hessian" in recipe.needs else None,
    )
    tensors[NORMS[SITE]] = torch.ones(K)
    layer = Layer(0, Heads(1, 1, K), recipe.target, tensors, {SITE: stats})
    marks = None
    for step in recipe.changes:
        if not isinstance(step, Fmpq):
            raise ValueError(f"synthetic layers: expected fmpq before the codes, got {step}")
        stats.rows, held = stats.rows[:-UNSEEN], stats.rows[-UNSEEN:]
        marks = step.change_site(layer, SITE)
        held = held * layer.tensors[NORMS[SITE]]
        held = held if marks.perm is None else held[:, marks.perm]
        held = rotate_blocks(held, marks.k8) if marks.hadamard else held
        stats.rows = torch.cat([stats.rows, held])
    k8 = recipe.k8_of(K) if marks is None else marks.k8
    rows, errors = stats.rows[-UNSEEN:], []
    for name in names:
        w = layer.tensors[name]
        torch.testing.assert_close(rows @ w.T, unseen @ exact[name].T, rtol=1e-3, atol=1e-3)
        q = recipe.quantize(w, stats)
        errors.append(output_error(w, q, rows, k8=k8, granularity=recipe.granularity))
    stamp = records.stamp("cpu")
    return {
        "layer": "synthetic",
        "K": K,
        "recipe": recipe.name,
        "outliers": f"{FRACTION:.2%} x{SMALLEST:g} to x{LARGEST:g}",
        "error": round(max(errors), 5),
        "w4a4_fraction": round(1 - (K if k8 < 0 else k8) / K, 4),
        "int8_channels": K if k8 < 0 else k8,
        "hadamard": bool(marks and marks.hadamard),
        "commit": stamp["commit"],
        "date": stamp["date"],
    }
