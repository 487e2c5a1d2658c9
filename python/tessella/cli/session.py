"""What every command shares: its options, its output, and what a failure looks like."""

from __future__ import annotations

import json as jsonlib
import math
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

import tessella

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

ERROR_LINES = 20
"""An error takes no more lines than this; --debug shows the rest."""


class CommandError(Exception):
    """A command cannot do what it was asked; the message is for the user."""


class Session:
    """The terminal of one command run: the answer on stdout, all else on stderr."""

    def __init__(self, json: bool):
        self.json = json
        self.out = Console()
        self.err = Console(stderr=True)
        self._stdout = sys.stdout

    def answer(self, values: dict[str, Any]) -> None:
        """With --json: print `values` as one object, numbers that are not finite as null."""
        if self.json:
            text = jsonlib.dumps(_finite(values), indent=2, allow_nan=False)
            print(text, file=self._stdout, flush=True)

    def show(self, *renderables: Any) -> None:
        """Without --json: print tables and lines for people, on stdout."""
        for item in () if self.json else renderables:
            is_line = isinstance(item, str)  # left for the terminal to wrap: it may hold a path
            self.out.print(Text(item) if is_line else item, soft_wrap=is_line)

    def note(self, text: str) -> None:
        """One line on stderr, unstyled."""
        self.err.print(Text(text), soft_wrap=True, highlight=False)

    def progress(self, unit: str = "") -> Progress:
        """A progress bar on stderr; nothing when stderr is no terminal."""
        return Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            console=self.err,
            transient=True,
            disable=not self.err.is_terminal,
        )


@contextmanager
def session(*, json: bool, debug: bool) -> Iterator[Session]:
    """Run a command's body: errors end it with exit code 1 and one screen on stderr.

    With `json`, whatever a library prints on stdout goes to stderr, so that stdout carries the
    answer alone (nothing at all when the command fails).
    """
    s = Session(json)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr if json else sys.stdout):
            warnings.showwarning = lambda message, *_, **__: s.note(f"warning: {message}")
            warnings.simplefilter("ignore", FutureWarning)
            _quieten_transformers(debug)
            tessella._load()  # what `import tessella` does at once in any other program
            yield s
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise  # typer ends these; a reader that has seen enough (`| head`) is not told anything
    except (Exception, KeyboardInterrupt) as e:
        _fail(s, e, debug)


def _quieten_transformers(debug: bool) -> None:
    """Errors only, and bars on a terminal only; transformers reads these when it is imported."""
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _fail(s: Session, e: BaseException, debug: bool) -> NoReturn:
    """Report `e` and exit with code 1."""
    if debug:
        traceback.print_exception(e, file=sys.stderr)
    elif isinstance(e, KeyboardInterrupt):
        s.note("interrupted")
    else:
        lines = _message(e).splitlines() or [""]
        if len(lines) > ERROR_LINES:
            lines = [*lines[: ERROR_LINES - 1], "... (--debug shows all of it)"]
        s.err.print("[bold red]error:[/]", end=" ")
        s.note("\n".join(line[:500] for line in lines))
    raise typer.Exit(1)


def _message(e: BaseException) -> str:
    """Our own errors are complete sentences; others get their type's name and a hint."""
    if type(e).__module__.startswith("tessella."):
        return str(e)
    if isinstance(e, OSError) and e.filename is not None:
        return f"{e.filename}: {e.strerror}"
    return f"{type(e).__name__}: {e}\nThis was not expected; --debug shows where it comes from."


def _finite(value: Any) -> Any:
    """`value` with nan and inf, which JSON does not have, as None."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
