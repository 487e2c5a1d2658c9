"""Decides which tensors of a checkpoint are copied, which become 4-bit, and in which shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tessella.formats import W4Weight
from tessella.models import presets
from tessella.models.checkpoint import Checkpoint, TensorInfo
from tessella.models.config import LayerFormat
from tessella.models.errors import CheckpointError
from tessella.quant.calibrate import SITES
from tessella.quant.recipe import Recipe

FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes that can be quantised."""


@dataclass(frozen=True)
class Linear:
    """A linear to quantise: module name, tensor its weight comes from, how it will be stored."""

    name: str
    source: str
    shape: tuple[int, int]  # N, K
    format: LayerFormat

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor that will store it."""
        spec = W4Weight.spec(self.format.scheme, *self.shape)
        if self.format.perm:
            spec["perm"] = (torch.int32, self.shape[1:])
        return {
            f"{self.name}.{field}": torch.Size(shape).numel() * dtype.itemsize
            for field, (dtype, shape) in spec.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes that will store it."""
        return sum(self.sizes.values())


@dataclass(frozen=True)
class Shard:
    """One file of the result: tensors to copy, and linears to quantise.

    `copied` has for each name the tensor of the source that it comes from; steps of a recipe may
    change it on the way. `layer` is the decoder layer's number, None outside of layers.
    """

    file: str
    copied: dict[str, TensorInfo]
    linears: list[Linear]
    layer: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each of its tensors."""
        sizes = {name: info.nbytes for name, info in self.copied.items()}
        for linear in self.linears:
            sizes.update(linear.sizes)
        return sizes

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(self.sizes.values())


def plan(source: Checkpoint, recipe: Recipe) -> list[Shard]:
    """The shards of the converted checkpoint: embedding and final norm, each layer, the head.

    Raises CheckpointError: an unsupported architecture, a model that is quantised already, a
    tensor that is missing or cannot be quantised, a recipe that fits no linear of the model.
    """
    arch, count = check_source(source)
    linears = list(_linears(source, arch, count, recipe))

    shard_of_layer = {arch.layer(i): i + 1 for i in range(count)}

    def shard_number(name: str) -> int:
        if name.startswith(f"{arch.head}."):
            return count + 1
        depth = arch.layer(0).count(".") + 1
        return shard_of_layer.get(".".join(name.split(".")[:depth]), 0)

    parts: list[tuple[dict[str, TensorInfo], list[Linear]]] = [({}, []) for _ in range(count + 2)]
    replaced = {f"{linear.name}.weight" for linear in linears}
    for name in sorted(source.tensors.keys() - replaced):
        parts[shard_number(name)][0][name] = source.tensors[name]
    if recipe.turns and is_tied(source) and not recipe.lm_head:
        # embedding and head change differently, so the head gets a weight of its own
        parts[count + 1][0][f"{arch.head}.weight"] = source.tensors[f"{arch.embedding}.weight"]
    for linear in linears:
        parts[shard_number(f"{linear.name}.")][1].append(linear)
    used = [i for i, part in enumerate(parts) if any(part)]
    return [
        Shard(
            f"model-{number:05d}-of-{len(used):05d}.safetensors",
            *parts[i],
            layer=i - 1 if 1 <= i <= count else None,
        )
        for number, i in enumerate(used, 1)
    ]


def check_source(source: Checkpoint) -> tuple[presets.Architecture, int]:
    """The architecture of a checkpoint in full precision, and how many layers it has.

    Raises CheckpointError: an unsupported architecture, a model that is quantised already, a
    tensor that is missing.
    """
    config, file = source.config, source.config_file
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise CheckpointError(
            f"{file}: quantization_config: expected a model in full precision, got {method!r}"
        )
    arch = presets.architecture(config, file)
    count = config.get("num_hidden_layers")
    if not isinstance(count, int) or count < 1:
        raise CheckpointError(f"{file}: num_hidden_layers: expected a number, got {count!r}")
    _require_tensors(source, arch, count)
    return arch, count


def is_tied(source: Checkpoint) -> bool:
    """Whether the head shares the embedding's weight."""
    return bool(source.config.get("tie_word_embeddings", False))


def _require_tensors(source: Checkpoint, arch: presets.Architecture, count: int) -> None:
    suffixes = arch.layer_tensors(source.config)
    source.require(f"{arch.layer(i)}.{suffix}" for i in range(count) for suffix in suffixes)
    source.require([f"{arch.embedding}.weight", f"{arch.final_norm}.weight"])
    if not is_tied(source):
        source.require([f"{arch.head}.weight"])


def _linears(
    source: Checkpoint, arch: presets.Architecture, count: int, recipe: Recipe
) -> Iterator[Linear]:
    """The linears that the recipe quantises, in the order of the model."""
    names = [f"{arch.layer(i)}.{part}" for i in range(count) for part in arch.linears]
    origin = {name: f"{name}.weight" for name in names}
    if recipe.lm_head:
        # a quantised head has a weight of its own, also where the embedding served as one
        tied = is_tied(source)
        origin[arch.head] = f"{arch.embedding if tied else arch.head}.weight"
    chosen = [name for name in origin if not recipe.skips(name)]
    for pattern in recipe.skip:
        if all(not Recipe("probe", skip=(pattern,)).skips(name) for name in origin):
            raise CheckpointError(
                f"recipe {recipe.name!r}: weights.skip: {pattern!r} matches no linear of the "
                f"model; expected names like {names[0]!r}"
            )
    if not chosen:
        raise CheckpointError(f"recipe {recipe.name!r}: weights.skip: leaves nothing to quantise")
    for name in chosen:
        info = source.tensors[origin[name]]
        if len(info.shape) != 2 or 0 in info.shape or info.dtype not in FLOATS:
            raise CheckpointError(
                f"{info.file}: tensor {origin[name]!r}: expected a matrix of "
                f"{', '.join(FLOATS)}, got {info.dtype} {info.shape}"
            )
        N, K = info.shape
        perm = any(name.endswith(f".{part}") for site in recipe.permutes for part in SITES[site])
        layer_format = LayerFormat(recipe.scheme, recipe.granularity, recipe.k8_of(K), perm)
        yield Linear(name, origin[name], (N, K), layer_format)
