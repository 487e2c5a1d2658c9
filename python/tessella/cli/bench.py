"""``tessella bench``: measure families of kernels, and report what was measured."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tessella.bench.families import FAMILIES
from tessella.cli.loading import Device, DeviceOption, check_device
from tessella.cli.session import Debug, Json, Session, session

if TYPE_CHECKING:
    from tessella.bench.suite import Settings

RESULTS = Path("bench/results")
REPORT = Path("bench/report")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
"""``tessella bench FAMILY``: each family is a command."""

Out = Annotated[Path, typer.Option(help="Folder of result files; new records join the old ones.")]
Threads = Annotated[
    list[int] | None,
    typer.Option(min=1, help="Threads, repeatable; default: one, and all cores."),
]
Quick = Annotated[bool, typer.Option("--quick", help="A few small cases, in seconds.")]
Filter = Annotated[
    list[str] | None,
    typer.Option("--filter", "-f", help="KEY=VALUE[,VALUE...], repeatable: only such cases."),
]
Budget = Annotated[
    float, typer.Option(min=0.01, help="Seconds for the samples of a case; 30 of each at most.")
]


@app.callback()
def _bench() -> None:
    """Measure kernels beside what else could be run, and report it."""


def _add(family: str, does: str, families: list[str]) -> None:
    """Make ``tessella bench <family>``, which runs `families`."""

    def command(
        device: DeviceOption = Device.cpu,
        out: Out = RESULTS,
        threads: Threads = None,
        quick: Quick = False,
        filters: Filter = None,
        budget: Budget = 30.0,
        json: Json = False,
        debug: Debug = False,
    ) -> None:
        with session(json=json, debug=debug) as s:
            measured = _measure(s, families, device, out, threads, quick, filters, budget)
            s.answer({"records": measured, "out": str(out)})

    command.__doc__ = f"""Measure {does}.

    Everything in a case is timed in turn: kernels, and what a user would run
    instead. Times are medians. Records go to OUT/<device>/<family>.json, where a
    case that is measured again replaces its old record.

    JSON: records (family, kernel, case, us, roofline_us, roofline_frac, baselines,
    extra, spread, commit, date, torch, device), out.

    \b
    Examples:
      tessella bench {family}
      tessella bench {family} --quick --out results --json
      tessella bench {family} --threads 1 --filter M=1,16
    """
    app.command(family)(command)


for _name, _does in FAMILIES.items():
    _add(_name, _does, [_name])
_add("all", "every family that the device has", list(FAMILIES))


def _measure(
    s: Session,
    names: list[str],
    device: Device,
    out: Path,
    threads: list[int] | None,
    quick: bool,
    filters: list[str] | None,
    budget: float,
) -> list[dict[str, Any]]:
    """Run families, save and show their records; returns them as they are stored."""
    import os

    from tessella.bench import BenchError, families
    from tessella.bench.suite import Selection, Settings

    where = check_device(device)
    settings = Settings(
        quick=quick,
        threads=threads or sorted({1, os.cpu_count() or 1}),
        selection=Selection(filters or []),
        budget_s=min(budget, 3.0) if quick else budget,
    )
    found = []
    for name in names:
        try:
            found.append(families.load(name, where))
        except BenchError:
            if len(names) == 1:
                raise  # `all` leaves out what this device does not have
    measured = []
    for family in found:
        measured += _run(s, family, settings, out)
    return measured


def _run(s: Session, family, settings: Settings, out: Path) -> list[dict[str, Any]]:
    """Measure one family, saving after every case so that an interruption loses little."""
    from tessella.bench import records, suite, tables

    path = out / records.device_folder(family.device) / f"{family.name}.json"
    stamp = records.stamp(family.device)
    made = []
    with s.progress("cases") as bar:
        task = bar.add_task(family.name, total=None)

        def show(done: int, total: int, case: dict[str, Any]) -> None:
            text = " ".join(f"{k}={v}" for k, v in case.items())
            bar.update(task, completed=done, total=total, description=f"{family.name} {text}")

        for record in suite.run(family, settings, show):
            made.append(record.to_json(stamp))
            records.save(path, made[-1:])
    s.show(tables.summary(made, family.name).text())
    s.note(f"{len(made)} records in {path}")
    return made


@app.command("fmpq")
def fmpq(
    out: Out = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="One narrow layer, in seconds.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Accuracy of mixed precision on wide synthetic layers with outliers.

    Records go to OUT/accuracy/fmpq_layer.json.

    JSON: records (K, recipe, outliers, error, w4a4_fraction, int8_channels,
    hadamard, commit, date), out.

    \b
    Examples:
      tessella bench fmpq
      tessella bench fmpq --quick --out results --json
    """
    with session(json=json, debug=debug) as s:
        from tessella.bench import accuracy, synthetic
        from tessella.quant.recipe import PRESETS

        path, made = out / "accuracy/fmpq_layer.json", []
        for K in (1024,) if quick else synthetic.WIDTHS:
            for name in synthetic.RECIPES:
                made.append(synthetic.measure(PRESETS[name], K))
                accuracy.save(path, made[-1], ("layer", "K", "recipe", "outliers"))
        s.show(accuracy.layers_markdown(made))
        s.answer({"records": made, "out": str(path)})


@app.command("report")
def report(
    results: Annotated[Path, typer.Option(help="Folder of result files.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = REPORT,
    plots: Annotated[bool, typer.Option(help="Draw plots (needs matplotlib).")] = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Tables (Markdown), plots (PNG) and one HTML page from result files.

    In a checkout it also renews the tables in README.md and docs/ that are
    generated from the checkout's own results.

    JSON: files.

    \b
    Examples:
      tessella bench report
      tessella bench report --results bench/results --out build/report
      tessella bench report --no-plots
    """
    with session(json=json, debug=debug) as s:
        from tessella.bench import report as reports

        files = reports.write(results, out, images=plots)
        generator = results.resolve().parents[1] / "docs/generate.py"
        if results.resolve() == _checkout() / "bench/results" and generator.exists():
            runpy.run_path(str(generator))["main"]()
        s.show("\n".join(str(f) for f in files))
        s.answer({"files": [str(f) for f in files]})


def _checkout() -> Path:
    """Where this package's repository is, if it runs from one."""
    return Path(__file__).resolve().parents[3]
