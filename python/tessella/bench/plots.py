"""Plots of result records. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING

from tessella.bench import BenchError
from tessella.bench.tables import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = "tessella"
COLORS = {
    OURS: "#d55e00",
    "torch_bf16": "#0072b2",
    "torch_fp32": "#56b4e9",
    "aten_int4": "#009e73",
    "onednn_int8": "#cc79a7",
    "fbgemm_int8": "#e69f00",
    "onnxruntime": "#000000",
    "openvino": "#7f7f7f",
    "transformers_bf16": "#0072b2",
    "transformers_bf16_folded": "#009e73",
    "transformers_fp32": "#56b4e9",
    "sdpa": "#0072b2",
    "sdpa_cudnn": "#0072b2",
    "sdpa_flash": "#56b4e9",
    "sdpa_separate": "#cc79a7",
    "torch_folded_bf16": "#009e73",
}
"""By who ran; colours that the colour-blind tell apart."""

MAIN = {"scheme": "twolevel", "act": "int8"}
"""The scheme and activations that stand for tessella where a plot has room for one."""


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1):
    """A figure and its axes [rows][columns]. Raises BenchError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise BenchError("report: plots need matplotlib: pip install 'tessella[plot]'") from e
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _plain_ticks(axes: Axes) -> None:
    """1, 2, 5, 10, 20... on logarithmic axes, written out."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    """One legend below everything."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _color(name: str) -> str:
    return COLORS.get(name, "#b3b3b3")


