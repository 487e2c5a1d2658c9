"""``tessella generate``: text from a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tessella.cli.loading import Device, DeviceOption, DType, DTypeOption, load_model
from tessella.cli.session import CommandError, Debug, Json, session

if TYPE_CHECKING:
    from tessella.integrations.generate import Generation


def generate(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of a checkpoint, converted or not.")
    ],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template.")] = False,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: the likeliest token each time; else sample.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample among tokens with this share of the probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    kv: Annotated[
        str | None,
        typer.Option(
            help="Codec of a paged cache: bf16, fp8, int8, kv4, kv4-hadamard ...; default: what "
            "the checkpoint was converted for, else plain tensors (none)."
        ),
    ] = None,
    speculate: Annotated[
        int,
        typer.Option(
            min=0,
            help="Draft up to so many tokens a step from what the text repeats, and verify them "
            "as a tree in one step; same text, fewer steps. Needs temperature 0.",
        ),
    ] = 0,
    device: DeviceOption = Device.cpu,
    dtype: DTypeOption = DType.auto,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt; text on stdout as it comes, speed on stderr.

    JSON: text, tokens (new ones), tok_s (after the first token),
    prompt_tokens, prefill_tok_s, steps (of the model, with --speculate; else null).

    \b
    Examples:
      tessella generate ./model-w4a8 --prompt "def fibonacci(n):"
      tessella generate ./model-w4a8 --chat --prompt "Why is the sky blue?" --temperature 0.7
      tessella generate ./model --kv kv4 --prompt "def main(" --max-new-tokens 200
      tessella generate ./model-w4a8kv4 --prompt "def main(" --speculate 16
      cat story.txt | tessella generate ./model-w4a8 --prompt - --json
    """
    if not 0 < top_p <= 1:
        raise typer.BadParameter(f"expected within (0, 1], got {top_p}", param_hint="--top-p")
    if speculate and temperature:
        raise typer.BadParameter("needs --temperature 0", param_hint="--speculate")
    with session(json=json, debug=debug) as s:
        text = _read_stdin() if prompt == "-" else prompt
        lm, tokenizer = load_model(model, device, dtype)
        from tessella.integrations.generate import generate as run

        result = run(
            lm,
            tokenizer,
            text,
            chat=chat,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            kv=kv,
            speculate=speculate,
            on_text=None if json else _print_piece,
        )
        if not json:
            print()
        s.note(_speed(result))
        keys = ("text", "tokens", "tok_s", "prompt_tokens", "prefill_tok_s", "steps")
        s.answer({key: getattr(result, key) for key in keys})


def _speed(result: Generation) -> str:
    """One line on what was generated and how fast."""
    steps = "" if result.steps is None else f" in {result.steps} steps"
    decode = "" if result.tok_s is None else f", then {result.tok_s:,.1f} tok/s"
    return (
        f"prompt {result.prompt_tokens} tokens at {result.prefill_tok_s:,.1f} tok/s; "
        f"{result.tokens} new tokens{steps}{decode}"
    )


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as e:
        raise CommandError(f"--prompt -: stdin is not UTF-8 text (byte {e.start})") from e


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)
