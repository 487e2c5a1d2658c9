"""The ``tessella`` command line: one file per command.

Nothing here imports torch before a command runs, so that help and usage errors are immediate.
"""

from __future__ import annotations

from typing import Annotated

import typer

from tessella.cli import (
    bench,
    demo,
    eval,
    generate,
    heal,
    info,
    outliers,
    plan,
    quantize,
    tasks,
    to_mla,
    tune,
)

app = typer.Typer(
    name="tessella",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("info")(info.info)
app.command("quantize")(quantize.quantize)
app.command("outliers")(outliers.outliers)
app.command("to-mla")(to_mla.to_mla)
app.command("heal")(heal.heal)
app.command("generate")(generate.generate)
app.command("eval")(eval.evaluate)
app.command("tasks")(tasks.tasks)
app.add_typer(plan.app, name="plan")
app.add_typer(bench.app, name="bench")
app.command("tune")(tune.tune)


def _print_version(wanted: bool) -> None:
    if wanted:
        from tessella._version import __version__

        typer.echo(f"tessella {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """4-bit LLM inference: convert checkpoints, evaluate them, generate text.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage.

    \b
    Examples:
      tessella demo
      tessella quantize ./Llama-3.2-1B ./Llama-3.2-1B-w4a8 --recipe w4a8
      tessella generate ./Llama-3.2-1B-w4a8 --prompt "Once upon a time"
    """


def main() -> None:
    """Entry point of the ``tessella`` script and of ``python -m tessella``."""
    app(prog_name="tessella")
