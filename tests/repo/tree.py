"""A repository as a mapping from path to bytes, and the registry of the rules over it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

GENERATED_DIRS = re.compile(r"\.(git|venv.*|[a-z_]+_cache|hypothesis|benchmarks)|build|dist")
"""Folders that hold no source; consulted only where git cannot list the tracked files."""


@dataclass(frozen=True)
class Tree:
    """Files by path relative to the repository root, and the op schemas declared by them."""

    files: Mapping[str, str | bytes] = field(repr=False)
    schemas: Mapping[str, str] = field(default_factory=dict, repr=False)

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return len(_encode(self.files[path]))

    def matching(self, pattern: str) -> Iterator[tuple[str, str]]:
        """(path, text) of every text file whose whole path matches the regular expression."""
        for path, data in sorted(self.files.items()):
            if re.fullmatch(pattern, path) and b"\0" not in _encode(data):
                yield path, data if isinstance(data, str) else data.decode("utf-8", "replace")


def _encode(data: str | bytes) -> bytes:
    return data.encode() if isinstance(data, str) else data


Check = Callable[[Tree], Iterator[str]]


@dataclass(frozen=True)
class Rule:
    """A check that yields one line `path:line: what is wrong` per violation."""

    check: Check
    bad: tuple[Tree, ...]
    good: Tree


RULES: dict[str, Rule] = {}


def rule(*, bad: list[Tree | Mapping], good: Tree | Mapping) -> Callable[[Check], Check]:
    """Register a check under its name. Each of `bad` must violate it; `good` must not."""

    def register(check: Check) -> Check:
        RULES[check.__name__] = Rule(check, tuple(_tree(t) for t in bad), _tree(good))
        return check

    return register


def _tree(t: Tree | Mapping) -> Tree:
    return t if isinstance(t, Tree) else Tree(t)


def tracked_files(root: Path = ROOT) -> list[str]:
    """Paths that git tracks; in an unpacked source distribution, every path that is not built."""
    git = ["git", "-c", f"safe.directory={root}", "-C", str(root), "ls-files", "-z"]
    try:
        done = subprocess.run(git, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return sorted(_walk(root))
    paths = done.stdout.decode().rstrip("\0").split("\0")
    return [p for p in paths if (root / p).is_file()]  # a deletion may not be staged yet


def _walk(root: Path) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            d
            for d in subfolders
            if not GENERATED_DIRS.fullmatch(d) and d != "__pycache__" and ".egg-info" not in d
        ]
        for name in names:
            if not name.endswith((".so", ".pyc")):
                yield (Path(folder) / name).relative_to(root).as_posix()


def load(schemas: Mapping[str, str], root: Path = ROOT) -> Tree:
    """The repository as it is on disk, with the schemas that the package has declared."""
    return Tree({p: (root / p).read_bytes() for p in tracked_files(root)}, schemas)
