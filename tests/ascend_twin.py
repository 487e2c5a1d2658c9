"""Builds the Ascend kernels on the host emulator, and calls them on CPU tensors."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tessella.formats import ActBlocks, W4Weight

ROOT = Path(__file__).resolve().parents[1]
CORES = 3
"""Of the emulated device: more than one, and not a divisor of much."""


@functools.cache
def build(target: str = "all", sanitize: str = "") -> Path:
    """Build folder in which `target` is up to date; skips the test where there is no compiler.

    It lies beside other build products, so that a second run compiles nothing.
    """
    for tool in ("cmake", "ninja", os.environ.get("CXX", "g++")):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    folder = ROOT / "build" / ("twin-" + sanitize.replace(",", "-") if sanitize else "twin")
    torch_root = Path(torch.__file__).parent
    configure = ["cmake", "-S", ROOT / "ascend", "-B", folder, "-G", "Ninja"]
    configure += [f"-DTESSELLA_TORCH_ROOT={torch_root}", f"-DTESSELLA_SANITIZE={sanitize}"]
    for command in (configure, ["cmake", "--build", folder, "--target", target]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


@functools.cache
def ops():
    """torch.ops.tessella_ascend, built and loaded."""
    torch.ops.load_library(build("_ascend_twin") / "_ascend_twin.so")
    return torch.ops.tessella_ascend


def fields(w: W4Weight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a weight, empty ones for those that its scheme does not have."""
    none = torch.empty(0)
    return (
        w.codes,
        none if w.channel_scales is None else w.channel_scales,
        none if w.group_scales is None else w.group_scales,
        w.zeros,
    )


def pack(w: W4Weight) -> Tensor:
    """A weight in the order of the cube unit."""
    return ops().w4_pack(*fields(w), w.scheme)


def gemm(
    a: ActBlocks,
    w: W4Weight,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    mode: str = "",
    seed: int = -1,
    cores: int = CORES,
) -> Tensor:
    """w4ax_gemm on the twin; raises what it finds."""
    return ops().w4ax_gemm(
        a.codes8, a.codes4, a.sums, a.scales, pack(w), w.scheme, w.codes.shape[0], a.granularity,
        bias, dtype, cores, mode, seed,
    )  # fmt: skip
