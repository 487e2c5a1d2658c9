"""``tessella heal``: distillation and fine-tuning of a converted model."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tessella.cli.session import CommandError, Debug, Json, session

if TYPE_CHECKING:
    from tessella.integrations.heal import HealReport, Progress


class TrainingDevice(str, Enum):
    """Where models are trained."""

    cpu = "cpu"
    cuda = "cuda"
    npu = "npu"


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
    steps: Annotated[int, typer.Option(min=0, help="Of distillation.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Windows or examples in a step.")] = 16,
    ctx: Annotated[int, typer.Option(min=8, help="Tokens in a window, most of an example.")] = 512,
    lr: Annotated[float, typer.Option(help="Highest learning rate of distillation.")] = 3e-4,
    on_policy: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of steps on text that the student writes."),
    ] = 0.0,
    sft_steps: Annotated[int, typer.Option(min=0, help="Of fine-tuning.")] = 200,
    sft_lr: Annotated[float, typer.Option(help="Highest learning rate of fine-tuning.")] = 1e-5,
    seed: Annotated[int, typer.Option(help="Of the order of the data, and of sampling.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
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
        options = training.HealOptions(
            steps=steps,
            batch=batch,
            lr=lr,
            on_policy=on_policy,
            sft_steps=sft_steps,
            sft_lr=sft_lr,
            seed=seed,
            save_every=save_every,
        )
        with s.progress("steps") as bar:
            tasks: dict[str, int] = {}

            def show(p: Progress) -> None:
                if p.stage not in tasks:
                    tasks[p.stage] = bar.add_task(p.stage, total=p.steps)
                bar.update(
                    tasks[p.stage], completed=p.step, description=f"{p.stage}, loss {p.loss:.4f}"
                )

            report = training.heal(
                student,
                out,
                teacher=teacher,
                windows=windows,
                examples=examples,
                options=options,
                device=device.value,
                resume=resume,
                progress=show,
            )
        s.show(_summary(report, out))
        answer = dataclasses.asdict(report)
        del answer["losses"]  # OUT/loss.json has them
        s.answer(answer)


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
