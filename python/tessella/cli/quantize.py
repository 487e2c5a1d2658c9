"""``tessella quantize``: a checkpoint to 4 bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tessella.cli.loading import Device, DeviceOption, check_device
from tessella.cli.session import Debug, Json, session

if TYPE_CHECKING:
    from tessella.models.apply import Calibration
    from tessella.models.report import Progress, Report


def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the checkpoint to convert.")],
    out: Annotated[Path, typer.Argument(help="Folder to create; must be new or empty.")],
    recipe: Annotated[
        str, typer.Option(help="Preset or TOML file; an unknown name lists the presets.")
    ] = "w4a8",
    lm_head: Annotated[
        bool, typer.Option("--lm-head", help="Also convert the output head.")
    ] = False,
    calib: Annotated[
        Path | None,
        typer.Option(help="Text that the model reads so that steps see its activations."),
    ] = None,
    calib_samples: Annotated[int, typer.Option(min=1, help="Windows of the text to read.")] = 32,
    calib_ctx: Annotated[int, typer.Option(min=16, help="Tokens in a window.")] = 512,
    calib_cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps what was seen, for other recipes.")
    ] = None,
    device: DeviceOption = Device.cpu,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted conversion.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and report sizes; write nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No table of layers.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint to 4-bit weights, one layer in memory at a time.

    OUT appears when everything is written. An interrupted run leaves no OUT;
    --resume continues it from what it kept in OUT.partial.

    Recipes such as w4a8-qoq and w4a8kv4 look at the model's activations and need
    --calib, a text like those the model will see. With --calib the table has the
    error of each linear's results: rounded to nearest, and as stored. A recipe
    file holds the steps in order; docs/recipes.md describes them.

    JSON: layers (name, shape [N, K], scheme, rel_error, bytes, before, after),
    bytes_in, bytes_out, seconds, peak_rss and memory_estimate (bytes), recipe.

    \b
    Examples:
      tessella quantize ./Llama-3.2-1B ./Llama-3.2-1B-w4a8
      tessella quantize ./model ./out --recipe w4a8kv4 --calib text.txt.xz
      tessella quantize ./model ./out --recipe w4a8-qoq --calib text.jsonl --dry-run
      tessella quantize Qwen/Qwen3-0.6B ./qwen-w4 --recipe w4a8-g128 --lm-head
      tessella quantize ./model ./out --recipe my.toml --dry-run --json
    """
    with session(json=json, debug=debug) as s:
        from tessella.models.convert import convert
        from tessella.quant import recipe as recipes

        wanted = recipes.load(recipe)
        if lm_head:
            wanted = dataclasses.replace(wanted, lm_head=True)
        where = check_device(device)
        seen = _calibration(model, calib, calib_samples, calib_ctx, where, calib_cache)
        with s.progress("linears") as bar:
            task = bar.add_task("converting", total=None)

            def show(p: Progress) -> None:
                bar.update(task, completed=p.done, total=p.total, description=p.name)

            how = {"resume": resume, "dry_run": dry_run, "progress": show, "calibration": seen}
            report = convert(model, out, wanted, device=where, **how)
        if not quiet:
            s.show(_layers(report))
        s.show(_summary(report, None if dry_run else out))
        s.answer({**dataclasses.asdict(report), "recipe": wanted.to_dict()})


def _calibration(
    model: str, text: Path | None, samples: int, ctx: int, device: str, cache: Path | None
) -> Calibration | None:
    """The model and the text to send through it; None without a text."""
    if text is None:
        return None
    from tessella.integrations import calibrate

    return calibrate.calibration(model, text, samples=samples, ctx=ctx, device=device, cache=cache)


def _layers(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("linear", overflow="fold")
    headings = ["N x K", "scheme", "error", "MB"]
    if results := any(r.after is not None for r in report.layers):
        headings[3:3] = ["results: rounded", "stored"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for r in report.layers:
        errors = [r.rel_error, r.before, r.after] if results else [r.rel_error]
        cells = ["" if e is None else f"{e:.4f}" for e in errors]
        table.add_row(
            r.name, f"{r.shape[0]} x {r.shape[1]}", r.scheme, *cells, f"{r.bytes / 1e6:.3f}"
        )
    return table


def _summary(report: Report, out: Path | None) -> str:
    verb = "would become" if out is None else "became"
    errors = [r.rel_error for r in report.layers if r.rel_error is not None]
    mean = f", mean relative error {sum(errors) / len(errors):.4f}" if errors else ""
    pairs = [(r.before, r.after) for r in report.layers if None not in (r.before, r.after)]
    if pairs:
        before, after = (sum(e) / len(pairs) for e in zip(*pairs))
        mean += f" (of results {before:.4f} rounded to nearest, {after:.4f} stored)"
    memory = report.memory_estimate if out is None else report.peak_rss
    where = "" if out is None else f": {out}"
    return (
        f"{len(report.layers)} linears{mean}; {report.bytes_in / 1e6:,.1f} MB {verb} "
        f"{report.bytes_out / 1e6:,.1f} MB in {report.seconds:.1f} s, "
        f"peak memory {memory / 1e6:,.0f} MB{where}"
    )
