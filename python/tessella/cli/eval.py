"""``tessella eval``: perplexity, and distance to a reference."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tessella.cli.loading import Device, DeviceOption, DType, load_model, throughput_dtype
from tessella.cli.session import CommandError, Debug, Json, session

if TYPE_CHECKING:
    from tessella.integrations.evaluate import EvalResult


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of a checkpoint, converted or not.")
    ],
    text: Annotated[
        Path, typer.Option(help='.txt (documents split by NUL), .jsonl (key "text"), or .xz.')
    ],
    ctx: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    ref: Annotated[
        str | None, typer.Option(help="Checkpoint to compare with; same tokenizer.")
    ] = None,
    limit_tokens: Annotated[
        int | None, typer.Option(min=1, help="Predict only the first so many tokens.")
    ] = None,
    device: DeviceOption = Device.cpu,
    dtype: Annotated[
        DType,
        typer.Option(
            help="Of activations and of weights that are not 4-bit; auto: as stored, or float32 "
            "on a CPU without 16-bit arithmetic."
        ),
    ] = DType.auto,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Perplexity over text; with --ref also KL divergence and top-1 agreement.

    Documents are cut into windows of --ctx tokens that share no text; a window
    starts from BOS if the model has one. Standard errors treat windows as
    independent samples.

    JSON: ppl, ppl_stderr, tokens, kl (nats a token), top1, windows, documents,
    ppl_ref, ppl_ref_stderr, ppl_ratio, ppl_ratio_stderr; null without --ref.

    \b
    Examples:
      tessella eval ./model --text eval.txt.xz
      tessella eval ./model-w4a8 --text eval.jsonl --ref ./model --json
      tessella eval ./model --text book.txt --ctx 2048 --limit-tokens 20000
    """
    with session(json=json, debug=debug) as s:
        from tessella.integrations.evaluate import perplexity
        from tessella.integrations.text import read_documents

        documents = read_documents(text)
        if dtype is DType.auto:
            dtype = throughput_dtype(device)
        lm, tokenizer = load_model(model, device, dtype)
        reference = None
        if ref is not None:
            reference, ref_tokenizer = load_model(ref, device, dtype)
            if ref_tokenizer.get_vocab() != tokenizer.get_vocab():
                raise CommandError(f"--ref {ref}: its tokenizer is not the one of {model}")
        with s.progress("tokens") as bar:
            task = bar.add_task("evaluating", total=None)
            result = perplexity(
                lm,
                tokenizer,
                documents,
                ctx=ctx,
                reference=reference,
                limit_tokens=limit_tokens,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        s.show(_table(result))
        s.answer(dataclasses.asdict(result))


def _table(r: EvalResult) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("perplexity", f"{r.ppl:.4f} ± {r.ppl_stderr:.4f}")
    table.add_row("tokens", f"{r.tokens:,} in {r.windows:,} windows, {r.documents:,} documents")
    if r.kl is not None:
        table.add_row("reference perplexity", f"{r.ppl_ref:.4f}")
        table.add_row("ratio", f"{r.ppl_ratio:.4f} ± {r.ppl_ratio_stderr:.4f}")
        table.add_row("KL(reference || model)", f"{r.kl:.5f} nats a token")
        table.add_row("top-1 agreement", f"{r.top1:.2%}")
    return table
