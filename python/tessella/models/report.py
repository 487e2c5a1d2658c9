"""What a conversion tells about itself: progress while it runs, a report at the end."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Passed to the progress callback after each linear (`done` of `total`)."""

    done: int
    total: int
    name: str
    bytes_done: int  # of the source


@dataclass(frozen=True)
class LayerRecord:
    """One converted linear. `rel_error` is ||w' - w|| / ||w|| (None in a dry run).

    With a calibration `before` and `after` are relative errors of the results on its inputs,
    activations quantised: of rounding to nearest without any step, and of what was stored.
    """

    name: str
    shape: tuple[int, int]  # N, K
    scheme: str
    rel_error: float | None
    bytes: int  # stored, scales included
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True)
class Report:
    """Sizes are bytes of tensors; `peak_rss` is this process's largest resident set in bytes.

    `memory_estimate` is what the conversion was expected to take, in bytes.
    """

    layers: list[LayerRecord]
    bytes_in: int
    bytes_out: int
    seconds: float
    peak_rss: int
    memory_estimate: int = 0

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(dataclasses.asdict(self))


def peak_rss() -> int:
    """Largest resident set of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
