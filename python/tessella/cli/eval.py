"""``tessella eval``: perplexity, and distance to a reference."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tessella.cli.loading import Device, DeviceOption, DType, load_model, throughput_dtype
from tessella.cli.session import CommandError, Debug, Json, Session, session

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
    kv: Annotated[
        list[str] | None,
        typer.Option(
            help="Codec of the cache to read the text through: bf16, fp8, int8, kv4, kv4-hadamard, "
            "paper:kivi:4 ...; repeatable; none: no cache. Default: the checkpoint's."
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Results file that gets a record for each evaluation.")
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

    --kv reads the model's text (not the reference's) through a cache: each token
    attends to what the cache keeps. docs/formats.md lists the codecs.

    JSON: ppl, ppl_stderr, tokens, kl (nats a token), top1, windows, documents,
    ppl_ref, ppl_ref_stderr, ppl_ratio, ppl_ratio_stderr (null without --ref), kv,
    cache_bytes_per_token; with several --kv: caches, a list of such objects.

    \b
    Examples:
      tessella eval ./model --text eval.txt.xz
      tessella eval ./model-w4a8 --text eval.jsonl --ref ./model --json
      tessella eval ./model --text book.txt --ctx 2048 --limit-tokens 20000
      tessella eval ./model-w4a8 --text eval.txt --ref ./model-w4a8 --kv kv4 --kv kv2-kivi
    """
    with session(json=json, debug=debug) as s:
        from tessella.bench import accuracy
        from tessella.integrations.paged import checkpoint_codec
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
        names = [name or checkpoint_codec(lm) for name in kv or [None]]
        caches = [None if name in (None, "none") else _Cache(lm, name) for name in names]
        how = {"ctx": ctx, "reference": reference, "limit_tokens": limit_tokens, "memo": {}}
        results = []
        for cache in caches:
            answer = _measure(s, lm, tokenizer, documents, cache, how)
            if save is not None:
                accuracy.save(save, accuracy.record(model, lm, answer, ctx, text.name))
            results.append(answer)
        s.answer(results[0] if len(results) == 1 else {"caches": results})


def _measure(
    s: Session, lm, tokenizer, documents: list[str], cache: _Cache | None, how: dict[str, Any]
) -> dict[str, Any]:
    """One evaluation, shown; what --json prints of it. `how` goes to perplexity."""
    from tessella.integrations.evaluate import perplexity

    codec = None if cache is None else cache.codec
    with s.progress("tokens") as bar:
        task = bar.add_task(f"evaluating {codec or ''}", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        result = perplexity(lm, tokenizer, documents, progress=show, cache=cache, **how)
    nbytes = None if cache is None else cache.bytes_per_token
    s.show(_table(result, codec, nbytes))
    return {**dataclasses.asdict(result), "kv": codec, "cache_bytes_per_token": nbytes}


class _Cache:
    """Makes caches of one codec, and knows what a token takes in them."""

    def __init__(self, model, codec: str):
        from tessella.integrations import paged, published

        self._model, self.codec = model, codec
        self._simulated = codec.startswith(published.PREFIX)
        self._make = published.published_cache if self._simulated else paged.paged_cache
        self._last = self()  # refuses a codec that does not exist before any work

    def __call__(self):
        self._last = self._make(self._model, self.codec)
        return self._last

    @property
    def bytes_per_token(self) -> float | None:
        """In all layers, scales included; None for a simulated cache."""
        return None if self._simulated else self._last.bytes_per_token


def _table(r: EvalResult, codec: str | None, nbytes: float | None) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    if codec is not None:
        size = "" if nbytes is None else f", {nbytes:,.0f} bytes a token"
        table.add_row("cache", f"{codec}{size}")
    table.add_row("perplexity", f"{r.ppl:.4f} ± {r.ppl_stderr:.4f}")
    table.add_row("tokens", f"{r.tokens:,} in {r.windows:,} windows, {r.documents:,} documents")
    if r.kl is not None:
        table.add_row("reference perplexity", f"{r.ppl_ref:.4f}")
        table.add_row("ratio", f"{r.ppl_ratio:.4f} ± {r.ppl_ratio_stderr:.4f}")
        table.add_row("KL(reference || model)", f"{r.kl:.5f} nats a token")
        table.add_row("top-1 agreement", f"{r.top1:.2%}")
    return table
