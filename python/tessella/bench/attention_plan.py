"""Plans of attention as dicts, for ``tessella plan msm``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tessella import _native
from tessella.bench import BenchError
from tessella.formats_kv import MASKS
from tessella.ref.msm import HEADER, MERGE, TASK

TASK_FIELDS = ("request", "tile", "row0", "rows", "kv_begin", "kv_end", "partial", "cost")
"""The words of a task, in order."""
MERGE_FIELDS = ("request", "row0", "rows", "partial", "parts")
"""The words of a merge, in order."""


def make(
    requests: Sequence[tuple[int, int, str]], heads: str, units: int, window: int, split: int
) -> dict[str, Any]:
    """The plan for requests (query tokens, keys, mask) and heads "H:J:D".

    Raises BenchError on requests or heads that make no sense, and without the compiled module.
    """
    if _native._C is None:
        raise BenchError(f"plan: needs the compiled module ({_native.C_ERROR})")
    for q, kv, mask in requests:
        if kv < q and mask != "full":
            raise BenchError(f"request {q}:{kv}: expected kv >= q under mask {mask}, got kv={kv}")
        if mask == "window" and window < 1:
            raise BenchError("window: expected at least 1 for the mask 'window', got 0")
    parts = heads.split(":")
    if len(parts) != 3 or not all(p.isdigit() and int(p) for p in parts):
        raise BenchError(f"heads: expected H:J:D, got {heads!r}")
    H, J, _ = map(int, parts)
    if H % J or split % 256:
        raise BenchError(
            f"heads, split: expected H % J == 0 and split % 256 == 0, got {heads} {split}"
        )
    plan = _native._C.plan_msm(
        [q for q, _, _ in requests],
        [kv for _, kv, _ in requests],
        [MASKS[m] for _, _, m in requests],
        H,
        J,
        window,
        units,
        split,
    )
    words = plan["words"]
    tasks, merges, partial_rows = words[6:9]
    end = HEADER + TASK * tasks
    return {
        "text": plan["text"],
        "tasks": tasks,
        "merges": merges,
        "partial_rows": partial_rows,
        "table": _rows(words[HEADER:end], TASK_FIELDS),
        "merge_table": _rows(words[end:], MERGE_FIELDS),
        "words": len(words),
    }


def _rows(words: list[int], fields: Sequence[str]) -> list[dict[str, int]]:
    n = len(fields)
    assert n in (TASK, MERGE)
    return [dict(zip(fields, words[i : i + n], strict=True)) for i in range(0, len(words), n)]
