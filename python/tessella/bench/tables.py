"""Tables from result records: one row a record, or a geometric mean over the shapes."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean, median
from typing import Any

Record = dict[str, Any]
"""A record as results files hold it."""

LARGE_SPREAD = 0.15
"""Interquartile range over median from which a figure is marked."""

MARK = "†"
MARK_NOTE = (
    f"{MARK} unsteady: the interquartile range of its samples is over {LARGE_SPREAD:.0%} of the "
    "median, so the machine was doing something else as well."
)

OVER = ("N", "K")
"""Keys that a summary takes the mean over."""

ORDER = ("op", "model", "recipe", "scheme", "act", "phase", "ctx", "threads", "N", "K", "M")
"""Columns come in this order, other keys before them, and rows are sorted by it."""


@dataclass
class Table:
    """Cells as text, below a head; notes go under it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """As Markdown, without the title."""
        lines = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *self.rows]
        text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return "\n\n".join([text, *self.notes])

    def text(self) -> str:
        """As aligned columns; headings stand on as many lines as they have words."""
        words = [heading.replace("_", " ").split() for heading in self.head]
        height = max(len(w) for w in words)
        head = [[""] * (height - len(w)) + w for w in words]
        lines = [*zip(*head), *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        rows = ["  ".join(c.rjust(n) for c, n in zip(line, widths)) for line in lines]
        return "\n".join([self.title, *rows, *self.notes])

    def html(self) -> str:
        """As an HTML table with its notes."""

        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "\n".join(row(cells, "td") for cells in self.rows)
        notes = "\n".join(f"<p class=note>{html.escape(n)}</p>" for n in self.notes)
        return f"<table>\n<thead>{row(self.head, 'th')}</thead>\n{body}\n</table>\n{notes}"


def source(records: Iterable[Record]) -> str:
    """Part of a sentence: on what, with which torch, from which commits and when measured."""
    made: dict[tuple[str, str], tuple[set[str], set[str]]] = {}
    for r in records:
        commits, days = made.setdefault((r["device"], r["torch"]), (set(), set()))
        commits.add(r["commit"])
        days.add(r["date"])
    return "Measured on " + "; ".join(
        f"{device}, torch {torch}, commit {' and '.join(sorted(commits))}, "
        f"{' to '.join(sorted({min(days), max(days)}))}"
        for (device, torch), (commits, days) in sorted(made.items())
    )


def _keys(records: Sequence[Record], leave_out: Sequence[str] = ()) -> list[str]:
    """Case keys in which records differ, in the order of the columns."""
    found = [k for k in _all_keys(records) if k not in leave_out]
    return [k for k in found if len({str(r["case"].get(k)) for r in records}) > 1] or found


def _all_keys(records: Sequence[Record]) -> list[str]:
    keys = dict.fromkeys(k for r in records for k in r["case"])
    return sorted(keys, key=lambda k: ORDER.index(k) if k in ORDER else -1)


def _ordered(records: Sequence[Record], keys: Sequence[str]) -> list[Record]:
    """Records sorted by number, or by first appearance of a word, key by key."""
    words = {k: list(dict.fromkeys(str(r["case"].get(k)) for r in records)) for k in keys}

    def place(r: Record) -> list[float]:
        values = [(k, r["case"].get(k)) for k in keys]
        return [v if isinstance(v, int | float) else words[k].index(str(v)) for k, v in values]

    return sorted(records, key=place)


def _rivals(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(b for r in records for b in r["baselines"]))


def _unsteady(r: Record, rival: str | None = None) -> bool:
    """Whether a record's time, or the rival's beside it, varied too much."""
    of_rival = r["extra"].get("baseline_spread", {}).get(rival, 0.0) if rival else 0.0
    return max(r["spread"], of_rival) > LARGE_SPREAD


def _marked(text: str, unsteady: bool) -> str:
    return text + MARK if unsteady else text


def _us(us: float) -> str:
    return f"{us:,.1f}" if us < 1000 else f"{us:,.0f}"


def detail(records: Sequence[Record], title: str) -> Table:
    """One row a record: time, spread, roofline, what was timed apart, ratio to every rival."""
    keys, rivals = _keys(records), _rivals(records)
    records = _ordered(records, keys)
    parts = [p for p in ("quant_us", "with_quant_us") if any(p in r["extra"] for r in records)]
    predicted = any("predicted_us" in r["extra"] for r in records)
    rates = any("tokens" in r["extra"] for r in records)
    head = [*keys, "µs", "spread", *(["tokens/s"] if rates else []), "of roofline"]
    head += [p.removesuffix("_us").replace("_", " ") + " µs" for p in parts]
    head += [f"vs {b}" for b in rivals] + (["predicted / measured"] if predicted else [])
    rows = []
    for r in records:
        x = r["extra"]
        cells = [str(r["case"].get(k, "")) for k in keys]
        cells += [_marked(_us(r["us"]), _unsteady(r)), f"{r['spread']:.0%}"]
        cells += [_rate(r)] if rates else []
        cells += [f"{r['roofline_frac']:.0%}" if r["roofline_frac"] else ""]
        cells += [_us(x[p]) if p in x else "" for p in parts]
        cells += [_ratio([r], b) for b in rivals]
        if predicted:
            cells.append(f"{x['predicted_us'] / r['us']:.2f}" if "predicted_us" in x else "")
        rows.append(cells)
    return Table(title, head, rows, _notes(records, keys, rows))


def summary(records: Sequence[Record], title: str) -> Table:
    """As :func:`detail`, with the geometric mean over shapes (N, K) as one row."""
    keys, rivals = _keys(records, OVER), _rivals(records)
    records = _ordered(records, keys)
    groups: dict[tuple, list[Record]] = {}
    for r in records:
        groups.setdefault(tuple(str(r["case"].get(k, "")) for k in keys), []).append(r)
    rates = any("tokens" in r["extra"] for r in records)
    times = all(len(g) == 1 for g in groups.values())
    head = [*keys, *(["µs"] if times else []), *(["tokens/s"] if rates else []), "of roofline"]
    head += [f"vs {b}" for b in rivals]
    rows = []
    for values, group in groups.items():
        cells = list(values)
        cells += [_marked(_us(group[0]["us"]), _unsteady(group[0]))] if times else []
        cells += [_rate(group[0])] if rates else []
        fractions = [r["roofline_frac"] for r in group if r["roofline_frac"]]
        share = f"{geometric_mean(fractions):.0%}" if fractions else ""
        cells.append(_marked(share, any(map(_unsteady, group))))
        rows.append(cells + [_ratio(group, b) for b in rivals])
    notes = _notes(records, [*keys, *OVER], rows)
    if not times:
        notes.insert(0, f"Geometric means over {_shapes(records)}.")
    return Table(title, head, rows, notes)


def _rate(r: Record) -> str:
    return f"{r['extra']['tokens'] / r['us'] * 1e6:,.1f}" if "tokens" in r["extra"] else ""


def _ratio(group: Sequence[Record], rival: str) -> str:
    """How many times longer the rival takes, or why there is no figure."""
    ratios = [r["baselines"][rival] / r["us"] for r in group if r["baselines"].get(rival)]
    if len(ratios) < len(group):
        slow = any(rival in r["extra"].get("too_slow", ()) for r in group)
        return "too slow" if slow else ""
    unsteady = any(_unsteady(r, rival) for r in group)
    return _marked(f"{geometric_mean(ratios):.2f}x", unsteady)


def _shapes(records: Sequence[Record]) -> str:
    pairs = dict.fromkeys((r["case"].get("N"), r["case"].get("K")) for r in records)
    return "N x K = " + ", ".join(f"{N} x {K}" for N, K in pairs)


def _notes(records: Sequence[Record], shown: Sequence[str], rows: list[list[str]]) -> list[str]:
    """What a table's cells do not say: keys that are the same everywhere, rivals left out."""
    notes = []
    same = {k: records[0]["case"].get(k) for k in _all_keys(records) if k not in shown}
    if same:
        notes.append("All with " + ", ".join(f"{k} {v}" for k, v in same.items()) + ".")
    absent: dict[str, str] = {}
    for r in records:
        absent |= r["extra"].get("absent", {})
    if absent:
        notes.append("Not run: " + "; ".join(f"{b} ({why})" for b, why in absent.items()) + ".")
    if any(cell == "too slow" for row in rows for cell in row):
        most = max(r["extra"].get("most_s", 0) for r in records)
        notes.append(f"Too slow: one call takes more than {most:.0f} seconds.")
    if any(MARK in cell for row in rows for cell in row):
        notes.append(MARK_NOTE)
    return notes


def prediction_error(records: Iterable[Record]) -> tuple[float, float, int] | None:
    """Of predicted over measured time: median, largest factor apart, and number of records."""
    ratios = [r["extra"]["predicted_us"] / r["us"] for r in records if "predicted_us" in r["extra"]]
    if not ratios:
        return None
    return median(ratios), max(max(x, 1 / x) for x in ratios), len(ratios)
