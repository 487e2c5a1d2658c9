"""lm-evaluation-harness on any checkpoint that this package loads, converted or not.

Needs the extra ``[eval]``. Tasks are the harness's own (their data sets come from the hub), or YAML
files of a folder, which may name local data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn


class HarnessError(RuntimeError):
    """The harness is not installed, or has no such task."""


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch: int = 8,
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-evaluation-harness on a loaded model.

    Args:
        model, tokenizer: as :func:`tessella.integrations.hf.load` returns them.
        tasks: names of tasks.
        folder: with YAML files of more tasks.
        limit: documents of each task; None: all.
        shots: examples in the prompt; None: as the task says.
        batch: requests at a time.

    Returns:
        {task: {metric: value}}, standard errors under "<metric>_stderr".

    Raises:
        HarnessError: lm_eval is not installed, or does not know a task (its name is in the
            message).
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise HarnessError(f"tasks need lm_eval ({e}): pip install 'tessella[eval]'") from e
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise HarnessError(f"tasks: lm_eval has no task {unknown[0]!r}")
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        num_fewshot=shots,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {name: _metrics(values) for name, values in found["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """The harness's "metric,filter" keys without the filter; what is no number left out."""
    return {
        key.split(",")[0]: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and "," in key
    }
