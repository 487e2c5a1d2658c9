"""A checkpoint's tokenizer, without its model."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from tessella.models.checkpoint import CONFIG, read_json
from tessella.models.errors import CheckpointError
from tessella.models.hub import resolve


def load_tokenizer(model: str) -> tuple[Any, int]:
    """(tokenizer, width of the model's heads) of a folder or hub id.

    Raises CheckpointError when it has no tokenizer, or a config without heads.
    """
    folder = resolve(model)
    config = read_json(folder / CONFIG)
    try:
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    except KeyError as e:
        raise CheckpointError(f"{folder / CONFIG}: {e.args[0]}: expected a number, got none") from e
    try:
        return AutoTokenizer.from_pretrained(folder), head
    except (OSError, ValueError, KeyError) as e:
        raise CheckpointError(f"{folder}: transformers finds no tokenizer: {e}") from e
