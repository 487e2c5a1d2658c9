"""``tessella plan serving``: how many sequences fit, with which cache."""

from __future__ import annotations

import dataclasses
import json as jsonlib
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tessella.cli.session import CommandError, Debug, Json, session


class Weights(str, Enum):
    """How weights are stored."""

    bf16 = "bf16"
    w8a8 = "w8a8"
    w4a8 = "w4a8"


def serving(
    model: Annotated[str, typer.Argument(help="A named shape, a checkpoint folder or a hub id.")],
    memory: Annotated[float, typer.Option(min=0, help="GB of the device.")] = 0.0,
    prompt: Annotated[int, typer.Option("--in", min=1, help="Tokens of a prompt.")] = 1024,
    answer: Annotated[int, typer.Option("--out", min=1, help="Tokens of an answer.")] = 1024,
    weights: Annotated[Weights, typer.Option(help="How weights are stored.")] = Weights.bf16,
    rank: Annotated[int, typer.Option(min=1, help="Latent rank of the conversion.")] = 512,
    rope: Annotated[int, typer.Option(min=0, help="Rope dim of the conversion.")] = 64,
    utilization: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the memory that may be used.")
    ] = 0.9,
    reserve: Annotated[float, typer.Option(min=0, help="GB for all but weights and cache.")] = 0.0,
    mla_extra: Annotated[float, typer.Option(min=0, help="GB more of that with latents.")] = 0.0,
    max_seqs: Annotated[int, typer.Option(min=0, help="The engine's limit; 0: none.")] = 0,
    base_sequences: Annotated[
        int, typer.Option(min=0, help="Instead of --memory: what fits in the first cache.")
    ] = 0,
    bandwidth: Annotated[float, typer.Option(min=0, help="GB/s that decode reads.")] = 0.0,
    price: Annotated[float, typer.Option(min=0, help="Of an hour of the machine.")] = 0.0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Bytes a token and concurrent sequences of every cache, before and after conversion.

    Keys and values in 16, 8 and 4 bits, and latents likewise. With --bandwidth also tokens a
    second at most (bound by reading weights and caches), and with --price the cost of a million.

    JSON: plan (rows: cache, bytes_per_token, weight_bytes, tokens, fit, sequences, limited_by,
    ratio, tok_s, cost), shape, setting.

    \b
    Examples:
      tessella plan serving qwen2.5-14b --memory 64
      tessella plan serving llama-3-8b --memory 141 --weights w4a8 --in 4096 --out 512
      tessella plan serving openpangu-7b --base-sequences 95 --max-seqs 256
      tessella plan serving ./model --memory 24 --bandwidth 900 --price 0.8 --json
    """
    with session(json=json, debug=debug) as s:
        from tessella.models import serving as arithmetic

        if not memory and not base_sequences:
            raise CommandError("plan serving: expected --memory GB, or --base-sequences")
        setting = arithmetic.Setting(
            memory * 1e9,
            prompt,
            answer,
            weights.value,
            (rank, rope),
            utilization,
            reserve * 1e9,
            mla_extra * 1e9,
            max_seqs,
            base_sequences,
            bandwidth * 1e9,
            price,
        )
        shape = _shape(model)
        try:
            rows = arithmetic.plan(shape, setting)
        except ValueError as e:
            raise CommandError(str(e)) from None
        s.show(_table(rows, setting))
        s.answer(
            {
                "plan": {"rows": [dataclasses.asdict(r) for r in rows]},
                "shape": dataclasses.asdict(shape),
                "setting": dataclasses.asdict(setting),
            }
        )


def _shape(model: str):
    from tessella.models import serving as arithmetic
    from tessella.models.hub import resolve

    if model in arithmetic.SHAPES:
        return arithmetic.SHAPES[model]
    if not Path(model).expanduser().exists() and "/" not in model:
        known = ", ".join(arithmetic.SHAPES)
        raise CommandError(f"{model}: expected a folder, a hub id or one of {known}")
    file = resolve(model) / "config.json"
    try:
        config = jsonlib.loads(file.read_text())
    except jsonlib.JSONDecodeError as e:
        raise CommandError(f"{file}: expected JSON: {e}") from None
    return arithmetic.Shape.of(config, str(file))


def _table(rows, setting) -> Table:
    table = Table(box=None, pad_edge=False)
    names = ["cache", "bytes/token", "weights GB", "tokens", "room for", "sequences", "ratio"]
    names += ["tok/s at most"] * bool(setting.bandwidth) + ["cost/M"] * bool(setting.price)
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i == 0 else "right")
    for r in rows:
        cells = [
            r.cache,
            f"{r.bytes_per_token:,.0f}",
            f"{r.weight_bytes / 1e9:,.2f}",
            f"{r.tokens:,}",
            f"{r.fit:,}",
            f"{r.sequences:,}",
            "" if r.ratio is None else f"{r.ratio:.2f}x",
        ]
        if setting.bandwidth:
            cells.append("" if r.tok_s is None else f"{r.tok_s:,.0f}")
        if setting.price:
            cells.append("" if r.cost is None else f"{r.cost:,.3f}")
        table.add_row(*cells)
    return table
