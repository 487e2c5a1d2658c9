"""``tessella tasks``: lm-evaluation-harness on a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tessella.cli.loading import Device, DeviceOption, DType, DTypeOption, load_model
from tessella.cli.session import Debug, Json, session


def tasks(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of a checkpoint, converted or not.")
    ],
    names: Annotated[list[str], typer.Argument(help="Tasks of lm-evaluation-harness.")],
    folder: Annotated[
        Path | None, typer.Option(help="Folder with YAML files of more tasks.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples in the prompt.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    device: DeviceOption = Device.cpu,
    dtype: DTypeOption = DType.auto,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run tasks of lm-evaluation-harness (pip install "tessella[eval]").

    JSON: tasks, an object of metrics (with their standard errors) by task.

    \b
    Examples:
      tessella tasks ./model-w4a8 arc_easy hellaswag --limit 200
      tessella tasks ./model-w4a8 my_task --folder ./tasks --json
    """
    with session(json=json, debug=debug) as s:
        from tessella.integrations import harness

        lm, tokenizer = load_model(model, device, dtype)
        found = harness.evaluate(
            lm, tokenizer, names, folder=folder, limit=limit, shots=shots, batch=batch
        )
        table = Table("task", "metric", "value", box=None, pad_edge=False)
        for task, metrics in found.items():
            for metric, value in metrics.items():
                table.add_row(task, metric, f"{value:.4f}")
        s.show(table)
        s.answer({"tasks": found})
