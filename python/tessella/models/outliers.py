"""Outliers on demand: a model that computes the same, with the activations of a large one.

Large models have a few fixed channels, below one in a hundred, whose normalised activations are 10
to 100 times as large as the others (COMET section 3; SmoothQuant section 3). Small models do not,
so what outliers do to a quantised model cannot be seen on them. Here a channel of the normalised
hidden state is made larger by its factor in the norm's weight, and the linears that read it get a
column smaller by the same::

    norm:      weight[c] *= factor        linears:   W[:, c] /= factor

which changes no result in exact arithmetic. The channels are the same in all layers, as in large
models.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessella.models import presets
from tessella.models.checkpoint import CONFIG, INDEX, Checkpoint
from tessella.models.errors import CheckpointError, ConversionError
from tessella.models.hub import CARRIED, resolve
from tessella.models.partial import Partial, check_target

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""The linears that read a norm of the same layer."""

NOTE = "tessella_outliers"
"""Field of config.json that says which outliers a model was given."""


@dataclass(frozen=True)
class Outliers:
    """Which channels become outliers, and how large.

    Args:
        fraction: of the hidden state's channels, above 0 and at most 1; at least one channel.
        factor: by which their normalised activations grow; a positive number.
        seed: of the choice of channels.

    Raises ValueError on values out of these ranges.
    """

    fraction: float = 0.01
    factor: float = 20.0
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"outliers: fraction: expected above 0 to 1, got {self.fraction}")
        if not 0 < self.factor < float("inf"):
            raise ValueError(f"outliers: factor: expected a positive number, got {self.factor}")

    def __str__(self) -> str:
        return f"{self.fraction:.2%} x{self.factor:g}"

    def channels(self, K: int) -> Tensor:
        """int64 [n]: the outliers among K channels, ascending."""
        n = max(1, round(self.fraction * K))
        g = torch.Generator().manual_seed(self.seed)
        return torch.randperm(K, generator=g)[:n].sort().values

    def norm(self, weight_K: Tensor) -> Tensor:
        """A norm's weight with its outliers, in the same dtype."""
        c = self.channels(weight_K.shape[0])
        out = weight_K.clone()
        out[c] = (weight_K[c].double() * self.factor).to(weight_K.dtype)
        return out

    def linear(self, w_NK: Tensor, norm_K: Tensor) -> Tensor:
        """The weight of a linear that reads a norm whose weight was `norm_K`, in the same dtype.

        Divided by the factor that the norm really got in its dtype, so that each changed weight is
        rounded once and nothing else is lost.
        """
        c = self.channels(w_NK.shape[1])
        before = norm_K[c].double()
        factor = torch.where(before == 0, 1.0, self.norm(norm_K)[c].double() / before)
        out = w_NK.clone()
        out[:, c] = (w_NK[:, c].double() / factor).to(w_NK.dtype)
        return out


def inject(
    tensors: dict[str, Tensor], config: dict[str, Any], outliers: Outliers
) -> dict[str, Tensor]:
    """A model's tensors by name (its state_dict), with outliers; those that change are copies.

    Args:
        config: what config.json holds: `architectures` (Llama, Mistral, Qwen2 or Qwen3) and
            `num_hidden_layers`.

    Raises CheckpointError on another architecture, KeyError on a missing tensor.
    """
    change = _changes(config, "config", outliers)
    return {name: change(name, t, tensors.__getitem__) for name, t in tensors.items()}


def convert(model: str | os.PathLike, out: str | os.PathLike, outliers: Outliers) -> dict[str, Any]:
    """Write a checkpoint that computes what `model` does, with outliers.

    Args:
        model: a folder or a hub id of a checkpoint in full precision.
        out: folder to create; it must not exist, or be empty.

    Returns:
        {"channels": their indices, "layers": number, "bytes": of all tensors}.

    Raises ConversionError as :func:`tessella.models.convert.convert` does.
    """
    target = Path(out).expanduser().resolve()
    check_target(target)
    try:
        source = Checkpoint.open(resolve(model))
        if source.config.get("quantization_config"):
            raise CheckpointError(
                f"{source.config_file}: quantization_config: expected a model in full precision"
            )
        change = _changes(source.config, source.config_file, outliers)
        config = {**source.config, NOTE: dataclasses.asdict(outliers)}
        _write(source, target, change, config)
    except CheckpointError as e:
        raise ConversionError(str(e)) from e
    channels = outliers.channels(source.config["hidden_size"]).tolist()
    layers = source.config["num_hidden_layers"]
    return {"channels": channels, "layers": layers, "bytes": source.nbytes}


def _changes(
    config: dict[str, Any], file: str, outliers: Outliers
) -> Callable[[str, Tensor, Callable[[str], Tensor]], Tensor]:
    """The function (name, tensor, read) -> tensor that is applied to every tensor."""
    arch = presets.architecture(config, file)
    layers = [arch.layer(i) for i in range(config["num_hidden_layers"])]
    norms = {f"{layer}.{norm}.weight" for layer in layers for norm in READERS}
    norm_of = {
        f"{layer}.{reader}.weight": f"{layer}.{norm}.weight"
        for layer in layers
        for norm, readers in READERS.items()
        for reader in readers
    }

    def change(name: str, t: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        if name in norms:
            return outliers.norm(t)
        return outliers.linear(t, read(norm_of[name])) if name in norm_of else t

    return change


def _write(source: Checkpoint, target: Path, change, config: dict[str, Any]) -> None:
    """The checkpoint file by file, under the names that the source has."""
    files: dict[str, list[str]] = {}
    for name, info in source.tensors.items():
        files.setdefault(info.file.name, []).append(name)
    with Partial(target, {"source": str(source.path)}, resume=False) as partial:
        for file, names in files.items():
            changed = {n: change(n, source.read(n), source.read).contiguous() for n in names}
            partial.write_shard(file, changed, {})
        partial.write_text(CONFIG, json.dumps(config, indent=2) + "\n")
        for pattern in (INDEX, *CARRIED):
            for path in sorted(source.path.glob(pattern)):
                if path.is_file():
                    partial.copy_file(path, str(path.relative_to(source.path)))
        partial.publish()
