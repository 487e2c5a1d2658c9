"""Rules over the text of every file: hygiene that no formatter keeps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from repo.tree import Tree, rule

MAX_FILE_BYTES = 1_000_000
BUNDLED_MODEL = re.compile(r"python/tessella/data/[^/]+/(model\.safetensors|tokenizer\.json)")
WRITTEN = r"(?!LICENSE$|python/tessella/data/).*"
"""What we wrote by hand: not the licence text, not the bundled model."""


def find(tree: Tree, pattern: str, regex: re.Pattern, what: str) -> Iterator[str]:
    """`path:line: what` for every line of the matching files that the regex finds."""
    for path, text in tree.matching(pattern):
        for number, line in enumerate(text.split("\n"), 1):
            if hit := regex.search(line):
                yield f"{path}:{number}: {what}: {hit.group(0).strip()!r}"


_OPEN_WORK = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX"]) + r")\b")


@rule(
    bad=[{"csrc/core/hd.h": "// TO" + "DO: later\n"}, {"README.md": "FIX" + "ME\n"}],
    good={"docs/ops.md": "to do, fixme-less, mastodon\n"},
)
def no_open_work(tree: Tree) -> Iterator[str]:
    """Open work belongs in the issue tracker, where it is seen."""
    yield from find(tree, WRITTEN, _OPEN_WORK, "open work left in the text")


_MACHINE_PATH = re.compile(r"(?<![\w.~$}\])*/-])/(?:work|root|home/\w+|Users/\w+|tmp/\w+)\b")


@rule(
    bad=[
        {"README.md": "see `/" + "work/main/x`\n"},
        {"python/tessella/formats.py": "P = '/" + "root/venv'\n"},
        {"docs/ops.md": "write to /" + "tmp/out\n"},
        {".ci/run": "cd /" + "home/me\n"},
    ],
    good={"README.md": "https://example.org/work/ $HOME/work framework/root ./tmp/x ../work/x\n"},
)
def no_machine_paths(tree: Tree) -> Iterator[str]:
    """A path of one machine means nothing on the reader's."""
    yield from find(tree, WRITTEN, _MACHINE_PATH, "a path of one machine")


@rule(
    bad=[{"a.md": "x \n"}, {"a.py": "x\t\n"}, {"a.h": "x"}, {"a.sh": "x\r\n"}, {"a.md": "x\n\n"}],
    good={"a.py": "x = 1\n", "python/tessella/__init__.py": ""},
)
def clean_line_ends(tree: Tree) -> Iterator[str]:
    """No trailing blanks, Unix line ends, and exactly one at the end of a file."""
    yield from find(tree, WRITTEN, re.compile(r"[ \t\r]+$"), "trailing blanks")
    for path, text in tree.matching(WRITTEN):
        if text and (not text.endswith("\n") or text.endswith("\n\n")):
            yield f"{path}: does not end with exactly one newline"


@rule(
    bad=[{"bench/results/big.json": "x" * (MAX_FILE_BYTES + 1)}],
    good={"python/tessella/data/m/model.safetensors": b"\0" * (MAX_FILE_BYTES + 1)},
)
def small_files(tree: Tree) -> Iterator[str]:
    """No file over 1 MB but the bundled model: history never forgets one."""
    for path in sorted(tree.files):
        if tree.size(path) > MAX_FILE_BYTES and not BUNDLED_MODEL.fullmatch(path):
            yield f"{path}: {tree.size(path)} bytes, over {MAX_FILE_BYTES}"


@rule(
    bad=[{"python/tessella/_ops.abi3.so": b"\0"}, {"a/b.o": b"\0"}, {"x.whl": b"\0"}],
    good={"python/tessella/data/m/model.safetensors": b"\0"},
)
def no_build_products(tree: Tree) -> Iterator[str]:
    """What a build makes is not source."""
    for path in sorted(tree.files):
        if re.search(r"\.(so|o|a|pyc|whl|cubin|ptx)$", path):
            yield f"{path}: a build product"


_DUMPING_GROUND = {"util", "utils", "helper", "helpers", "misc", "common"}


@rule(
    bad=[{"python/tessella/utils/x.py": ""}, {"csrc/core/common.h": ""}, {"tests/util.py": ""}],
    good={"python/tessella/data/util-linux.md": "", "csrc/core/hd.h": ""},
)
def no_dumping_ground(tree: Tree) -> Iterator[str]:
    """Folder = family, file = role: a name that says neither collects everything."""
    for path in sorted(tree.files):
        p = PurePosixPath(path)
        if _DUMPING_GROUND & {*p.parts, p.stem}:
            yield f"{path}: the name does not say what it holds"


def _calls(text: str) -> Iterator[tuple[int, str, set[str], int]]:
    """(line, dotted name, keywords, positional arguments) of every call and bare decorator."""
    import ast

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            keywords = {k.arg for k in node.keywords if k.arg and not _is_empty(k.value)}
            yield node.lineno, ast.unparse(node.func), keywords, len(node.args)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            for d in node.decorator_list:
                if not isinstance(d, ast.Call):
                    yield d.lineno, ast.unparse(d), set(), 0


def _is_empty(value) -> bool:
    return getattr(value, "value", None) == ""


@rule(
    bad=[
        {"tests/test_a.py": "@pytest.mark.skip\ndef test(): pass\n"},
        {"tests/test_a.py": "m = pytest.mark.skipif(not X)\n"},
        {"tests/test_a.py": "m = pytest.mark.skipif(not X, reason='')\n"},
        {"tests/test_a.py": "def f():\n    pytest.skip()\n"},
        {"tests/test_a.py": "x = pytest.importorskip('vllm')\n"},
        {"tests/test_a.py": "m = pytest.mark.xfail(reason='known')\n"},
    ],
    good={
        "tests/test_a.py": "@pytest.mark.skipif(not X, reason='no X')\ndef test():\n"
        "    pytest.skip('needs a GPU')\n"
        "x = pytest.importorskip('vllm', reason='vLLM')\n"
        "m = pytest.mark.xfail(reason='known', strict=True)\n"
    },
)
def skips_have_reasons(tree: Tree) -> Iterator[str]:
    """A skipped test says why; one expected to fail says so when it passes."""
    for path, text in tree.matching(r"tests/.*\.py"):
        for line, name, keywords, positional in _calls(text):
            what = name.removeprefix("pytest.").removeprefix("mark.")
            given = "reason" in keywords or (name == "pytest.skip" and positional)
            if what in ("skip", "skipif", "importorskip", "xfail") and not given:
                yield f"{path}:{line}: {name} without a reason"
            elif what == "xfail" and "mark" in name and "strict" not in keywords:
                yield f"{path}:{line}: {name} without strict=True"
