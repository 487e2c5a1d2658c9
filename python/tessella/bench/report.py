"""Tables, plots and one HTML page from a folder of result files."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessella.bench import BenchError, choice, plots, tables
from tessella.bench.papers import Results
from tessella.bench.tables import Record, Table

FIELDS = ("family", "kernel", "case", "us", "roofline_us", "roofline_frac", "baselines")
FIELDS += ("extra", "spread", "commit", "date", "torch", "device")
"""What a record of a bench must have."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em;
       color: #222 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: 2px 9px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th { background: #f4f4f4 } td:first-child, th:first-child { text-align: left }
img { max-width: 100%; margin: 1em 0 } .note { color: #555; font-size: 13px; margin: .4em 0 }
summary { cursor: pointer; margin: 1em 0 }
"""


@dataclass(frozen=True)
class Section:
    """One family on one device."""

    title: str
    source: str
    summary: Table
    detail: Table
    images: list[Path]


def read(results: Path) -> list[Record]:
    """The bench records below a results folder, in file order.

    Other kinds of results (accuracy, serving) are passed over. Raises BenchError when there is
    none, or a file is damaged.
    """
    records: list[Record] = []
    for path in sorted(results.rglob("*.json")):
        try:
            found: Any = json.loads(path.read_text())
        except ValueError as e:
            raise BenchError(f"{path}: expected JSON: {e}") from e
        if not isinstance(found, list):
            raise BenchError(f"{path}: expected a list of records, got {type(found).__name__}")
        for i, r in enumerate(found):
            if not isinstance(r, dict) or "family" not in r:
                continue
            if missing := [f for f in FIELDS if f not in r]:
                raise BenchError(f"{path}: record {i}: expected a field {missing[0]!r}, found none")
            records.append(r)
    if not records:
        raise BenchError(f"{results}: holds no results; `tessella bench all` makes some")
    return records


def sections(records: Sequence[Record], out: Path, *, images: bool = True) -> list[Section]:
    """Tables, and plots written into `out`, for every device and family."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        groups.setdefault((r["device"], r["family"]), []).append(r)
    made = []
    for (device, family), group in groups.items():
        prefix = re.sub(r"[^a-z0-9]+", "-", f"{device} {family}".lower()).strip("-")
        made.append(
            Section(
                title=f"{family} on {device}",
                source=tables.source(group) + _accuracy(group),
                summary=tables.summary(group, family),
                detail=tables.detail(group, family),
                images=plots.draw(group, out, prefix) if images else [],
            )
        )
    return made


def _choices(results: Path, out: Path, *, images: bool) -> list[Section]:
    """A section for every model whose recipes were evaluated: accuracy, bytes and speed."""
    found = Results(lambda name: (results / name.removeprefix("bench/results/")).read_text())
    names = choice.models(found)
    plot = dict(zip(names, choice.draw(found, out))) if images else {}
    made = []
    for model in names:
        table = choice.table(found, model)
        text = "Which recipe: accuracy, bytes, and speed where it was measured."
        images_of = [plot[model]] if model in plot else []
        made.append(Section(table.title, text, table, table, images_of))
    return made


def _accuracy(records: Sequence[Record]) -> str:
    """A sentence on the planner's predictions, if there are any."""
    error = tables.prediction_error(records)
    if error is None:
        return "."
    middle, worst, count = error
    return (
        f". Predicted over measured time: median {middle:.2f}, "
        f"at most a factor of {worst:.2f} apart, over {count} records."
    )


def write(results: Path, out: Path, *, images: bool = True) -> list[Path]:
    """Write report.md, report.html and the plots into `out`; returns their paths.

    Raises BenchError: no results, a damaged file, or plots without matplotlib.
    """
    records = read(results)
    out.mkdir(parents=True, exist_ok=True)
    made = [*_choices(results, out, images=images), *sections(records, out, images=images)]
    (out / "report.md").write_text(_markdown(made))
    (out / "report.html").write_text(_html(made))
    return [out / "report.md", out / "report.html", *(p for s in made for p in s.images)]


def _markdown(made: Sequence[Section]) -> str:
    parts = ["# Measured"]
    for s in made:
        parts += [f"## {s.title}", s.source, s.summary.markdown()]
        parts += [f"![{path.stem}]({path.name})" for path in s.images]
        parts += ["### Every case", s.detail.markdown()]
    return "\n\n".join(parts) + "\n"


def _html(made: Sequence[Section]) -> str:
    parts = []
    for s in made:
        parts += [f"<h2>{html.escape(s.title)}</h2>", f"<p>{html.escape(s.source)}</p>"]
        parts.append(s.summary.html())
        for path in s.images:
            data = base64.b64encode(path.read_bytes()).decode()
            parts.append(f'<img alt="{path.stem}" src="data:image/png;base64,{data}">')
        parts.append(f"<details><summary>Every case</summary>{s.detail.html()}</details>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>tessella: measured</title><style>{STYLE}</style></head>\n"
        f"<body><h1>tessella: measured</h1>\n{body}\n</body></html>\n"
    )
