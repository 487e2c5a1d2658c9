"""``tessella demo``: the bundled model, converted and compared with the original."""

from __future__ import annotations

import dataclasses
import os
import sysconfig
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tessella.cli.loading import Device, load_model, throughput_dtype
from tessella.cli.session import CommandError, Debug, Json, Session, session

if TYPE_CHECKING:
    from tessella.cli.measure import Bytes, Speed
    from tessella.integrations.evaluate import EvalResult

MODEL = Path(__file__).parents[1] / "data" / "pylm-6m"
RECIPE = "w4a8kv4-rtn"
BOS = "<|endoftext|>"
"""What every training document of the bundled model began with."""
PROMPT = 'def read_json(path):\n    """Read a JSON file."""\n    with open(path) as'

STDLIB_FILES = (
    "argparse.py",
    "base64.py",
    "calendar.py",
    "configparser.py",
    "csv.py",
    "fractions.py",
    "heapq.py",
    "json/decoder.py",
    "queue.py",
    "random.py",
    "shlex.py",
    "socketserver.py",
    "statistics.py",
    "tempfile.py",
    "textwrap.py",
    "traceback.py",
)
"""Modules that every supported Python has as a single source file."""

CTX = 1024
EXCERPT_CHARS = 4000
"""Of each file, from its start: about one window of tokens."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much the demo does."""

    eval_tokens: int
    cache_tokens: int
    """Of those, for the evaluation through the coded cache."""
    prompt_chars: int
    new_tokens: int
    rounds: int


COMPILED = Budget(eval_tokens=16384, cache_tokens=16384, prompt_chars=2000, new_tokens=48, rounds=3)
STAND_IN = Budget(eval_tokens=2048, cache_tokens=128, prompt_chars=400, new_tokens=12, rounds=1)
"""For reference implementations, which are some hundred times slower."""


