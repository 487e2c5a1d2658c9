"""``tessella to-mla``: grouped-query attention to latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress
from rich.table import Table

from tessella.cli.loading import Device, DeviceOption, check_device
from tessella.cli.session import CommandError, Debug, Json, session

if TYPE_CHECKING:
    from tessella.mla.shape import Fold
    from tessella.models.to_mla import MLAReport, Step


class Criterion(str, Enum):
    """How folds are compared."""

    kl = "kl"
    ppl = "ppl"


def to_mla(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a Llama, Mistral or Qwen2.")],
    out: Annotated[Path, typer.Argument(help="Folder to create; must be new or empty.")],
    calib: Annotated[
        Path, typer.Option(help='Text for calibration: .txt (NUL), .jsonl (key "text"), or .xz.')
    ],
    rank: Annotated[int, typer.Option(min=1, help="Numbers in a token's latent.")] = 512,
    rope: Annotated[
        int | None, typer.Option(min=2, help="Width of the rope key; default: half a head.")
    ] = None,
    fold: Annotated[
        str,
        typer.Option(
            help="Frequencies treated as one: a number, one a layer (4,2,2), auto, adaptive, bands."
        ),
    ] = "bands",
    balance: Annotated[
        bool, typer.Option(help="Scale keys so that queries weigh their channels alike.")
    ] = True,
    hadamard: Annotated[
        bool, typer.Option("--hadamard", help="Rotate latents for caches of 4 and 8 bits.")
    ] = False,
    layer_ranks: Annotated[
        bool, typer.Option("--layer-ranks", help="A rank for each layer, --rank in the mean.")
    ] = False,
    criterion: Annotated[
        Criterion, typer.Option(help="Folds by divergence from the original, or by perplexity.")
    ] = Criterion.kl,
    calib_tokens: Annotated[int, typer.Option(min=1, help="Tokens of statistics.")] = 32768,
    select_tokens: Annotated[int, typer.Option(min=1, help="Tokens folds are tried on.")] = 16384,
    ctx: Annotated[
        int, typer.Option(min=8, help="Tokens in a window of them: as long as texts will be.")
    ] = 1024,
    device: DeviceOption = Device.cpu,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted conversion.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert grouped-query attention to multi-head latent attention (MLA).

    Keys lose RoPE but on --rope shared channels; keys and values become one
    latent of --rank numbers a token. Accuracy drops; `tessella heal` restores it.
    OUT loads with transformers once tessella is imported.

    JSON: folds (a number or bands for each layer), ranks, rope, ppl_before,
    ppl_after, kl (on the text of --select-tokens), bytes_per_token and
    bytes_per_token_gqa (16-bit), energy_kept, trials, seconds, peak_rss (bytes).

    \b
    Examples:
      tessella to-mla ./Llama-3-8B ./llama-mla --rank 512 --rope 64 --calib text.txt
      tessella to-mla ./model ./out --fold 4 --hadamard --calib text.txt.xz --json
    """
    with session(json=json, debug=debug) as s:
        from tessella.integrations.text import read_documents
        from tessella.integrations.tokens import load_tokenizer
        from tessella.integrations.windows import spread, token_windows
        from tessella.models import to_mla as conversion

        where, documents = check_device(device), read_documents(calib)
        tokenizer, head = load_tokenizer(model)
        options = conversion.Options(
            rank=rank,
            rope=rope or head // 2,
            fold=_fold(fold),
            balance=balance,
            hadamard=hadamard,
            layer_ranks=layer_ranks,
            criterion=criterion.value,
        )
        windows = token_windows(tokenizer, documents, ctx)
        counts = [max(1, n // ctx) for n in (calib_tokens, select_tokens)]
        texts = spread(windows, counts, f"calibration: {calib}")
        with s.progress() as bar:
            how = {"device": where, "resume": resume, "progress": _shown_on(bar)}
            report = conversion.to_mla(model, out, options, *texts, **how)
        s.show(_layers(report), _summary(report, out))
        s.answer(dataclasses.asdict(report))


def _shown_on(bar: Progress) -> Callable[[Step], None]:
    """A callback with a bar for each pass."""
    tasks: dict[str, int] = {}

    def show(step: Step) -> None:
        if step.stage not in tasks:
            tasks[step.stage] = bar.add_task(step.stage, total=step.total)
        bar.update(tasks[step.stage], completed=step.done)

    return show


def _fold(text: str) -> int | str | tuple[int, ...]:
    """The option's value: a number, numbers with commas, or a word."""
    if text.isdecimal():
        return int(text)
    if all(part.isdecimal() for part in text.split(",")):
        return tuple(int(part) for part in text.split(","))
    if text not in ("auto", "adaptive", "bands"):
        raise CommandError(f"--fold: expected a number, auto, adaptive or bands, got {text!r}")
    return text


def _layers(report: MLAReport) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "fold", "rank", "key energy with RoPE"):
        table.add_column(heading, justify="right")
    rows = zip(report.folds, report.ranks, report.energy_kept)
    for i, (fold, rank, energy) in enumerate(rows):
        table.add_row(str(i), _shown(fold), str(rank), f"{energy:.1%}")
    return table


def _shown(fold: Fold) -> str:
    return str(fold) if isinstance(fold, int) else "-".join(map(str, fold))


def _summary(report: MLAReport, out: Path) -> str:
    less = report.bytes_per_token_gqa / report.bytes_per_token
    return (
        f"perplexity on calibration text {report.ppl_before:.4f} -> {report.ppl_after:.4f}, "
        f"KL {report.kl:.4f}; a token takes {report.bytes_per_token:,} bytes in 16 bits, "
        f"{less:.2f} times less than before; {report.seconds:.1f} s: {out}"
    )
