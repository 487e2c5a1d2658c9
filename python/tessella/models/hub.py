"""Finds a checkpoint: a local folder, or an id on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tessella.models.errors import CheckpointError

CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files beside the weights that a converted checkpoint keeps."""

NEEDED = ("config.json", "model*.safetensors", "model.safetensors.index.json", *CARRIED)
"""Files that are downloaded from the hub."""


def resolve(model: str | os.PathLike) -> Path:
    """The folder of a checkpoint; a hub id ("owner/name") is downloaded into the hub's cache.

    Raises CheckpointError when there is no such folder and no such checkpoint on the hub.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(model)):
        raise CheckpointError(f"{model}: no such folder, and not a hub id (owner/name)")
    import huggingface_hub  # slow to import, and not needed for local folders

    try:
        return Path(huggingface_hub.snapshot_download(str(model), allow_patterns=list(NEEDED)))
    except Exception as e:  # the client raises errors of several libraries
        reason = str(e).strip().split("\n")[0] or type(e).__name__
        raise CheckpointError(
            f"{model}: no such folder, and it cannot be had from the hub: {reason}"
        ) from e
