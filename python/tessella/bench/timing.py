"""Timers that follow the rules of measurement: interleaved, rotating buffers, medians."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch


@dataclass(frozen=True)
class Timing:
    """Median and minimum in microseconds, and interquartile range over median."""

    us: float
    best_us: float
    spread: float


def summarise(samples_us: Sequence[float]) -> Timing:
    """Median, minimum and relative spread of samples in microseconds (at least one)."""
    mid = median(samples_us)
    low, _, high = quantiles(samples_us, n=4) if len(samples_us) > 1 else (mid, mid, mid)
    return Timing(mid, min(samples_us), (high - low) / mid if mid else 0.0)


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


def time_cpu(variants: dict[str, Call], *, reps: int = 30, budget_s: float = 8.0):
    """Time variants interleaved, one call each in turn; {name: Timing}.

    At least `reps` rounds after a warm-up, fewer (but 5) where they would exceed `budget_s`.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call(0)
    start = time.perf_counter()
    for i in range(reps):
        for name, call in variants.items():
            before = time.perf_counter()
            call(i + 1)
            samples[name].append((time.perf_counter() - before) * 1e6)
        if i >= 4 and time.perf_counter() - start > budget_s:
            break
    return {name: summarise(s) for name, s in samples.items()}


def time_cuda(variants: dict[str, Call], *, inner: int = 20, reps: int = 30):
    """Time variants as CUDA graphs of `inner` calls each, replayed in turn; {name: Timing}.

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
