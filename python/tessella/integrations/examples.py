"""Instructions for supervised fine-tuning: JSON lines to token ids with labels.

A line is an object with ``"prompt"`` and ``"completion"``, with ``"messages"`` (for the
tokenizer's chat template; the last one is the completion), or with ``"text"``. Only completions
(or the whole text) are learned; an end token follows them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessella.integrations.text import TextError, read_lines

IGNORED = -100
"""Label of a token that is not learned, torch's."""

Example = dict[str, list[int]]
"""`input_ids` and `labels` of one example."""


def read_examples(path: str | Path, tokenizer: Any, ctx: int) -> list[Example]:
    """The examples of a .jsonl or .jsonl.xz file, each cut to `ctx` tokens.

    Raises TextError, naming the line: no JSON object of these forms, no chat template, nothing to
    learn within `ctx` tokens.
    """
    examples = []
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as e:
            raise TextError(f"{where}: not JSON: {e.msg} at column {e.colno}") from e
        prompt, completion = _split(record, tokenizer, where)
        ids = [_ids(tokenizer, t) for t in (prompt, completion)]
        if tokenizer.bos_token_id is not None and not prompt.startswith(tokenizer.bos_token):
            ids[0] = [tokenizer.bos_token_id, *ids[0]]
        ids[1] += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if len(ids[0]) >= ctx:
            raise TextError(
                f"{where}: expected a prompt shorter than {ctx} tokens, got {len(ids[0])}"
            )
        labels = [IGNORED] * len(ids[0]) + ids[1]
        examples.append({"input_ids": (ids[0] + ids[1])[:ctx], "labels": labels[:ctx]})
    return examples


def collate(config: Any) -> Callable[[list[Example]], dict[str, Tensor]]:
    """A function that pads examples on the right to one length: ids, mask and labels [B, S]."""
    pad = config.pad_token_id or 0

    def padded(rows: list[Example]) -> dict[str, Tensor]:
        S = max(len(r["input_ids"]) for r in rows)

        def fill(name: str, value: int) -> Tensor:
            return torch.tensor([r[name] + [value] * (S - len(r[name])) for r in rows])

        mask = [[1] * len(r["input_ids"]) + [0] * (S - len(r["input_ids"])) for r in rows]
        return {
            "input_ids": fill("input_ids", pad),
            "attention_mask": torch.tensor(mask),
            "labels": fill("labels", IGNORED),
        }

    return padded


def _split(record: Any, tokenizer: Any, where: str) -> tuple[str, str]:
    """(prompt, completion) of a line."""
    if isinstance(record, dict):
        if all(isinstance(record.get(k), str) for k in ("prompt", "completion")):
            return record["prompt"], record["completion"]
        if isinstance(record.get("text"), str):
            return "", record["text"]
        if isinstance(messages := record.get("messages"), list) and len(messages) > 1:
            if not getattr(tokenizer, "chat_template", None):
                raise TextError(f"{where}: messages: this tokenizer has no chat template")
            prompt = tokenizer.apply_chat_template(
                messages[:-1], tokenize=False, add_generation_prompt=True
            )
            return prompt, str(messages[-1]["content"])
    got = f"keys {sorted(record)[:8]}" if isinstance(record, dict) else type(record).__name__
    raise TextError(
        f'{where}: expected strings "prompt" and "completion", or "text", or a list "messages"; '
        f"got {got}"
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
