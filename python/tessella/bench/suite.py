"""What a family of benches is, and how one is run.

A family lists cases. A case, prepared, is a set of calls that are timed together: subjects (our
kernels, a record each) and rivals (what a user would run instead, in every record of the case).
`tessella bench`, the pytest-benchmark front end in bench/ and the tests all use this.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tessella.bench import BenchError, ceilings
from tessella.bench.ceilings import Ceilings
from tessella.bench.records import Record
from tessella.bench.timing import (
    BUDGET_S,
    FEWEST,
    INNER,
    MOST_S,
    REPS,
    Call,
    Timing,
    time_cpu,
    time_cuda,
)

Case = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A kernel of ours in a case.

    Attributes:
        name: unique in the case.
        kernel: what ran, as `tessella info` names it.
        case: keys that tell it from the case's other subjects (scheme, act...).
        call: one run.
        nbytes: memory that a run must read and write at least.
        macs: 8-bit multiply-adds of a run.
        parts: timed beside it and reported apart, e.g. {"quant": ...}.
        predicted_us: what the planner's cost model says, given the ceilings.
        notes: more for the record's `extra`.
        derive: what follows from `extra` once it has the parts' times, for `extra` too.
    """

    name: str
    kernel: str
    case: Case
    call: Call
    nbytes: int
    macs: int
    parts: Mapping[str, Call] = field(default_factory=dict)
    predicted_us: Callable[[Ceilings], float] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    derive: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Prepared:
    """The calls of one case.

    Attributes:
        subjects: at least one.
        rivals: interleaved with the subjects.
        apart: rivals with thread pools of their own, which go on spinning after a call and would
            disturb whatever comes next: each is timed alone, right after the others.
        absent: rivals that cannot run here, and why.
        inner: calls of one CUDA graph; fewer for long ones.
    """

    subjects: Sequence[Subject]
    rivals: Mapping[str, Call]
    apart: Mapping[str, Call] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    inner: int = INNER


@dataclass(frozen=True)
class Family:
    """One family on one kind of device.

    Attributes:
        cases: the cases, without threads; `True` asks for a few that take seconds.
        prepare: builds a case (with "threads" on a CPU) and the calls in it, for a selection.
        values: every key that tells records apart, and its possible values.
        calls: names of all subjects and rivals that a case can have.
        fewest, most_s: samples of a call at least, and seconds that one may take at most.
    """

    name: str
    device: str
    cases: Callable[[bool], list[Case]]
    prepare: Callable[[Case, Selection], Prepared]
    values: Mapping[str, Sequence[Any]]
    calls: Sequence[str]
    fewest: int = FEWEST
    most_s: float = MOST_S


class Selection:
    """Which cases a run keeps: ``Selection(["M=1,4", "scheme=g128"])``."""

    def __init__(self, filters: Sequence[str] = ()):
        """Raises BenchError on a filter that is not of the form KEY=VALUE[,VALUE...]."""
        self.wanted: dict[str, set[str]] = {}
        for text in filters:
            key, equals, values = text.partition("=")
            if not (key and equals and values):
                raise BenchError(f"filter: expected KEY=VALUE[,VALUE...], got {text!r}")
            self.wanted.setdefault(key, set()).update(values.split(","))

    def check(self, values: Mapping[str, Sequence[Any]]) -> None:
        """Raise BenchError when a key or a value is not among those of the family."""
        for key, wanted in self.wanted.items():
            if key not in values:
                raise BenchError(f"filter: expected one of {', '.join(values)}, got {key!r}")
            known = [str(v) for v in values[key]]
            if unknown := sorted(wanted - set(known)):
                raise BenchError(
                    f"filter: {key}: expected one of {', '.join(known)}, got {unknown[0]!r}"
                )

    def __call__(self, case: Mapping[str, Any]) -> bool:
        """Whether a case, or as much of it as is known, is wanted."""
        return all(str(case[k]) in v for k, v in self.wanted.items() if k in case)


@dataclass(frozen=True)
class Settings:
    """How to run a family."""

    quick: bool = False
    threads: Sequence[int] = (1, 2)
    selection: Selection = field(default_factory=Selection)
    reps: int = REPS
    budget_s: float = BUDGET_S


