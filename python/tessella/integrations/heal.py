"""Heals a converted model: distillation from its original, then fine-tuning on instructions.

Generalised knowledge distillation (Agarwal et al., arXiv 2306.13649) with the forward divergence
KL(teacher || student) over every token of a text (off-policy, as YouZhi-LLM does), or, for a share
of the steps, of what the student itself writes after the first half of a window (on-policy). Then
supervised fine-tuning on completions. The Trainer of transformers does the work, in bf16 with
fp32 weights; it needs accelerate.

Work is done in ``<out>.partial`` and renamed at the end; an interrupted run resumes from the
Trainer's last checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from tessella.integrations.examples import Example, collate
from tessella.models.checkpoint import CONFIG, read_json
from tessella.models.hub import CARRIED, resolve
from tessella.models.partial import check_target

STATE = ".tessella-healing.json"
LOSSES, PLOT = "loss.json", "loss.png"
"""Files of the result beside the checkpoint: the losses of every logged step, and their plot."""


class HealError(ValueError):
    """A training that cannot be done; the message says what would be needed."""


@dataclass(frozen=True)
class HealOptions:
    """Settings of both stages; they enter the fingerprint of a run.

    `steps` and `sft_steps`: optimiser steps; `batch` windows (or examples) each. `on_policy`: the
    share of distillation steps on the student's own text. `lr` and `sft_lr` rise linearly over
    `warmup` of the steps and fall to zero along a cosine.
    """

    steps: int = 1000
    batch: int = 16
    lr: float = 1e-4
    on_policy: float = 0.0
    sft_steps: int = 200
    sft_lr: float = 1e-5
    warmup: float = 0.03
    weight_decay: float = 0.0
    seed: int = 0
    save_every: int = 500


@dataclass(frozen=True)
class Progress:
    """After a logged step: `stage` is "distil" or "sft"."""

    stage: str
    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class HealReport:
    """Mean losses over the first and last logged steps of each stage, and all of them."""

    steps: int
    sft_steps: int
    loss: float | None
    loss_first: float | None
    sft_loss: float | None
    sft_loss_first: float | None
    tokens: int
    seconds: float
    losses: list[dict[str, Any]]


def heal(
    student: str,
    out: str | os.PathLike,
    *,
    teacher: str | None,
    windows: Tensor | None,
    examples: list[Example] | None,
    options: HealOptions,
    device: str = "cpu",
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> HealReport:
    """Train `student` and write it to the new folder `out`.

    Args:
        student, teacher: checkpoints over the same vocabulary; the teacher only for distillation.
        windows: int64 [N, T], token ids to distil on; None or no steps: no distillation.
        examples: tokenised instructions; None or no steps: no fine-tuning.
        device: "cpu", "cuda" or "npu"; the Trainer places the models there.
        resume: go on with what an interrupted run with the same inputs left.

    Raises:
        HealError: no accelerate, other vocabularies, a folder in use or of another run, a loss
            that is not finite.
    """
    started = time.perf_counter()
    _require_accelerate()
    target = Path(out).expanduser().resolve()
    check_target(target)
    source = resolve(student)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = read_json(source / CONFIG)
    folder = target.with_name(target.name + ".partial")
    _claim(folder, _fingerprint(config, windows, examples, options), resume)
    stages = {}
    if windows is not None and options.steps:
        stages["distil"] = (options.steps, options.lr, windows)
    if examples and options.sft_steps:
        stages["sft"] = (options.sft_steps, options.sft_lr, examples)
    logs: list[dict[str, Any]] = []
    for name, (steps, lr, data) in stages.items():
        arguments = _arguments(folder / name, options, steps, lr, device)
        if name == "distil":
            trainer = Distiller(model, _teacher(teacher, model), arguments, data, options)
        else:
            trainer = Trainer(
                model, arguments, train_dataset=data, data_collator=collate(model.config)
            )
        logs += _train(trainer, folder / name, name, progress)
        model = trainer.model
    _publish(model, source, config, folder, target, logs, options)
    firsts, lasts = zip(*(_ends(logs, name) for name in ("distil", "sft")))
    return HealReport(
        steps=options.steps if "distil" in stages else 0,
        sft_steps=options.sft_steps if "sft" in stages else 0,
        loss=lasts[0],
        loss_first=firsts[0],
        sft_loss=lasts[1],
        sft_loss_first=firsts[1],
        tokens=0 if windows is None else options.steps * options.batch * windows.shape[1],
        seconds=time.perf_counter() - started,
        losses=logs,
    )


class Distiller(Trainer):
    """Trains a model to predict as its teacher does.

    Args:
        windows: int64 [N, T], the text.
        options: their `on_policy` and `seed`.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        arguments: TrainingArguments,
        windows: Tensor,
        options: HealOptions,
    ):
        data = [{"input_ids": ids} for ids in windows]
        super().__init__(model, arguments, train_dataset=data, data_collator=_stack)
        self.teacher = teacher.to(self.args.device)
        self.options = options

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, first = inputs["input_ids"], 0
        if self._own_text():
            first = ids.shape[1] // 2
            ids = self._continue(model, ids[:, :first], ids.shape[1])
        with torch.no_grad():
            taught = self.teacher(input_ids=ids, use_cache=False).logits
        out = model(input_ids=ids, use_cache=False)
        loss = forward_kl(taught[:, first:], out.logits[:, first:])
        return (loss, out) if return_outputs else loss

    def _own_text(self) -> bool:
        """Whether this step is on-policy: a draw that depends on seed and step alone."""
        if not self.options.on_policy:
            return False
        g = torch.Generator().manual_seed(1000003 * self.options.seed + self.state.global_step)
        return torch.rand((), generator=g).item() < self.options.on_policy

    def _continue(self, model, prompts: Tensor, length: int) -> Tensor:
        """`prompts` with what the student samples after them, `length` tokens in all."""
        plain = self.accelerator.unwrap_model(model)
        plain.eval()
        ids = plain.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            min_new_tokens=length - prompts.shape[1],
            max_new_tokens=length - prompts.shape[1],
            pad_token_id=plain.config.eos_token_id if plain.config.pad_token_id is None else None,
        )
        plain.train()
        return ids


