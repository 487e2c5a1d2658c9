"""Which recipe: accuracy, bytes and measured speed of each, joined from results files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tessella.bench.papers import CPU_GEMM, GEMM, RECIPES, Record, Results, speedup
from tessella.bench.tables import Table
from tessella.quant.recipe import PRESETS, Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN = "as it is"
_CPU = {"threads": 1, "isa": "avx512vnni"}
SPEEDS = {
    "CPU M=1": (CPU_GEMM, _CPU | {"M": 1}, "torch_bf16"),
    "CPU M=16": (CPU_GEMM, _CPU | {"M": 16}, "torch_bf16"),
    "CPU M=512": (CPU_GEMM, _CPU | {"M": 512}, "torch_bf16"),
    "H200 M=16..256": (GEMM, {"M": (16, 32, 64, 128, 256)}, "cublas_bf16"),
}
"""Speeds of linears by heading: results file, cases, and what they are relative to."""


@dataclass
class Row:
    """One recipe over one cache: records by outliers, and speeds by heading."""

    recipe: str
    kv: str | None
    by_outliers: dict[str, Record] = field(default_factory=dict)
    speeds: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Recipe and cache."""
        return self.recipe if self.kv is None else f"{self.recipe}, {self.kv}"

    @property
    def any(self) -> Record:
        """One of its records."""
        return next(iter(self.by_outliers.values()))

    @property
    def worst(self) -> float:
        """Largest perplexity ratio, outliers or not."""
        return max(r["ppl_ratio"] for r in self.by_outliers.values())


def rows(results: Results, model: str) -> list[Row]:
    """Every recipe that was evaluated on a model, in the order of the presets."""
    made: dict[tuple[str, str | None], Row] = {}
    for r in results(RECIPES, model=model):
        row = made.setdefault((r["recipe"], r["kv"]), Row(r["recipe"], r["kv"]))
        row.by_outliers[r["outliers"] or PLAIN] = r
    for row in made.values():
        row.speeds = _speeds(results, row.recipe)
    order = ["bf16", *PRESETS]
    place = {name: i for i, name in enumerate(order)}
    return sorted(made.values(), key=lambda row: place.get(row.recipe, len(order)))


def _speeds(results: Results, recipe: str) -> dict[str, float]:
    """Speeds of a recipe's linears over bf16, where such linears were measured."""
    if recipe == "bf16":
        return dict.fromkeys(SPEEDS, 1.0)
    if recipe not in PRESETS:
        return {}
    how = {"scheme": PRESETS[recipe].scheme, "act": acts(PRESETS[recipe])}
    found = {
        heading: speedup(results(file, **how, **case), baseline)
        for heading, (file, case, baseline) in SPEEDS.items()
    }
    return {heading: x for heading, x in found.items() if x is not None}


def acts(recipe: Recipe) -> str:
    """A recipe's activations as the `act` of a GEMM record."""
    if any(step.mixed for step in recipe.steps):
        return "mixed"
    bits = {0.0: "int4", 1.0: "int8"}.get(recipe.k8, "mixed")
    return bits if recipe.granularity == "token" else f"{bits}b128"


def models(results: Results) -> list[str]:
    """Models with records, the one with most of them first."""
    names = [r["model"] for r in results(RECIPES)]
    return sorted(dict.fromkeys(names), key=lambda name: -names.count(name))


def table(results: Results, model: str) -> Table:
    """A row a recipe. Empty cells: not measured."""
    found = rows(results, model)
    columns = [PLAIN, *_outliers(found)]
    head = ["recipe", "cache", *(f"ratio, {c}" for c in columns), "W4A4", "weights MB"]
    head += ["cache bytes", *(f"{heading} vs bf16" for heading in SPEEDS)]
    cells = []
    for row in found:
        cache = row.any["cache_bytes_per_token"]
        cells.append(
            [
                f"`{row.recipe}`",
                "" if row.kv is None else f"`{row.kv}`",
                *(_ratio(row.by_outliers.get(c)) for c in columns),
                _share(row),
                f"{row.any['weight_bytes'] / 1e6:.1f}",
                "" if cache is None else f"{cache:,.0f}",
                *(f"{row.speeds[h]:.2f}x" if h in row.speeds else "" for h in SPEEDS),
            ]
        )
    return Table(f"Recipes on {model}", head, cells, _notes(results, model, found))


def _outliers(found: Sequence[Row]) -> list[str]:
    kinds = dict.fromkeys(o for row in found for o in row.by_outliers if o != PLAIN)
    return sorted(kinds, key=lambda o: float(o.rpartition("x")[2]))


def _share(row: Row) -> str:
    """Share of W4A4, or the smallest and the largest one where outliers change it."""
    found = [r["w4a4_fraction"] for r in row.by_outliers.values()]
    if None in found:
        return ""
    ends = dict.fromkeys(f"{share:.0%}" for share in (min(found), max(found)))
    return " to ".join(ends)


def _ratio(r: Record | None) -> str:
    return "" if r is None else f"{r['ppl_ratio']:.4f} ± {r['ppl_ratio_stderr']:.4f}"


def _notes(results: Results, model: str, found: Iterable[Row]) -> list[str]:
    records = [r for row in found for r in row.by_outliers.values()]
    tokens = sorted({r["tokens"] for r in records})
    commits = sorted({f"{r['commit']} of {r['date']}" for r in records})
    return [
        f"Perplexity of {model} over that of the bf16 model without outliers ("
        f"{', '.join(f'{n:,}' for n in tokens)} tokens), as it is and with outliers: "
        "share of channels and factor. Speeds are those of linears of 7B and 8B models, geometric "
        "means, from the records of the same weight scheme and activations; empty: not measured. "
        f"Measured at {', '.join(commits)}."
    ]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of points (speed, loss) that no other beats in both, by speed."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1]))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept[::-1]


def pareto(results: Results, model: str) -> Figure:
    """A panel a speed: the worst perplexity ratio over it, and the front of what is not beaten."""
    from tessella.bench import plots

    found = rows(results, model)
    headings = [h for h in SPEEDS if any(h in row.speeds for row in found)] or [next(iter(SPEEDS))]
    figure, grid = plots.new_figure(5.4 * len(headings), 4.6, len(headings))
    for axes, heading in zip(grid[0], headings):
        shown = [row for row in found if heading in row.speeds]
        points = [(row.speeds[heading], row.worst) for row in shown]
        for row, (x, y) in zip(shown, points):
            size = row.any["weight_bytes"] / 1e6
            axes.scatter([x], [y], s=4 * size, alpha=0.6, color="#1f77b4", linewidths=0)
            axes.annotate(row.name, (x, y), (5, 4), textcoords="offset points", fontsize=7)
        best = [points[i] for i in front(points)]
        if best:
            axes.plot(*zip(*best), color="#444444", linewidth=1.0, zorder=0)
        axes.set(yscale="log", xlabel=f"{heading}: times the speed of bf16", title=heading)
        axes.set_ylabel("worst perplexity ratio")
        plots.clean(axes)
    figure.suptitle(f"Recipes on {model} (area: bytes of weights)")
    return figure


def draw(results: Results, out: Path) -> list[Path]:
    """Write the plot of every model into `out`; returns the paths."""
    paths = []
    for model in models(results):
        path = out / f"recipes-{model}.png"
        pareto(results, model).savefig(path, dpi=120)
        paths.append(path)
    return paths
