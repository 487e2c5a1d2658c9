"""Bugs seeded into the real kernels: each mutant is built, run on the emulator, and caught.

Small kernels that break one rule each are in ascend/twin/tests/rules.cpp; these show that the rules
also see a bug in the middle of a kernel that otherwise works.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from ascend_twin import ROOT, build
from command import environment

MUTANTS = {  # file in ascend/kernels, text, replacement, mode, words of the finding
    "missing cross-core flag": (
        "w4ax_cube.h",
        "if (u >= 2) CrossCoreWaitFlag(kTaken);",
        "",
        "split",
        "without a flag between|flag: cross-core flag 2 was set and never waited for",
    ),
    "missing barrier": (
        "w4ax_sums.h",
        "ShiftLeft(x, x, four, count_);\n      Barrier();",
        "ShiftLeft(x, x, four, count_);",
        "split",
        "hazard: Add on pipe V",
    ),
    "deadlock": (
        "w4ax_widen.h",
        "CrossCoreSetFlag<2, PIPE_MTE3>(kWide);",
        "if (GetSubBlockIdx() == 0) CrossCoreSetFlag<2, PIPE_MTE3>(kWide);",
        "widen",
        "deadlock: every core waits",
    ),
    "double free": (
        "w4ax_cube.h",
        "a1_.FreeTensor(a1);",
        "a1_.FreeTensor(a1);\n    a1_.FreeTensor(a1);",
        "split",
        "queue: a tensor is used after FreeTensor",
    ),
    "wrong stride": (
        "w4ax_sums.h",
        "Blocks(u_.rows, half_ / 8, (t.n_tile - half_) / 8, 0)",
        "Blocks(u_.rows, half_ / 8, (t.n_tile - half_) / 8 + 1, 0)",
        "split",
        "uninitialised: ",
    ),
    "misaligned copy": (
        "w4ax_prepare.h",
        "DataCopy(in, codes8_[token * 128], tokens * 128);",
        "DataCopy(in[8], codes8_[token * 128], tokens * 128);",
        "split",
        "align: DataCopy",
    ),
    "overflow of a buffer": (
        "w4ax_widen.h",
        "pipe->InitBuffer(out_, 2, 16384);",
        "pipe->InitBuffer(out_, 2, 4096);",
        "widen",
        "bounds: And on pipe V",
    ),
    "rows past M are stored": (
        "w4ax_sums.h",
        "Bytes(u_.tokens, columns * 2,",
        "Bytes(u_.tokens + 1, columns * 2,",
        "split",
        "uninitialised: DataCopyPad|bounds: DataCopyPad",
    ),
}

RUN = """
import sys, torch
from tessella.ref import act_quant
from tessella.testing.cases import random_activations, random_weight
torch.ops.load_library(sys.argv[1])
op, rng = torch.ops.tessella_ascend, torch.Generator().manual_seed(1)
a = act_quant.act_quant(random_activations(9, 1024, torch.bfloat16, rng))
w = random_weight("twolevel", 400, 1024, rng)
blob = op.w4_pack(w.codes, w.channel_scales, w.group_scales, w.zeros, "twolevel")
op.w4ax_gemm(a.codes8, a.codes4, a.sums, a.scales, blob, "twolevel", 400, "token", None,
             torch.bfloat16, 1, sys.argv[2], -1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_a_seeded_bug_is_caught(name, tmp_path):
    """With None the kernel is as it is, and passes."""
    build("_ascend_twin")  # skips where there is no compiler
    for folder in ("ascend", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    mode, words = "split", ""
    if name is not None:
        file, text, replacement, mode, words = MUTANTS[name]
        path = tmp_path / "ascend/kernels" / file
        assert path.read_text().count(text) == 1
        path.write_text(path.read_text().replace(text, replacement))
    torch_root = torch.__path__[0]
    for command in (
        ["cmake", "-S", tmp_path / "ascend", "-B", tmp_path / "b", "-G", "Ninja",
         f"-DTESSELLA_TORCH_ROOT={torch_root}"],
        ["cmake", "--build", tmp_path / "b", "--target", "_ascend_twin"],
    ):  # fmt: skip
        # the same paths to ccache in every copy: only what a mutant changes is compiled again
        where = {"CCACHE_BASEDIR": str(tmp_path), "CCACHE_NOHASHDIR": "1"}
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **where})
    library = str(tmp_path / "b/_ascend_twin.so")
    done = subprocess.run(
        [sys.executable, "-c", RUN, library, mode],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    if name is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert any(w in done.stderr for w in words.split("|")), done.stderr[-600:]
