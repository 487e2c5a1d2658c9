"""``tessella plan``: what the planner would do, and how long that should take."""

from __future__ import annotations

import dataclasses
import re
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from tessella.cli import plan_serving
from tessella.cli.session import Debug, Json, session

if TYPE_CHECKING:
    from tessella.bench.ceilings import Ceilings
    from tessella.bench.predict import Gemm, Prediction

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


app.command("serving")(plan_serving.serving)


@app.callback()
def _plan() -> None:
    """What the planner would do with a problem, and how long that should take."""


class Arch(str, Enum):
    """Machines whose ceilings are known; `here` measures this one."""

    here = "here"
    zen5 = "zen5"
    ascend910b = "910b"


class Scheme(str, Enum):
    """Weight schemes."""

    channel = "channel"
    g32 = "g32"
    g64 = "g64"
    g128 = "g128"
    twolevel = "twolevel"


class Act(str, Enum):
    """Activation formats, as results name them."""

    int8 = "int8"
    int8b128 = "int8b128"


class Isa(str, Enum):
    """Instruction sets that the CPU kernels are compiled for."""

    avx512vnni = "avx512vnni"
    avxvnni = "avxvnni"
    avx2 = "avx2"
    scalar = "scalar"


@app.command("gemm")
def gemm(
    M: Annotated[int, typer.Argument(min=1, help="Tokens.")],
    N: Annotated[int, typer.Argument(min=1, help="Out features.")],
    K: Annotated[int, typer.Argument(min=1, help="In features.")],
    scheme: Annotated[Scheme, typer.Option(help="Of the weight.")] = Scheme.twolevel,
    act: Annotated[Act, typer.Option(help="Activations: per token, or per 128.")] = Act.int8,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads.")] = 1,
    arch: Annotated[
        Arch, typer.Option(help="Ceilings: measured now, or of a known machine.")
    ] = Arch.here,
    isa: Annotated[
        Isa | None, typer.Option(help="Instruction set; default: the machine's best.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Kernel, tile and work split of a 4-bit linear layer, and its predicted time.

    JSON: plan (kernel, chunk_rows, tasks, us, memory_us, compute_us, roofline_us,
    roofline_frac, bound), problem, ceilings. With --arch 910b times are predicted
    from what the host emulator counts, never measured; plan has tile, cores, l2_us,
    cube_us and vector_us in place of chunk_rows and compute_us.

    \b
    Examples:
      tessella plan gemm 1 4096 4096
      tessella plan gemm 512 14336 4096 --threads 2 --arch zen5
      tessella plan gemm 16 4096 4096 --isa scalar --json
      tessella plan gemm 16 4096 4096 --arch 910b
    """
    with session(json=json, debug=debug) as s:
        if arch is Arch.ascend910b:
            return _ascend(s, M, N, K, scheme.value, act.value)
        from tessella.bench import ceilings, predict

        problem = predict.Gemm(M, N, K, scheme.value, act.value, threads)
        limits = ceilings.of(arch.value, threads, isa.value if isa else None)
        prediction = predict.gemm(problem, limits)
        s.show(_table(problem, prediction, limits))
        s.answer(
            {
                "plan": {
                    **dataclasses.asdict(prediction),
                    "roofline_frac": prediction.roofline_frac,
                    "bound": prediction.bound,
                },
                "problem": dataclasses.asdict(problem),
                "ceilings": {"arch": arch.value, **dataclasses.asdict(limits)},
            }
        )


def _ascend(s, M: int, N: int, K: int, scheme: str, act: str) -> None:
    """The plan for a 910B, and the prediction of its time."""
    from tessella.bench import ascend, predict

    problem = predict.Gemm(M, N, K, scheme, act)
    p = ascend.predict(problem)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    rows = {
        "kernel": p.kernel,
        "work": f"{p.tasks} tasks of {p.tile} on {p.cores} cores",
        "predicted": f"{p.us:,.1f} µs, bound by {p.bound}; a prediction, not run on a 910B",
        "memory": f"{p.memory_us:,.1f} µs for {problem.nbytes / 1e6:,.2f} MB",
        "L2": f"{p.l2_us:,.1f} µs",
        "cube cores": f"{p.cube_us:,.1f} µs for {problem.macs / 1e9:,.2f} GMAC",
        "vector cores": f"{p.vector_us:,.1f} µs",
        "roofline": f"{p.roofline_us:,.1f} µs; predicted to reach {p.roofline_frac:.0%} of it",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    s.show(table)
    s.answer(
        {
            "plan": {
                **dataclasses.asdict(p),
                "roofline_frac": p.roofline_frac,
                "bound": p.bound,
                "measured": False,
            },
            "problem": dataclasses.asdict(problem),
            "ceilings": {"arch": "910b", **dataclasses.asdict(ascend.CHIPS["910b"])},
        }
    )


def _table(problem: Gemm, p: Prediction, limits: Ceilings) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    rows = {
        "kernel": p.kernel,
        "work": f"{p.tasks} tasks of {p.chunk_rows} tokens x 64 features",
        "predicted": f"{p.us:,.1f} µs, bound by {p.bound}",
        "memory": f"{p.memory_us:,.1f} µs for {problem.nbytes / 1e6:,.2f} MB at "
        f"{limits.read_bytes_per_us / 1e3:,.1f} GB/s",
        "arithmetic": f"{p.compute_us:,.1f} µs for {problem.macs / 1e9:,.2f} GMAC; "
        f"peak {limits.macs_per_us / 1e3:,.0f} GMAC/s ({limits.isa})",
        "roofline": f"{p.roofline_us:,.1f} µs; the plan reaches {p.roofline_frac:.0%} of it",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


_REQUEST = re.compile(r"(?:(\d+)x)?(\d+):(\d+)(?::(full|causal|window|tree))?")
_SHOWN = 12  # tasks of a table


@app.command("msm")
def msm(
    requests: Annotated[
        list[str],
        typer.Argument(metavar="[Nx]Q:KV[:MASK]...", help="Query tokens and keys of a request."),
    ],
    heads: Annotated[
        str, typer.Option(help="H:J:D: query heads, kv heads, head dim.")
    ] = "32:8:128",
    units: Annotated[int, typer.Option(min=1, help="Workers: threads, or resident CTAs.")] = 1,
    window: Annotated[int, typer.Option(min=0, help="Keys of a sliding window.")] = 0,
    split: Annotated[int, typer.Option(min=0, help="Fixed split, a multiple of 256.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Tasks of a batch of attention: tiles, splits and merges, the same for every device.

    MASK is full, causal (the default), window or tree.

    JSON: plan (tasks, merges, partial_rows, table: request, tile, row0, rows, kv_begin, kv_end,
    partial, cost), requests.

    \b
    Examples:
      tessella plan msm 362:1318 1:1657 53:2036:tree
      tessella plan msm 64x1:4096 --units 264
      tessella plan msm 1:131072 --units 2 --json
    """
    parsed = [_REQUEST.fullmatch(r) for r in requests]
    if bad := [r for r, m in zip(requests, parsed, strict=True) if m is None]:
        raise typer.BadParameter(f"expected [Nx]Q:KV[:MASK], got {bad[0]!r}")
    with session(json=json, debug=debug) as s:
        from tessella.bench import attention_plan

        batch = [
            (int(m[2]), int(m[3]), m[4] or "causal") for m in parsed for _ in range(int(m[1] or 1))
        ]
        plan = attention_plan.make(batch, heads, units, window, split)
        s.show(_msm_table(plan))
        s.answer({"plan": plan, "requests": [list(r) for r in batch]})


def _msm_table(plan: dict) -> Table:
    table = Table(title=Text(plan["text"]), title_justify="left", box=None, pad_edge=False)
    for name in plan["table"][0] if plan["table"] else ():
        table.add_column(name, justify="right")
    for task in plan["table"][:_SHOWN]:
        table.add_row(*map(str, task.values()))
    if (more := len(plan["table"]) - _SHOWN) > 0:
        table.add_row(f"... and {more} more")
    return table