def clean(axes: Axes) -> None:
    """A light grid, and no frame above and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)


def _main(records: Sequence[Record], threads: int | None) -> list[Record]:
    """GEMM records of the main scheme and this number of threads (None: on a GPU), by M."""
    wanted = MAIN | {"threads": threads}
    found = [r for r in records if all(r["case"].get(k) == v for k, v in wanted.items())]
    return sorted(found, key=lambda r: r["case"]["M"])


def time_against_m(records: Sequence[Record], threads: int | None) -> Figure:
    """A panel per shape: time of everything over the number of tokens, and the roofline."""
    records = _main(records, threads)
    shapes = list(dict.fromkeys((r["case"]["N"], r["case"]["K"]) for r in records))
    columns = min(2, len(shapes))
    rows = -(-len(shapes) // columns)
    figure, grid = new_figure(5.2 * columns, 0.9 + 3.6 * rows, columns, rows)
    panels = list(grid.flat)
    for axes, (N, K) in zip(panels, shapes):
        of_shape = [r for r in records if (r["case"]["N"], r["case"]["K"]) == (N, K)]
        M = [r["case"]["M"] for r in of_shape]
        roof = [r["roofline_us"] / 1e3 for r in of_shape]
        axes.plot(M, roof, color="#444444", linestyle="--", linewidth=1.2, label="roofline")
        for name in dict.fromkeys(b for r in of_shape for b in r["baselines"]):
            points = [
                (m, r["baselines"][name] / 1e3)
                for m, r in zip(M, of_shape)
                if r["baselines"].get(name)
            ]
            style = {"linewidth": 1.3, "markersize": 4, "marker": "o"}
            axes.plot(*zip(*points), color=_color(name), label=name, **style)
        ours = [r["us"] / 1e3 for r in of_shape]
        axes.plot(M, ours, color=_color(OURS), label=OURS, linewidth=2.4, marker="s", zorder=5)
        axes.set(xscale="log", yscale="log", title=f"{N} x {K}", xlabel="tokens M")
        axes.set_ylabel("time, ms")
        _plain_ticks(axes)
        axes.set_xticks(M, [str(m) for m in M])
        axes.minorticks_off()
        clean(axes)
    for axes in panels[len(shapes) :]:
        axes.set_visible(False)
    _legend(figure, panels[0], 2 * columns)
    figure.suptitle(f"Linear layer{_on(threads)} (lower is better)")
    return figure


def roofline(records: Sequence[Record], threads: int | None) -> Figure:
    """Arithmetic rate over intensity, below the measured ceilings."""
    records = _main(records, threads)
    figure, grid = new_figure(6.6, 4.6)
    axes = grid[0][0]
    read = max(r["extra"]["ceiling_gbs"] for r in records)
    peak = max(r["extra"]["ceiling_gmacs"] for r in records)
    # GMAC/s over GB/s are multiply-adds a byte
    intensity = [r["extra"]["gmacs"] / r["extra"]["gbs"] for r in records]
    low, high = min(intensity) / 2, max(max(intensity), peak / read) * 2
    axes.plot([low, peak / read, high], [low * read, peak, peak], color="#444444", linewidth=1.4)
    axes.annotate(f"{read:.1f} GB/s read", (low, low * read), (12, 0), textcoords="offset points")
    axes.annotate(
        f"{peak:.0f} GMAC/s", (high, peak), (0, 5), textcoords="offset points", ha="right"
    )
    tokens = list(dict.fromkeys(r["case"]["M"] for r in records))
    shades = _shades(len(tokens))
    for shade, m in zip(shades, tokens):
        points = [
            (x, r["extra"]["gmacs"]) for x, r in zip(intensity, records) if r["case"]["M"] == m
        ]
        axes.plot(*zip(*points), "o", color=shade, label=f"M = {m}", markersize=6)
    axes.set(xscale="log", yscale="log", xlabel="multiply-adds a byte", ylabel="GMAC/s")
    axes.set_title(f"Roofline of the 4-bit linear layer{_on(threads)}")
    axes.legend(frameon=False, loc="lower right")
    _plain_ticks(axes)
    clean(axes)
    return figure


def _shades(n: int) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.9 * i / max(n - 1, 1))) for i in range(n)]


def speedups(records: Sequence[Record], threads: int | None) -> Figure:
    """Bars: how many times longer each rival takes, geometric mean over the shapes."""
    records = _main(records, threads)
    tokens = list(dict.fromkeys(r["case"]["M"] for r in records))
    rivals = list(dict.fromkeys(b for r in records for b in r["baselines"]))
    figure, grid = new_figure(1.6 + 1.9 * len(tokens), 4.2)
    axes = grid[0][0]
    width = 0.84 / max(len(rivals), 1)
    for j, name in enumerate(rivals):
        bars = []
        for i, m in enumerate(tokens):
            of_m = [r for r in records if r["case"]["M"] == m]
            ratios = [r["baselines"][name] / r["us"] for r in of_m if r["baselines"].get(name)]
            if len(ratios) == len(of_m):
                bars.append((i + (j - (len(rivals) - 1) / 2) * width, geometric_mean(ratios)))
        if not bars:
            continue
        drawn = axes.bar(*zip(*bars), width * 0.92, color=_color(name), label=name)
        axes.bar_label(drawn, fmt="%.1f", fontsize=7, padding=1)
    axes.axhline(1, color="#444444", linewidth=1.2)
    axes.set_yscale("log")
    _plain_ticks(axes)
    axes.minorticks_off()
    axes.set_xticks(range(len(tokens)), [f"M = {m}" for m in tokens])
    axes.set_ylabel("time of rival / time of tessella")
    axes.set_title(f"Linear layer against what else there is{_on(threads)}")
    axes.margins(y=0.1)
    _legend(figure, axes, 3)
    clean(axes)
    axes.grid(False, axis="x")
    return figure


def end_to_end(records: Sequence[Record]) -> Figure:
    """Bars of tokens per second, a panel for each phase and context."""
    records = list(records)
    panels = list(dict.fromkeys((r["case"]["phase"], r["case"]["ctx"]) for r in records))
    figure, grid = new_figure(3.4 * len(panels), 4.0, len(panels))
    for axes, (phase, ctx) in zip(grid[0], panels):
        of_panel = [r for r in records if (r["case"]["phase"], r["case"]["ctx"]) == (phase, ctx)]
        threads = list(dict.fromkeys(r["case"]["threads"] for r in of_panel))
        names = list(dict.fromkeys(n for r in of_panel for n in _rates(r)))
        names.sort(key=lambda name: name.startswith(OURS))
        width = 0.84 / len(names)
        for j, name in enumerate(names):
            bars = [
                (i + (j - (len(names) - 1) / 2) * width, rate)
                for i, t in enumerate(threads)
                if (rate := _rate_of(of_panel, t, name)) is not None
            ]
            shade = _color(OURS) if "w4a8" in name else _color(name)
            alpha = 0.6 if name.endswith("w4a8") else 1.0
            drawn = axes.bar(*zip(*bars), width * 0.92, color=shade, alpha=alpha, label=name)
            axes.bar_label(drawn, fmt=_three_digits, fontsize=7, padding=1)
        axes.set_xticks(range(len(threads)), [_threads(t) for t in threads])
        axes.set_title(f"{phase}, context {ctx}")
        axes.set_ylabel("tokens/s")
        axes.margins(y=0.12)
        clean(axes)
        axes.grid(False, axis="x")
    _legend(figure, grid[0][0], 2 if len(panels) < 3 else 5)
    figure.suptitle(f"{records[0]['case']['model']}, random weights (higher is better)")
    return figure


ATTENTION = ("msm", "kv4", "mla")
"""Families whose cases are batches over caches."""


def attention_times(records: Sequence[Record], threads: int | None) -> Figure:
    """Time over what the roofline allows: one point for each case, by codec and by rival."""
    records = _of_threads(records, threads)
    figure, grid = new_figure(6.6, 5.0)
    axes = grid[0][0]
    least = [r["roofline_us"] for r in records]
    ends = [min(least) * 0.8, max(least) * 1.25]
    for factor, style in ((1, "--"), (2, ":")):
        label = "roofline" if factor == 1 else "twice its time"
        line = [factor * x for x in ends]
        axes.plot(ends, line, color="#444444", linestyle=style, linewidth=1.2, label=label)
    for name in dict.fromkeys(b for r in records for b in r["baselines"]):
        points = [
            (x, r["baselines"][name]) for x, r in zip(least, records) if name in r["baselines"]
        ]
        axes.plot(*zip(*points), "o", color=_color(name), label=name, markersize=4, alpha=0.6)
    codecs = list(dict.fromkeys(_codec(r) for r in records))
    for marker, codec in zip("sD^vPX*<>p" * len(codecs), codecs):
        points = [(x, r["us"]) for x, r in zip(least, records) if _codec(r) == codec]
        label = f"{OURS} {codec}"
        axes.plot(*zip(*points), marker, color=_color(OURS), label=label, markersize=6, zorder=5)
    axes.set(xscale="log", yscale="log", xlabel="least time, us", ylabel="time, us")
    axes.set_title(f"Attention, {records[0]['family']}{_on(threads)} (lower is better)")
    _plain_ticks(axes)
    axes.minorticks_off()
    _legend(figure, axes, 3)
    clean(axes)
    return figure


def attention_speedups(records: Sequence[Record], threads: int | None) -> Figure:
    """Bars: how many times longer each rival takes, case by case."""
    records = [r for r in _of_threads(records, threads) if r["baselines"]]
    rivals = list(dict.fromkeys(b for r in records for b in r["baselines"]))
    figure, grid = new_figure(7.6, 1.6 + 0.16 * len(records) * (len(rivals) + 0.6))
    axes = grid[0][0]
    height = 0.84 / max(len(rivals), 1)
    for j, name in enumerate(rivals):
        bars = [
            (i + (j - (len(rivals) - 1) / 2) * height, r["baselines"][name] / r["us"])
            for i, r in enumerate(records)
            if name in r["baselines"]
        ]
        drawn = axes.barh(*zip(*bars), height * 0.92, color=_color(name), label=name)
        axes.bar_label(drawn, fmt="%.2f", fontsize=6, padding=1)
    axes.axvline(1, color="#444444", linewidth=1.2)
    axes.set_xscale("log")
    _plain_ticks(axes)
    axes.minorticks_off()
    axes.set_yticks(range(len(records)), [_attention_case(r) for r in records], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time of rival / time of tessella")
    axes.set_title(f"Attention, {records[0]['family']}{_on(threads)}, against what else there is")
    axes.margins(x=0.1, y=0.01)
    _legend(figure, axes, 3)
    clean(axes)
    axes.grid(False, axis="y")
    return figure


def _of_threads(records: Sequence[Record], threads: int | None) -> list[Record]:
    return [r for r in records if r["case"].get("threads") == threads]


def _codec(r: Record) -> str:
    return r["case"].get("kv") or r["case"]["latent"]


def _attention_case(r: Record) -> str:
    c = r["case"]
    tokens = f" x {c['q']}" if c["q"] > 1 else ""
    return f"{c['kind']} {c['B']}{tokens} over {c['ctx']}, {c['kv']}, pages of {c['page']}"


def _three_digits(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _rates(r: Record) -> dict[str, float]:
    """Tokens per second of a record's own model and of its rivals."""
    tokens = r["extra"]["tokens"] * 1e6
    own = {f"{OURS} {r['case']['recipe']}": tokens / r["us"]}
    return own | {name: tokens / us for name, us in r["baselines"].items()}


