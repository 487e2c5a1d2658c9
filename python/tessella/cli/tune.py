"""``tessella tune``: measure the planner's choices on this GPU, and keep the better ones."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tessella.cli.session import Debug, Json, session


class Family(str, Enum):
    """Families whose planner has choices to measure."""

    w4ax_gemm = "w4ax_gemm"


class Scheme(str, Enum):
    """Weight schemes with a Hopper kernel."""

    twolevel = "twolevel"
    channel = "channel"
    g128 = "g128"


def tune(
    family: Annotated[Family, typer.Argument(help="What to tune.")],
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="Linears of this model, repeatable; default: all known."),
    ] = None,
    schemes: Annotated[
        list[Scheme] | None, typer.Option("--scheme", help="Repeatable; default: all three.")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", min=8, help="Repeatable; default: 8 to 8192.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the table; default: the user's cache folder.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure tile choices on this GPU; writes the table that kernels then use.

    Every kernel and split that can run a case is timed beside the planner's own
    choice; a row is kept where one is clearly faster. The table is keyed by device
    and shape, replaced at once, and read when the package is imported.
    TESSELLA_TUNE=0 ignores it.

    JSON: family, device, path, measured, rows (scheme, N, K, M, kernel, split, us,
    planner_us).

    \b
    Examples:
      tessella tune w4ax_gemm
      tessella tune w4ax_gemm --model llama3-8b --scheme twolevel --tokens 64
    """
    with session(json=json, debug=debug) as s:
        from tessella.cli.loading import Device, check_device

        check_device(Device.cuda)
        import torch

        from tessella import tuned
        from tessella.bench import tune as measuring
        from tessella.bench.w4ax_gemm_cuda import LINEARS

        found = measuring.cases(
            models or list(LINEARS),
            [scheme.value for scheme in schemes or list(Scheme)],
            sorted(set(tokens or measuring.M_VALUES)),
        )
        device = torch.cuda.get_device_name()
        path = (out or tuned.folder()) / tuned.file_name(family.value, device)
        with s.progress("cases") as bar:
            task = bar.add_task(family.value, total=len(found))

            def show(done: int, total: int, case: dict) -> None:
                text = " ".join(f"{k}={v}" for k, v in case.items())
                bar.update(task, completed=done, total=total, description=text)

            measured = list(measuring.run(found, show))
        rows = [row for row in measured if measuring.worth(row)]
        tuned.write(path, family.value, device, rows)
        tuned.install()
        s.note(f"{len(rows)} of {len(measured)} cases gain; table in {path}")
        answer = {"family": family.value, "device": device, "path": str(path)}
        s.answer(answer | {"measured": len(measured), "rows": rows})
