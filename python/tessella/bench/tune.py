"""Measures the choices that a family's planner has, for `tessella tune`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tessella import ops, tuned
from tessella.bench import BenchError
from tessella.bench.timing import inner_calls, time_cuda
from tessella.bench.w4ax_gemm_cuda import LINEARS, ROTATE_BYTES, plainly, random_weights
from tessella.testing.force import gpu_kernels

FAMILIES = ("w4ax_gemm",)
M_VALUES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SPLITS = (1, 2, 3, 4, 6, 8)
PLANNER = "planner"
LEAST_GAIN = 0.02
"""A choice is worth a row if it beats the planner's by this share of the time."""

REPS = 9

Row = dict[str, Any]


def cases(models: Sequence[str], schemes: Sequence[str], tokens: Sequence[int]) -> list[Row]:
    """The cases of a run: every M of one weight, then the next weight.

    Raises BenchError for an unknown model.
    """
    for model in models:
        if model not in LINEARS:
            raise BenchError(f"model: expected one of {', '.join(LINEARS)}, got {model!r}")
    return [
        {"scheme": scheme, "N": N, "K": K, "M": M}
        for model in models
        for N, K in LINEARS[model]
        for scheme in schemes
        for M in tokens
    ]


def candidates(case: Row) -> Iterator[Row]:
    """Every kernel and split that can run a case, the kernels' own refusal being the judge."""
    for kernel in gpu_kernels("w4ax_gemm"):
        for split in SPLITS if ".sm90." in kernel else ():
            yield case | {"kernel": kernel, "split": split}


def run(found: Sequence[Row], progress: Callable[[int, int, Row], None]) -> Iterator[Row]:
    """Measure cases; yields for each the best row with `us` and `planner_us`.

    The kernels' tables are restored afterwards. Raises BenchError without a Hopper kernel.
    """
    if not any(".sm90." in k for k in gpu_kernels("w4ax_gemm")):
        raise BenchError("tune: needs a Hopper GPU and a build with sm_90a kernels")
    device = torch.cuda.get_device_name()
    last, blobs = None, []
    try:
        for done, case in enumerate(found):
            progress(done, len(found), case)
            shape = case["scheme"], case["N"], case["K"]
            if shape != last:
                blobs.clear()
                copies = max(2, -(-ROTATE_BYTES // (case["N"] * case["K"] // 2)))
                blobs += random_weights(*shape, copies)
                last = shape
            yield _best(case, blobs, device)
    finally:
        tuned.install()


def _best(case: Row, blobs: list[torch.Tensor], device: str) -> Row:
    M, N, K, scheme = (case[k] for k in ("M", "N", "K", "scheme"))
    a = ops.act_quant(torch.randn(M, K, device="cuda", dtype=torch.bfloat16))
    acts = a.codes8, a.codes4, a.sums, a.scales

    def call(text: str) -> Callable[[int], torch.Tensor]:
        def product(i: int) -> torch.Tensor:
            tuned.use(text)  # at capture, which is not timed
            blob = blobs[i % len(blobs)]
            return torch.ops.tessella.w4ax_gemm(
                *acts, blob, scheme, N, "token", None, torch.bfloat16
            )

        return plainly(product)

    variants, rows = {PLANNER: call("")}, {}
    for row in candidates(case):
        values = ["tune", device, "w4ax_gemm", *(str(row[k]) for k in tuned.FIELDS)]
        name, chosen = f"{row['kernel']}/{row['split']}", call("\t".join(values))
        try:
            chosen(0)
        except RuntimeError as e:
            if "cannot run" not in str(e):
                raise
            continue
        variants[name], rows[name] = chosen, row
    inner = inner_calls(max(5.0, 2.0 * M * N * K / 6e8))
    times = time_cuda(variants, inner=inner, reps=REPS)
    best = min(rows, key=lambda name: times[name].us)
    us, planner = round(times[best].us, 2), round(times[PLANNER].us, 2)
    return rows[best] | {"us": us, "planner_us": planner}


def worth(row: Row) -> bool:
    """Whether a measured row beats the planner by more than noise."""
    return row["us"] < (1 - LEAST_GAIN) * row["planner_us"]
