"""``tessella heal``: distillation and fine-tuning of a converted model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress as Bar

from tessella.cli.session import CommandError, Debug, Json, session

if TYPE_CHECKING:
    from tessella.integrations.heal import HealReport, Progress


class TrainingDevice(str, Enum):
    """Where models are trained."""

    cpu = "cpu"
    cuda = "cuda"
    npu = "npu"


Steps = Annotated[int, typer.Option(min=0, help="Of distillation.")]
Batch = Annotated[int, typer.Option(min=1, help="Windows or examples in a step.")]
Context = Annotated[int, typer.Option(min=8, help="Tokens in a window, most of an example.")]
Rate = Annotated[float, typer.Option(help="Highest learning rate of distillation.")]
Share = Annotated[
    float, typer.Option(min=0, max=1, help="Share of steps on text that the student writes.")
]
SftSteps = Annotated[int, typer.Option(min=0, help="Of fine-tuning.")]
SftRate = Annotated[float, typer.Option(help="Highest learning rate of fine-tuning.")]
Seed = Annotated[int, typer.Option(help="Of the order of the data, and of sampling.")]
Every = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]


def heal(
    student: Annotated[str, typer.Argument(help="Converted model: folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to create; must be new or empty.")],
    teacher: Annotated[
        str | None, typer.Option(help="The original; needed unless --steps is 0.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help='Text to distil on: .txt (NUL), .jsonl ("text"), or .xz.')
    ] = None,
    sft: Annotated[
        Path | None,
        typer.Option(help="Instructions, .jsonl: prompt and completion, messages, or text."),
    ] = None,
    steps: Steps = 1000,
    batch: Batch = 16,
    ctx: Context = 512,
    lr: Rate = 1e-4,
    on_policy: Share = 0.0,
    sft_steps: SftSteps = 200,
    sft_lr: SftRate = 1e-5,
    seed: Seed = 0,
    save_every: Every = 500,
    device: Annotated[TrainingDevice, typer.Option(help="Where to train.")] = TrainingDevice.cpu,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Restore a converted model: distil from its original, then fine-tune.

    Distillation minimises KL(teacher || student) over --text; --sft adds
    supervised fine-tuning. OUT gets loss.json and loss.png beside the
    checkpoint. Needs the extra tessella[heal].

    JSON: loss and loss_first (of distillation), sft_loss, sft_loss_first,
    steps, sft_steps, tokens (distilled on), seconds.

    \b
    Examples:
      tessella heal ./llama-mla ./healed --teacher ./Llama-3-8B --text web.txt.xz --device cuda
      tessella heal ./mla ./out --teacher ./model --text t.jsonl --on-policy 0.25 --steps 4000
      tessella heal ./healed ./bank --steps 0 --sft finance.jsonl --sft-steps 500
    """
    with session(json=json, debug=debug) as s:
        from tessella.integrations import heal as training
        from tessella.integrations.examples import read_examples
        from tessella.integrations.text import read_documents
        from tessella.integrations.tokens import load_tokenizer
        from tessella.integrations.windows import spread, token_windows

        _check_device(device)
        distils = steps > 0
        if distils and (text is None or teacher is None):
            raise CommandError("distillation needs --teacher and --text; --steps 0 leaves it out")
        if not distils and sft is None:
            raise CommandError("nothing to do: expected --sft or --steps above 0")
        tokenizer, _ = load_tokenizer(student)
        windows = None
        if distils:
            found = token_windows(tokenizer, read_documents(text), ctx)
            (windows,) = spread(found, [len(found)], f"--text {text}")
        examples = None if sft is None else read_examples(sft, tokenizer, ctx)
        rates = {"lr": lr, "sft_lr": sft_lr, "on_policy": on_policy}
        counts = {"steps": steps, "sft_steps": sft_steps, "batch": batch, "save_every": save_every}
        how = {"teacher": teacher, "windows": windows, "examples": examples, "resume": resume}
        how["options"] = training.HealOptions(seed=seed, **rates, **counts)
        with s.progress("steps") as bar:
            how |= {"device": device.value, "progress": _shown_on(bar)}
            report = training.heal(student, out, **how)
        s.show(_summary(report, out))
        answer = dataclasses.asdict(report)
        del answer["losses"]  # OUT/loss.json has them
        s.answer(answer)


def _shown_on(bar: Bar) -> Callable[[Progress], None]:
    """A callback with a bar for each stage."""
    tasks: dict[str, int] = {}

    def show(p: Progress) -> None:
        if p.stage not in tasks:
            tasks[p.stage] = bar.add_task(p.stage, total=p.steps)
        bar.update(tasks[p.stage], completed=p.step, description=f"{p.stage}, loss {p.loss:.4f}")

    return show


def _check_device(device: TrainingDevice) -> None:
    """Raises CommandError when torch cannot use it."""
    import torch

    if device is TrainingDevice.cuda and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch finds no CUDA GPU here; use --device cpu")
    if device is TrainingDevice.npu:
        from tessella.integrations.heal import npu_available

        if not npu_available():
            raise CommandError("--device npu: torch_npu finds no Ascend NPU here")


def _summary(report: HealReport, out: Path) -> str:
    parts = []
    if report.steps:
        parts.append(
            f"distilled over {report.steps} steps: {report.loss_first:.4f} -> {report.loss:.4f}"
        )
    if report.sft_steps:
        parts.append(
            f"fine-tuned over {report.sft_steps} steps: {report.sft_loss_first:.4f} -> "
            f"{report.sft_loss:.4f}"
        )
    return f"{'; '.join(parts)} nats a token; {report.seconds:.0f} s: {out}"
