"""README's blocks run as they stand, in the order of the page, on the bundled model."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import tessella
from tessella import _native

ROOT = Path(__file__).resolve().parents[1]
MODEL = Path(tessella.__file__).parent / "data/pylm-6m"


class Block(NamedTuple):
    language: str
    tag: str
    code: str
    line: int


def blocks() -> list[Block]:
    """README's fenced blocks; the fence names a language and what is done with the block."""
    text = (ROOT / "README.md").read_text()
    fences = re.finditer(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", text, re.S | re.M)
    return [Block(m[1], m[2] or "", m[3], text.count("\n", 0, m.start()) + 1) for m in fences]


def command(tag: str) -> str:
    """The single command of the block with this tag, as .ci/run reads it."""
    (block,) = [b for b in blocks() if b.tag == tag]
    assert block.language == "bash" and block.code.count("\n") == 1
    return block.code.strip()


def test_every_block_is_checked():
    assert {(b.language, b.tag) for b in blocks()} == {
        ("bash", "demo"),
        ("bash", "test"),
        ("bash", "run"),
        ("python", "run"),
    }


def test_quick_start_is_two_commands():
    """.ci/run executes the second one word by word, and its --full run the demo of the first."""
    assert command("demo").split(" && ")[-1] == "tessella demo"
    install, test = command("test").split(" && ")
    assert test == "pytest"
    extra = re.fullmatch(r'pip install "\.\[(\w+)\]"', install)[1]
    assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M)


def test_kernels_are_named():
    """The support table names every instruction set that this build has a body for."""
    if _native._C is None:
        pytest.skip(f"no compiled kernels: {_native.C_ERROR}")
    readme = (ROOT / "README.md").read_text().lower().replace("-", "").replace(" ", "")
    for family, kernels in _native._C.kernels().items():
        for isa in {name.removeprefix(f"{family}.").partition(".")[0] for name in kernels}:
            assert isa in readme, f"README.md does not mention {isa}, which {family} has"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a reader would stand: a model, a text, and `tessella` on the path."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my-model").symlink_to(MODEL, target_is_directory=True)
    (folder / "text.txt").write_text(inspect.getsource(re)[:6000])
    (folder / "bin").mkdir()
    script = folder / "bin/tessella"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tessella "$@"\n')
    script.chmod(0o755)
    return folder


RUN = [pytest.param(b, id=f"line{b.line}-{b.language}") for b in blocks() if b.tag == "run"]


@pytest.mark.parametrize("block", RUN)
def test_block_runs(block: Block, folder: Path):
    interpreter = {"bash": ["bash", "-euo", "pipefail"], "python": [sys.executable]}
    done = subprocess.run(
        [*interpreter[block.language], "-c", block.code],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "HF_HUB_OFFLINE": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() and "Traceback" not in done.stderr
