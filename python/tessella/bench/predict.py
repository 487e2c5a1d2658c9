"""A cost model of w4ax_gemm on CPU: what a plan should take, given what the machine can do.

A task walks the weights of a panel of 64 features once for its tokens. Its time is the larger of
reading and computing; computing has three parts, all in units of the panel's dot products for one
token: the tokens themselves, decoding weights (once for each pass over them), and adding a
block's sums to the totals (a share of the tokens').
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tessella import _native, layout
from tessella.bench import BenchError
from tessella.bench.ceilings import Ceilings
from tessella.formats import BLOCK_K, padded_k

CALL_US = 6.0
"""An op from Python: dispatch, checks, the result's memory."""

FORK_US = 4.0
"""Waking the threads of a parallel region, and waiting for the last one."""

MOST_ROWS: Mapping[str, Mapping[str, int]] = {
    "avx512vnni": {"gemv": 6, "skinny": 12},
    "avxvnni": {"gemv": 2, "skinny": 4},
    "avx2": {"gemv": 2, "skinny": 4},
    "scalar": {"gemv": 2, "skinny": 4},
}
"""Tokens of a register tile (csrc/w4ax_gemm/cpu.inl): each needs the weights decoded once."""


@dataclass(frozen=True)
class Cost:
    """Work beside the dot products of one token, in units of those."""

    decode: float  # weights of a block, in registers
    store: float  # the same into L1, for the wide tile
    flush: float  # of a block's sums, a token


COSTS: Mapping[str, Cost] = {
    # fitted to bench/results/cpu/w4ax_gemm.json (Zen 4)
    "avx512vnni": Cost(decode=0.6, store=0.6, flush=0.13),
    "avxvnni": Cost(decode=1.0, store=3.0, flush=0.15),
    # without it a dot product is three instructions, so all else weighs less
    "avx2": Cost(decode=0.4, store=1.2, flush=0.08),
    "scalar": Cost(decode=1.0, store=2.0, flush=0.1),
}


@dataclass(frozen=True)
class Gemm:
    """A problem: M tokens, N out and K in features; act as records name it."""

    M: int
    N: int
    K: int
    scheme: str = "twolevel"
    act: str = "int8"
    threads: int = 1

    @property
    def nbytes(self) -> int:
        """Memory that must move: packed weight with scales, activations, bf16 results."""
        Kp = padded_k(self.K)
        blocks = Kp // BLOCK_K
        scales = 1 if self.act == "int8" else blocks
        activations = self.M * (Kp + 4 * blocks + 4 * scales)
        return layout.w4_cpu_bytes(self.scheme, self.N, self.K) + activations + 2 * self.M * self.N

    @property
    def macs(self) -> int:
        """8-bit multiply-adds."""
        return self.M * self.N * self.K


@dataclass(frozen=True)
class Prediction:
    """Times in microseconds; `us` is the whole call, `roofline_us` what no kernel can beat."""

    kernel: str
    chunk_rows: int
    tasks: int
    us: float
    memory_us: float
    compute_us: float
    roofline_us: float

    @property
    def roofline_frac(self) -> float:
        """Fraction of the roofline that the plan should reach."""
        return self.roofline_us / self.us

    @property
    def bound(self) -> str:
        """What limits the plan."""
        return "memory" if self.memory_us >= self.compute_us else "compute"


def gemm(problem: Gemm, limits: Ceilings) -> Prediction:
    """What the planner does with a problem on a machine with these ceilings, and how long it takes.

    Raises BenchError without the compiled module, or for an instruction set that it lacks.
    """
    plan = plan_gemm(problem, limits.isa)
    cost, tile, chunk = COSTS[limits.isa], plan["tile"], plan["chunk_rows"]
    if tile == "wide":
        passes, each = 1, cost.store
    else:
        passes, each = -(-chunk // MOST_ROWS[limits.isa][tile]), cost.decode
    rows = chunk * (1 + cost.flush) + passes * each
    threads = min(problem.threads, plan["tasks"])
    rounds = -(-plan["tasks"] // threads)
    per_thread = limits.macs_per_us / problem.threads
    compute = rounds * rows * 64 * padded_k(problem.K) / per_thread
    # half of the threads read more than half of what all of them do; taken as proportional
    memory = problem.nbytes / limits.read_bytes_per_us * problem.threads / threads
    overhead = CALL_US + (FORK_US if threads > 1 else 0)
    return Prediction(
        kernel=plan["kernel"],
        chunk_rows=chunk,
        tasks=plan["tasks"],
        us=max(compute, memory) + overhead,
        memory_us=memory,
        compute_us=compute,
        roofline_us=limits.roofline_us(problem.nbytes, problem.macs),
    )


def plan_gemm(problem: Gemm, isa: str) -> dict[str, Any]:
    """The planner's choice: kernel, tile, chunk_rows, tasks, task_work."""
    if _native._C is None:
        raise BenchError(f"plan: needs the compiled module _C ({_native.C_ERROR})")
    if isa not in COSTS:
        raise BenchError(f"plan: isa: expected one of {', '.join(COSTS)}, got {isa!r}")
    return _native._C.plan_w4ax_gemm(problem.M, problem.N, problem.K, problem.threads, isa)