def forward_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student), in nats, from logits [..., V]; summed in fp32."""
    log_p = teacher_logits.float().log_softmax(-1)
    log_q = student_logits.float().log_softmax(-1)
    return nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack([r["input_ids"] for r in rows])}


def _teacher(name: str | None, student: nn.Module) -> nn.Module:
    """The frozen teacher, in the precision it is stored in."""
    if name is None:
        raise HealError("heal: distillation needs a teacher")
    teacher = AutoModelForCausalLM.from_pretrained(resolve(name), dtype="auto").eval()
    sizes = [m.config.get_text_config().vocab_size for m in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise HealError(
            f"heal: teacher {name}: expected the student's vocabulary of {sizes[1]} tokens, "
            f"got {sizes[0]}"
        )
    return teacher.requires_grad_(False)


def _arguments(
    folder: Path, options: HealOptions, steps: int, lr: float, device: str
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.batch,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(options.warmup * steps),
        weight_decay=options.weight_decay,
        bf16=True,
        seed=options.seed,
        logging_steps=max(1, steps // 100),
        save_steps=options.save_every,
        save_total_limit=1,
        use_cpu=device == "cpu",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device != "cpu",
    )


class _Tell(TrainerCallback):
    """Passes losses on, and stops at one that is not finite."""

    def __init__(self, stage: str, progress: Callable[[Progress], None] | None):
        self.stage, self.progress = stage, progress

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        loss = float(loss)
        if loss != loss or loss in (float("inf"), -float("inf")):
            raise HealError(
                f"heal: {self.stage}: step {state.global_step}: expected a finite loss, got "
                f"{loss}; a lower learning rate may help"
            )
        if self.progress is not None:
            self.progress(Progress(self.stage, state.global_step, state.max_steps, loss))


def _train(
    trainer: Trainer, folder: Path, stage: str, progress: Callable[[Progress], None] | None
) -> list[dict[str, Any]]:
    """Run a stage, or what is left of it; its logged losses."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Tell(stage, progress))
    last = get_last_checkpoint(str(folder)) if folder.exists() else None
    trainer.train(resume_from_checkpoint=last)
    if trainer.state.global_step % trainer.args.save_steps:  # so that a later stage can resume
        trainer._save_checkpoint(trainer.model, None)
    return [
        {"stage": stage, "step": r["step"], "loss": float(r["loss"]), "lr": r["learning_rate"]}
        for r in trainer.state.log_history
        if "loss" in r
    ]


