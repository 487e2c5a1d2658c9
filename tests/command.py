"""Runs the command line in tests: in this process, or as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tessella
from tessella.cli import app

PACKAGE_ROOT = str(Path(tessella.__file__).parents[1])


def run(*args):
    """A command in this process; .stdout, .stderr and .exit_code of it."""
    return CliRunner().invoke(app, [str(a) for a in args])


def run_process(*args, stdin: str | bytes = b"", **env) -> subprocess.CompletedProcess:
    """The command as a user starts it; stdout and stderr as text."""
    done = subprocess.run(
        [sys.executable, "-m", "tessella", *(str(a) for a in args)],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        env=environment(**env),
        timeout=300,
    )
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def run_on_terminal(*args) -> tuple[int, str, str]:
    """Exit code, stdout (a pipe) and stderr (a terminal) of the command."""
    terminal, end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tessella", *(str(a) for a in args)],
        stdout=subprocess.PIPE,
        stderr=end,
        text=True,
        env=environment(TERM="xterm-256color"),
    )
    os.close(end)
    shown = b""
    try:
        while chunk := os.read(terminal, 1 << 16):
            shown += chunk
    except OSError:
        pass  # Linux: the last process at the other end has gone
    os.close(terminal)
    stdout, _ = process.communicate(timeout=60)
    return process.returncode, stdout, shown.decode()


def environment(**extra) -> dict[str, str]:
    """Of a process that finds this package, and no network."""
    path = os.pathsep.join([PACKAGE_ROOT, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    # One thread: with more, a busy machine waits at OpenMP barriers a hundred times longer.
    fixed = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **fixed, **extra}


def answer_of(result) -> dict:
    """What a command that succeeded with --json printed: exactly one JSON object."""
    assert exit_code(result) == 0, result.stderr
    return one_object(result.stdout)


def one_object(text: str) -> dict:
    """`text` if it is exactly one JSON object (json.loads refuses anything around it)."""
    value = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert isinstance(value, dict)
    return value


def exit_code(result) -> int:
    """Of a command, in this process or another."""
    return result.returncode if hasattr(result, "returncode") else result.exit_code


def refused(result, *words: str) -> None:
    """Exit code 1, nothing on stdout, and one screen on stderr with these words."""
    assert exit_code(result) == 1, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 24
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in result.stderr
