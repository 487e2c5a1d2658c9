"""Timers that follow the rules of measurement: interleaved, rotating buffers, medians."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

REPS = 30
"""Samples of a variant, unless the time budget forces fewer."""

FEWEST = 5
"""Samples of a variant at least, whatever they take."""

MOST_S = 5.0
"""A variant whose single call takes longer is not measured."""

LONG_S = 10.0
"""A call that takes longer needs no warm-up: its first run counts."""

SAMPLE_S = 2e-3
"""A sample of a shorter call is the mean of as many calls as take this long, but `MOST_CALLS`."""

MOST_CALLS = 16

BUDGET_S = 30.0
"""Seconds for the samples of all variants of a case together."""


INNER = 20
"""Calls in one CUDA graph, unless they are long."""

MOST_INNER_US = 4000.0
"""Microseconds that the calls of one CUDA graph should take at most."""


def inner_calls(us: float) -> int:
    """How many calls that take about `us` microseconds make a CUDA graph."""
    return int(min(INNER, max(2, MOST_INNER_US / us)))


@dataclass(frozen=True)
class Timing:
    """Median and minimum in microseconds, interquartile range over median, and samples taken."""

    us: float
    best_us: float
    spread: float
    samples: int


def summarise(samples_us: Sequence[float]) -> Timing:
    """Median, minimum and relative spread of samples in microseconds (at least one)."""
    mid = median(samples_us)
    low, _, high = quantiles(samples_us, n=4) if len(samples_us) > 1 else (mid, mid, mid)
    return Timing(mid, min(samples_us), (high - low) / mid if mid else 0.0, len(samples_us))


def last_level_cache_bytes() -> int:
    """Size of the largest CPU cache, 32 MiB where the system does not say."""
    sizes = [32 << 20]
    base = "/sys/devices/system/cpu/cpu0/cache"
    for entry in os.listdir(base) if os.path.isdir(base) else ():
        try:
            with open(f"{base}/{entry}/size") as f:
                sizes.append(int(f.read().strip().rstrip("K")) << 10)
        except (OSError, ValueError):
            continue
    return max(sizes)


def rotations(bytes_each: int, cache_bytes: int, most: int = 64) -> int:
    """How many copies of a buffer to rotate over so that none is still cached: 2x the cache."""
    return max(2, min(most, -(-2 * cache_bytes // max(bytes_each, 1))))


Call = Callable[[int], object]
"""One run of a variant; the argument counts up, for rotating over buffers."""


def sample_counts(
    seconds: Mapping[str, float],
    *,
    reps: int = REPS,
    budget_s: float = BUDGET_S,
    fewest: int = FEWEST,
    most_s: float = MOST_S,
) -> dict[str, int]:
    """Samples of each variant, given the seconds that one call of it takes.

    Every variant has the same share of the budget: `reps` samples if they fit in, else as many as
    do, but `fewest`. A variant over `most_s` is left out.
    """
    share = budget_s / max(len(seconds), 1)
    return {
        name: max(min(fewest, reps), min(reps, int(share / max(s, 1e-9))))
        for name, s in seconds.items()
        if s <= most_s
    }


def time_cpu(
    variants: Mapping[str, Call],
    *,
    reps: int = REPS,
    budget_s: float = BUDGET_S,
    fewest: int = FEWEST,
    most_s: float = MOST_S,
) -> dict[str, Timing]:
    """Time variants interleaved, one call each a round, after a warm-up.

    The order changes from round to round, so that what a call leaves in the caches disturbs all
    others alike. A variant with fewer samples than `reps` (:func:`sample_counts`) sits out some
    rounds, evenly spread. The result lacks variants that are too slow to measure.
    """
    calls = {name: _counted(call) for name, call in variants.items()}
    seconds = {name: _warm_up(call, most_s) for name, call in calls.items()}
    inner = {
        name: max(1, min(MOST_CALLS, int(SAMPLE_S / max(s, 1e-9)))) for name, s in seconds.items()
    }
    counts = sample_counts(seconds, reps=reps, budget_s=budget_s, fewest=fewest, most_s=most_s)
    samples = {name: [seconds[name] * 1e6] if seconds[name] > LONG_S else [] for name in counts}
    order, shuffle = list(counts.items()), random.Random(0).shuffle
    for i in range(reps):
        shuffle(order)
        for name, n in order:
            if (i + 1) * n // reps > i * n // reps and len(samples[name]) < n:
                samples[name].append(calls[name](inner[name]) * 1e6)
    return {name: summarise(s) for name, s in samples.items()}


def _counted(call: Call) -> Callable[..., float]:
    """Runs `call` with 0, 1, 2..., `inner` times; returns the seconds that each took."""
    calls = 0

    def run(inner: int = 1) -> float:
        nonlocal calls
        before = time.perf_counter()
        for i in range(calls, calls + inner):
            call(i)
        calls += inner
        return (time.perf_counter() - before) / inner

    return run


def _warm_up(call: Callable[..., float], most_s: float) -> float:
    """Seconds of a call; of a short one not the first."""
    first = call()
    return first if first > min(LONG_S, most_s) else min(first, call())


def time_cuda(
    variants: Mapping[str, Call], *, inner: int = INNER, reps: int = REPS
) -> dict[str, Timing]:
    """Time variants as CUDA graphs of `inner` calls each, replayed in turn.

    Launches inside a graph follow each other at the GPU's pace, as they do in a served model.
    The calls rotate over buffers by their argument; results are kept alive until the replay.
    """
    graphs, keep = {}, []
    for name, call in variants.items():
        for i in range(3):
            call(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            keep.append([call(i) for i in range(inner)])
        graphs[name] = graph
    samples: dict[str, list[float]] = {name: [] for name in variants}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(reps + 3):
        for name, graph in graphs.items():
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 3:
                samples[name].append(begin.elapsed_time(end) * 1e3 / inner)
    return {name: summarise(s) for name, s in samples.items()}