def selected(family: Family, settings: Settings) -> list[Case]:
    """The cases of a run. Raises BenchError when there is none."""
    threads = settings.threads if family.device == "cpu" else ()
    known = dict(family.values) | ({"threads": threads} if threads else {})
    settings.selection.check(known)
    found = [
        case
        for base in family.cases(settings.quick)
        for case in ([base | {"threads": t} for t in threads] or [base])
        if settings.selection(case)
    ]
    if not found:
        raise BenchError(f"{family.name}: no case{' of --quick' * settings.quick} is selected")
    return found


def run(
    family: Family, settings: Settings, progress: Callable[[int, int, Case], None] | None = None
) -> Iterator[Record]:
    """Measure a family's cases; yields records as they are done.

    `progress` is called with (done, total, case) before each case.
    """
    cases = selected(family, settings)
    before = torch.get_num_threads()
    limits: dict[int, Ceilings] = {}  # the best that any case of the run has seen
    try:
        for done, case in enumerate(cases):
            if progress:
                progress(done, len(cases), case)
            threads = case.get("threads", before)
            torch.set_num_threads(threads)
            prepared = family.prepare(case, settings.selection)
            limits[threads] = ceilings.measure(family.device, threads).best(limits.get(threads))
            yield from measure(family, case, prepared, limits[threads], settings)
    finally:
        torch.set_num_threads(before)


def measure(
    family: Family, case: Case, prepared: Prepared, limits: Ceilings, settings: Settings
) -> Iterator[Record]:
    """Time everything in one case, interleaved; a record for each subject."""
    calls = dict(prepared.rivals)
    for s in prepared.subjects:
        calls[s.name] = s.call
        calls |= {f"{s.name}/{part}": call for part, call in s.parts.items()}
    if family.device == "cuda":
        times = time_cuda(calls, inner=prepared.inner, reps=settings.reps)
    else:
        share = settings.budget_s / (len(calls) + len(prepared.apart))
        rules = {"reps": settings.reps, "fewest": family.fewest, "most_s": family.most_s}
        times = time_cpu(calls, budget_s=share * len(calls), **rules)
        for name, call in prepared.apart.items():
            times |= time_cpu({name: call}, budget_s=share, **rules)
    named = [*prepared.rivals, *prepared.apart]
    too_slow = [name for name in named if name not in times]
    rivals = {name: times[name] for name in named if name in times}
    for s in prepared.subjects:
        if s.name in times:
            full = case | s.case | ({"isa": limits.isa} if family.device == "cpu" else {})
            if forced := os.environ.get("TESSELLA_FORCE"):
                full["forced"] = forced
            record = _record(family, s, full, times, rivals, limits)
            if too_slow:
                record.extra["too_slow"] = too_slow
                record.extra["most_s"] = family.most_s
            if prepared.absent:
                record.extra["absent"] = dict(prepared.absent)
            yield record


def _record(
    family: Family,
    s: Subject,
    case: Case,
    times: Mapping[str, Timing],
    rivals: Mapping[str, Timing],
    limits: Ceilings,
) -> Record:
    ours = times[s.name]
    extra: dict[str, Any] = {
        **s.notes,
        "best_us": round(ours.best_us, 3),
        "samples": ours.samples,
        "gbs": round(s.nbytes / ours.us / 1e3, 2),
        "gmacs": round(s.macs / ours.us / 1e3, 2),
        "ceiling_gbs": round(limits.read_bytes_per_us / 1e3, 2),
        "ceiling_gmacs": round(limits.macs_per_us / 1e3, 2),
    }
    for part in s.parts:
        if (t := times.get(f"{s.name}/{part}")) is not None:
            extra[f"{part}_us"] = round(t.us, 3)
    if s.derive is not None:
        extra |= s.derive(extra)
    if s.predicted_us is not None:
        extra["predicted_us"] = round(s.predicted_us(limits), 3)
    extra["baseline_spread"] = {name: round(t.spread, 4) for name, t in rivals.items()}
    extra["baseline_samples"] = {name: t.samples for name, t in rivals.items()}
    return Record(
        family=family.name,
        kernel=s.kernel,
        case=case,
        us=ours.us,
        roofline_us=limits.roofline_us(s.nbytes, s.macs),
        baselines={name: t.us for name, t in rivals.items()},
        extra=extra,
        spread=ours.spread,
    )