def _rate_of(records: Sequence[Record], threads: int, name: str) -> float | None:
    rates = [_rates(r).get(name) for r in records if r["case"]["threads"] == threads]
    return next((rate for rate in rates if rate is not None), None)


def _threads(n: int) -> str:
    return f"{n} thread{'s' * (n > 1)}"


def _on(threads: int | None) -> str:
    return f", {_threads(threads)}" if threads else ""


def draw(records: Sequence[Record], out: Path, prefix: str) -> list[Path]:
    """Every plot that the records of one family and device allow, as PNG files in `out`."""
    family = records[0]["family"]
    figures: dict[str, Figure] = {}
    if family == "w4ax_gemm":
        for threads in dict.fromkeys(r["case"].get("threads") for r in records):
            if not (main := _main(records, threads)):
                continue
            suffix = f"-{threads}t" if threads else ""
            figures[f"time{suffix}"] = time_against_m(records, threads)
            figures[f"speedup{suffix}"] = speedups(records, threads)
            if all(
                {"gmacs", "gbs", "ceiling_gbs", "ceiling_gmacs"} <= r["extra"].keys() for r in main
            ):
                figures[f"roofline{suffix}"] = roofline(records, threads)
    elif family in ATTENTION:
        for threads in dict.fromkeys(r["case"].get("threads") for r in records):
            suffix = f"-{threads}t" if threads else ""
            figures[f"time{suffix}"] = attention_times(records, threads)
            if family != "mla" and any(r["baselines"] for r in _of_threads(records, threads)):
                figures[f"speedup{suffix}"] = attention_speedups(records, threads)
    elif family == "e2e":
        for model in dict.fromkeys(r["case"]["model"] for r in records):
            of_model = [r for r in records if r["case"]["model"] == model]
            figures[model] = end_to_end(of_model)
    paths = []
    for name, figure in figures.items():
        path = out / f"{prefix}-{name}.png"
        figure.savefig(path, dpi=130)
        paths.append(path)
    return paths