def _ends(logs: list[dict[str, Any]], stage: str) -> tuple[float | None, float | None]:
    """First loss of a stage, and the mean of its last tenth."""
    losses = [r["loss"] for r in logs if r["stage"] == stage]
    if not losses:
        return None, None
    tail = losses[-max(1, len(losses) // 10) :]
    return losses[0], sum(tail) / len(tail)


def _claim(folder: Path, fingerprint: dict[str, Any], resume: bool) -> None:
    """Make the working folder, or take over the one of an interrupted run with equal inputs."""
    state = folder / STATE
    if folder.exists() and any(folder.iterdir()) and not state.exists():
        raise HealError(f"{folder}: expected a new folder or one of an interrupted run")
    if state.exists() and resume:
        before = read_json(state)
        for topic, now in fingerprint.items():
            if before.get(topic) != now:
                raise HealError(
                    f"{folder}: cannot resume: the interrupted run had another {topic}: expected "
                    f"{before.get(topic)}, got {now}"
                )
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    state.write_text(json.dumps(fingerprint))


def _fingerprint(
    config: dict[str, Any],
    windows: Tensor | None,
    examples: list[Example] | None,
    options: HealOptions,
) -> dict[str, Any]:
    text = hashlib.sha256(b"" if windows is None else windows.contiguous().numpy().tobytes())
    asked = hashlib.sha256(json.dumps(examples or []).encode())
    return {
        "options": dataclasses.asdict(options),
        "student": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "text": text.hexdigest(),
        "instructions": asked.hexdigest(),
    }


def _publish(
    model: nn.Module,
    source: Path,
    config: dict[str, Any],
    folder: Path,
    target: Path,
    logs: list[dict[str, Any]],
    options: HealOptions,
) -> None:
    """Write the checkpoint in the student's own precision, and rename it to `target`."""
    done = folder / "model"
    dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    if conversion := getattr(model.config, "conversion", None):
        before, ran = conversion.get("healed") or {}, {r["stage"] for r in logs}
        healed = {
            "steps": before.get("steps", 0) + options.steps * ("distil" in ran),
            "on_policy": options.on_policy if "distil" in ran else before.get("on_policy", 0.0),
            "sft_steps": before.get("sft_steps", 0) + options.sft_steps * ("sft" in ran),
        }
        model.config.conversion = {**conversion, "healed": healed}
    model.to("cpu", dtype).save_pretrained(done)
    for pattern in CARRIED:
        for file in source.glob(pattern):
            (done / file.relative_to(source)).parent.mkdir(exist_ok=True)
            if file.is_file():
                shutil.copyfile(file, done / file.relative_to(source))
    (done / LOSSES).write_text(json.dumps(logs, indent=1) + "\n")
    _plot(logs, done / PLOT)
    if target.exists():
        target.rmdir()  # empty, as check_target found
    os.replace(done, target)
    shutil.rmtree(folder, ignore_errors=True)


def _plot(logs: list[dict[str, Any]], file: Path) -> None:
    """Loss over steps, if matplotlib is there (it comes with tessella[heal])."""
    try:
        import matplotlib.figure
    except ImportError:
        return
    stages = sorted({r["stage"] for r in logs})
    figure = matplotlib.figure.Figure(figsize=(6 * max(1, len(stages)), 4), layout="constrained")
    for i, stage in enumerate(stages, 1):
        axes = figure.add_subplot(1, len(stages), i)
        rows = [r for r in logs if r["stage"] == stage]
        axes.plot([r["step"] for r in rows], [r["loss"] for r in rows])
        axes.set(title=stage, xlabel="step", ylabel="loss (nats a token)", yscale="log")
    figure.savefig(file, dpi=120)


def _require_accelerate() -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise HealError(
            "heal: transformers' Trainer needs accelerate, which is not installed: "
            "pip install 'tessella[heal]'"
        ) from None


def npu_available() -> bool:
    """Whether torch_npu is installed and finds a device."""
    from transformers.utils import is_torch_npu_available

    return is_torch_npu_available(check_device=True)
