"""Tables of measured choices: what `tessella tune` writes and the kernels look up.

A table is a JSON file for one family on one device: a list of rows `{scheme, N, K, M, kernel,
split}`, where M stands for all token counts above half of it. Tables that come with the package are
read first, then those in the user's cache folder, which win. They are read once, when the package
is imported, and handed to the kernel library; TESSELLA_TUNE=0 makes it ignore them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tessella import _native

FORMAT = 1
FIELDS = {"scheme": str, "N": int, "K": int, "M": int, "kernel": str, "split": int}
"""What a row must have; others (the time, say) are for the reader."""

SHIPPED = Path(__file__).parent / "data/tune"


class TableError(ValueError):
    """A table that cannot be used; the message names the file and the row."""


def folder() -> Path:
    """Where the user's tables are: below $XDG_CACHE_HOME, or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tessella/tune"


def file_name(family: str, device: str) -> str:
    """The table of a family on a device, by the device's own name."""
    return f"{family}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def read(path: Path) -> dict[str, Any]:
    """A table: {"format", "family", "device", "rows"}. Raises TableError."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise TableError(f"{path}: expected a tuning table: {e}") from e
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise TableError(f"{path}: expected a tuning table of format {FORMAT}")
    for name in ("family", "device"):
        if not isinstance(table.get(name), str) or re.search(r"[\t\n]", table[name]):
            raise TableError(f"{path}: {name}: expected a name, got {table.get(name)!r}")
    if not isinstance(table.get("rows"), list):
        raise TableError(f"{path}: rows: expected a list")
    for i, row in enumerate(table["rows"]):
        for name, kind in FIELDS.items():
            value = row.get(name) if isinstance(row, dict) else None
            good = type(value) is kind and (value > 0 if kind is int else value.isprintable())
            if not good:
                what = "a positive number" if kind is int else "a name"
                raise TableError(f"{path}: row {i}: {name}: expected {what}, got {value!r}")
    return table


def write(path: Path, family: str, device: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write a table at once or not at all; rows of other cases in an old one stay."""
    old = read(path)["rows"] if path.exists() else []
    merged = {_case(r): r for r in [*old, *rows]}
    body = ",\n  ".join(json.dumps(r) for r in sorted(merged.values(), key=_case))
    head = json.dumps({"format": FORMAT, "family": family, "device": device})[1:-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(f'{{{head}, "rows": [\n  {body}\n]}}\n')
    temporary.replace(path)


def _case(row: dict[str, Any]) -> tuple:
    return row["scheme"], row["N"], row["K"], row["M"]


def lines(paths: Iterable[Path]) -> str:
    """Tables as the kernel library takes them (csrc/core/tuned.h). Raises TableError."""
    text = []
    for path in paths:
        table = read(path)
        for i, r in enumerate(table["rows"]):
            values = [f"{path}: row {i}", table["device"], table["family"]]
            values += [str(r[name]) for name in FIELDS]
            text.append("\t".join(values).replace("\n", " "))
    return "\n".join(text)


def use(text: str) -> None:
    """Have the kernels use these lines instead of all tables so far. Raises TableError."""
    if _native._ops is not None and (error := _native._ops.set_tuned(text)):
        raise TableError(error)


def install() -> None:
    """Have the kernels use the shipped tables and the user's.

    A damaged one is refused where it matters: by the first kernel that would look something up.
    """
    if _native._ops is None:
        return
    paths = [*sorted(SHIPPED.glob("*.json")), *sorted(folder().glob("*.json"))]
    try:
        use(lines(paths))
    except TableError as e:
        hint = "" if "TESSELLA_TUNE" in str(e) else "; TESSELLA_TUNE=0 ignores it"
        _native._ops.set_tuned(f"error\t{e}{hint}".replace("\n", " "))
