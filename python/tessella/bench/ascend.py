"""What w4ax_gemm should take on an Ascend 910B: a prediction from the emulator's counts.

The kernels run on the host emulator without data, which counts what every core issues: products of
fractals, repeats of vector instructions, bytes moved by each unit. Rates of the chip turn the
counts into cycles. **Nothing of this was measured on a 910B.** It assumes that units overlap as
the flags allow, and leaves out bank conflicts, misses of the instruction cache and the scalar unit.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tessella import _native
from tessella.bench import BenchError
from tessella.bench.predict import Gemm

PIPES = ("S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX")
PATHS = ("gm_ub", "gm_l1", "ub_gm", "l1_l0", "l0c_gm")
CUBE = ("s4", "s8", "f16", "f32")
COUNTS = (
    *(f"instructions_{p}" for p in PIPES),
    *(f"bytes_{p}" for p in PATHS),
    *(f"fractals_{t}" for t in CUBE),
    "vector_repeats",
    "cross_core_waits",
)
"""What the emulator counts of a core, in the order of its answer."""

MODES = ("split", "direct", "widen")
# fmt: off
HEADER = (
    "M", "N", "blocks", "mode", "scheme", "dtype", "per_block", "scale_row", "has_bias", "tokens",
    "rows", "n_tile", "m_tiles", "n_tiles", "grouped", "unit_blocks", "ring", "block_bytes",
    "panel_bytes", "tail", "cores", "at_sums", "at_ring", "workspace", "tasks_at",
)
# fmt: on
"""Fields of a plan's header (ascend/tiling/w4ax_gemm.h)."""


@dataclass(frozen=True)
class Chip:
    """Rates of a 910B, from public documentation; starts are assumptions."""

    cores: int = 24  # one cube core and two vector cores each
    cycles_per_us: float = 1800.0
    read_bytes_per_us: float = 1.6e6  # memory
    l2_bytes_per_us: float = 5.0e6  # of all cores together
    fractals_per_cycle: float = 1.0  # 16 x 16 x 32 bytes; not confirmed for INT4
    l1_bytes_per_cycle: float = 256.0  # L1 to L0A and L0B
    vector_start: float = 8.0  # cycles of an instruction beside its repeats; assumed
    copy_start: float = 60.0  # of a copy; assumed
    flag_cycles: float = 300.0  # of a flag between cores; assumed
    launch_us: float = 5.0  # assumed


CHIPS: Mapping[str, Chip] = {"910b": Chip()}


@dataclass(frozen=True)
class AscendPrediction:
    """Times in microseconds. A prediction: no run on a 910B stands behind it."""

    kernel: str
    tile: str
    tasks: int
    cores: int
    us: float
    memory_us: float
    l2_us: float
    cube_us: float
    vector_us: float
    roofline_us: float

    @property
    def roofline_frac(self) -> float:
        """Fraction of the roofline that the plan should reach, as predicted."""
        return self.roofline_us / self.us

    @property
    def bound(self) -> str:
        """What limits the plan, as predicted."""
        times = {
            "memory": self.memory_us,
            "L2": self.l2_us,
            "cube cores": self.cube_us,
            "vector cores": self.vector_us,
        }
        return max(times, key=times.__getitem__)


def library() -> Path:
    """Where the emulator's library is: in the package, or where TESSELLA_ASCEND_TWIN says.

    Raises BenchError where it is not.
    """
    asked = os.environ.get("TESSELLA_ASCEND_TWIN")
    path = Path(asked) if asked else Path(_native.__file__).with_name("_ascend_twin.so")
    if not path.is_file():
        where = f"TESSELLA_ASCEND_TWIN={asked} is no file" if asked else "this build is without it"
        raise BenchError(
            f"arch 910b: counts come from the host emulator of AscendC, and {where}; build with "
            "TESSELLA_ASCEND=TWIN, or set TESSELLA_ASCEND_TWIN to its _ascend_twin.so"
        )
    return path


def _ops():
    torch.ops.load_library(library())
    return torch.ops.tessella_ascend


def _arguments(problem: Gemm, chip: Chip) -> tuple:
    if problem.scheme not in ("channel", "g128", "twolevel"):
        raise BenchError(
            f"arch 910b: scheme: expected channel, g128 or twolevel, got {problem.scheme!r}"
        )
    per_block = problem.act.endswith("b128")
    like = torch.empty(0)
    return (
        like, problem.M, problem.N, problem.K, problem.scheme,
        problem.act.startswith("int8"), per_block, chip.cores, "",
    )  # fmt: skip


def plan(problem: Gemm, chip: Chip) -> dict[str, int]:
    """The header of the kernel's plan."""
    table = _ops().gemm_plan(*_arguments(problem, chip)).tolist()
    return dict(zip(HEADER, table))


def counts(problem: Gemm, chip: Chip) -> list[dict[str, int]]:
    """What each core does: cube, vector, vector of the first block, then of the next."""
    flat = _ops().gemm_counts(*_arguments(problem, chip))
    return [dict(zip(COUNTS, row)) for row in flat.view(-1, len(COUNTS)).tolist()]


def _cube_cycles(c: Mapping[str, int], chip: Chip) -> float:
    """Of the busiest unit of a cube core."""
    products = sum(c[f"fractals_{t}"] for t in CUBE) / chip.fractals_per_cycle
    loads = c["bytes_l1_l0"] / chip.l1_bytes_per_cycle + c["instructions_MTE1"] * chip.vector_start
    copies = c["instructions_MTE2"] * chip.copy_start
    out = c["instructions_FIX"] * chip.copy_start
    return max(products, loads, copies, out)


def _vector_cycles(c: Mapping[str, int], chip: Chip) -> float:
    """Of the busiest unit of a vector core."""
    vector = c["vector_repeats"] + c["instructions_V"] * chip.vector_start
    return max(
        vector,
        c["instructions_MTE2"] * chip.copy_start,
        c["instructions_MTE3"] * chip.copy_start,
    )


def predict(problem: Gemm, arch: str = "910b") -> AscendPrediction:
    """How long a linear layer should take. Raises BenchError where the emulator is missing."""
    chip = CHIPS[arch]
    header, cores = plan(problem, chip), counts(problem, chip)
    mode = MODES[header["mode"]]
    cube = max(_cube_cycles(c, chip) for c in cores[0::3]) / chip.cycles_per_us
    vector = max(_vector_cycles(c, chip) for c in (*cores[1::3], *cores[2::3]))
    moved = sum(c[f"bytes_{p}"] for c in cores for p in PATHS if p != "l1_l0")
    l2 = moved / chip.l2_bytes_per_us
    memory = problem.nbytes / chip.read_bytes_per_us
    vector /= chip.cycles_per_us
    fill = 4 * chip.flag_cycles / chip.cycles_per_us  # first and last hand-over between cores
    macs_per_cycle = 16 * 16 * (64 if mode == "direct" else 32)
    peak = macs_per_cycle * chip.cores * chip.cycles_per_us
    tile = f"{header['tokens']} tokens x {header['n_tile']} features"
    return AscendPrediction(
        kernel=f"w4ax_gemm.910b.{mode}",
        tile=tile,
        tasks=header["m_tiles"] * header["n_tiles"],
        cores=header["cores"],
        us=max(memory, l2, cube, vector) + fill + chip.launch_us,
        memory_us=memory,
        l2_us=l2,
        cube_us=cube,
        vector_us=vector,
        roofline_us=max(memory, problem.macs / peak),
    )