def demo(
    keep: Annotated[
        Path | None, typer.Option(help="Keep the converted checkpoint in this new folder.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Python code to continue.")] = PROMPT,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a small bundled model to 4 bit, and show it beside the original.

    Needs no network. Measures perplexity on source text of the running
    Python's standard library, bytes of weights and cache, and speed, with
    4-bit weights and with a 4-bit cache as well; then the model with both
    continues a prompt.

    JSON: recipe, original, converted and cached (ppl, ppl_stderr, bytes,
    cache_bytes_per_token, prefill_tok_s, decode_tok_s), kernels (name: calls),
    completion, seconds.

    \b
    Examples:
      tessella demo
      tessella demo --keep ./pylm-w4a8 --prompt "class Stack:"
      tessella demo --json
    """
    # No messages of the profiler, and no bars of transformers inside ours.
    os.environ.update(KINETO_LOG_LEVEL="99", HF_HUB_DISABLE_PROGRESS_BARS="1")
    started = time.perf_counter()
    with session(json=json, debug=debug) as s:
        folder = nullcontext(str(keep)) if keep else tempfile.TemporaryDirectory(prefix="tessella-")
        with folder as name:
            converted = Path(name) if keep else Path(name) / "pylm-6m-w4a8kv4"
            answer = _run(s, converted, prompt)
        answer["seconds"] = time.perf_counter() - started
        s.note(f"{answer['seconds']:.0f} s" + (f"; converted model in {keep}" if keep else ""))
        s.answer(answer)


def _run(s: Session, converted: Path, prompt: str) -> dict[str, Any]:
    """Convert into `converted`, measure, show, and return what --json prints."""
    from tessella import _native
    from tessella.cli import measure
    from tessella.integrations.evaluate import perplexity
    from tessella.integrations.paged import paged_cache
    from tessella.models.convert import convert
    from tessella.models.linear import W4AxLinear
    from tessella.quant.recipe import PRESETS

    if not (MODEL / "config.json").exists():
        raise CommandError(f"{MODEL}: the bundled model is missing from this installation")
    budget = COMPILED if _native.HAS_OPS else STAND_IN
    docs = stdlib_excerpts()
    with s.progress() as bar:
        task = bar.add_task("converting", total=4)
        convert(str(MODEL), converted, PRESETS[RECIPE])
        dtype = throughput_dtype(Device.cpu)
        original, tokenizer = load_model(str(MODEL), Device.cpu, dtype)
        model, _ = load_model(str(converted), Device.cpu, dtype)
        linears = {n for n, m in model.named_modules() if isinstance(m, W4AxLinear)}
        bar.update(task, description="evaluating", advance=1)
        quality = perplexity(
            model, tokenizer, docs, ctx=CTX, reference=original, limit_tokens=budget.eval_tokens
        )
        cache = partial(paged_cache, model)
        through = perplexity(
            model,
            tokenizer,
            docs,
            ctx=min(CTX, budget.cache_tokens // 2),  # two windows, for a standard error
            reference=original,
            limit_tokens=budget.cache_tokens,
            cache=cache,
        )
        bar.update(task, description="tracing", advance=1)
        text = docs[0][: budget.prompt_chars]
        kernels = measure.kernels_run(model, tokenizer, text, new_tokens=4)
        bar.update(task, description="timing", advance=1)
        codec = cache().codec
        ways = [(original, "none"), (model, "none"), (model, codec.name)]
        speeds = measure.speeds(ways, tokenizer, text, budget.new_tokens, budget.rounds)
        bar.update(task, advance=1)
    sizes = [measure.weight_bytes(folder, linears) for folder in (MODEL, converted, converted)]
    caches = [_cache_bytes(model, name or codec.name) for name in ("bf16", "bf16", None)]
    computed_in = str(original.dtype).removeprefix("torch.")
    s.show(_comparison((quality, through), sizes, caches, speeds, computed_in))
    s.show(_kernel_table(kernels))
    if not _native.HAS_OPS:
        s.note("No compiled kernels here: the 4-bit speeds are those of the reference in fp64.")
    completion = _complete(s, model, tokenizer, prompt, budget.new_tokens)
    return {
        "recipe": RECIPE,
        "computed_in": computed_in,
        "tokens": quality.tokens,
        "original": _side(quality.ppl_ref, quality.ppl_ref_stderr, sizes[0], caches[0], speeds[0]),
        "converted": {
            **_side(quality.ppl, quality.ppl_stderr, sizes[1], caches[1], speeds[1]),
            **_distance(quality),
        },
        "cached": {
            "codec": codec.name,
            **_side(through.ppl, through.ppl_stderr, sizes[2], caches[2], speeds[2]),
            **_distance(through),
        },
        "kernels": kernels,
        "prompt": prompt,
        "completion": completion,
    }


def stdlib_excerpts() -> list[str]:
    """The starts of :data:`STDLIB_FILES`. Raises CommandError when there is no source here."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    found = [stdlib / name for name in STDLIB_FILES if (stdlib / name).is_file()]
    if not found:
        raise CommandError(f"{stdlib}: holds no source text of the standard library to evaluate on")
    return [path.read_text(encoding="utf-8")[:EXCERPT_CHARS] for path in found]


def _complete(s: Session, model, tokenizer, prompt: str, new_tokens: int) -> str:
    """Stream a completion by the 4-bit model after the prompt."""
    from tessella.integrations.generate import generate

    def show(text: str) -> None:
        if not s.json:
            print(text, end="", flush=True)

    s.show("\nThe 4-bit model continues a prompt:\n")
    show(prompt)
    result = generate(model, tokenizer, BOS + prompt, max_new_tokens=new_tokens, on_text=show)
    show("\n")
    return result.text


def _cache_bytes(model, codec: str) -> float:
    """Bytes of a token in a cache of this codec, all layers and scales included."""
    from tessella.integrations.paged import PAGE_SIZE
    from tessella.quant import kv

    c = model.config
    per_layer = kv.parse(codec).bytes_per_token(c.num_key_value_heads, c.head_dim, PAGE_SIZE)
    return c.num_hidden_layers * per_layer


def _distance(q: EvalResult) -> dict[str, Any]:
    return {"ppl_ratio": q.ppl_ratio, "kl": q.kl, "top1": q.top1}


def _side(ppl: float, stderr: float, size: Bytes, cache: float, speed: Speed) -> dict[str, Any]:
    return {
        "ppl": ppl,
        "ppl_stderr": stderr,
        "bytes": {**dataclasses.asdict(size), "total": size.total},
        "cache_bytes_per_token": cache,
        **dataclasses.asdict(speed),
    }


def _comparison(
    quality: tuple[EvalResult, EvalResult],
    sizes: list[Bytes],
    caches: list[float],
    speeds: list[Speed],
    dtype: str,
) -> Table:
    """The original, its conversion, and the conversion with a coded cache, side by side."""
    q, through = quality
    table = Table(
        title=f"pylm-6m and its {RECIPE} conversion",
        caption=f"perplexity on {q.tokens:,} tokens of the standard library ({through.tokens:,} "
        f"through the 4-bit cache); all compute in {dtype}, the linears of the others on 4-bit "
        "weights and 8-bit activations",
    )
    table.add_column("", no_wrap=True)
    for heading in ("original", "w4a8", RECIPE):
        table.add_column(heading, justify="right", no_wrap=True)

    def row(name: str, form: str, *values: float | None) -> None:
        table.add_row(name, *("" if v is None else form.format(v) for v in values))

    row("perplexity", "{:.3f}", q.ppl_ref, q.ppl, through.ppl)
    row("  standard error", "{:.3f}", q.ppl_ref_stderr, q.ppl_stderr, through.ppl_stderr)
    row("  over the original's", "{:.3f}", None, q.ppl_ratio, through.ppl_ratio)
    row("KL divergence, nats/token", "{:.4f}", None, q.kl, through.kl)
    row("same most likely token", "{:.1%}", None, q.top1, through.top1)
    table.add_section()
    for kind in ("total", "linears", "embeddings", "other"):
        name = "all weights" if kind == "total" else f"  {kind}"
        row(f"{name}, MB", "{:.3f}", *(getattr(size, kind) / 1e6 for size in sizes))
    row("cache, bytes/token", "{:,.0f}", *caches)
    table.add_section()
    for kind in ("prefill", "decode"):
        row(f"{kind}, tokens/s", "{:,.0f}", *(getattr(s, f"{kind}_tok_s") for s in speeds))
    return table


def _kernel_table(kernels: dict[str, int]) -> Table:
    table = Table(title="kernels that ran", caption="a profiler trace of one short generation")
    table.add_column("kernel", min_width=30)
    table.add_column("calls", justify="right")
    for name, calls in sorted(kernels.items()):
        table.add_row(name, str(calls))
    return table
