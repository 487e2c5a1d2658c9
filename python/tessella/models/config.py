"""`quantization_config`, the part of a checkpoint's config.json that says how it is stored."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tessella._version import __version__
from tessella.formats import FORMAT_VERSION, GRANULARITIES, SCHEMES
from tessella.formats_kv import KV_VERSION
from tessella.models.errors import CheckpointError
from tessella.quant import kv
from tessella.quant.recipe import Recipe, RecipeError

QUANT_METHOD = "tessella"
"""`quant_method` of every checkpoint that this package writes."""


@dataclass(frozen=True)
class LayerFormat:
    """How one linear is stored and run: the arguments of W4AxLinear that tensors do not tell."""

    scheme: str
    granularity: str = "token"
    k8: int = -1
    perm: bool = False
    hadamard: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The JSON object; `hadamard`, which early readers do not know, only where it is true."""
        d = dataclasses.asdict(self)
        return d if self.hadamard else {k: v for k, v in d.items() if k != "hadamard"}


@dataclass(frozen=True)
class QuantizationConfig:
    """A parsed `quantization_config`: the recipe, and the format of each 4-bit linear by name."""

    recipe: Recipe
    layers: dict[str, LayerFormat]

    @property
    def cache(self) -> str | None:
        """Codec of the cache that the checkpoint is run with."""
        return self.recipe.cache

    def to_dict(self) -> dict[str, Any]:
        """The JSON object for config.json."""
        cache = {}
        if self.cache is not None:
            cache["cache"] = {"codec": self.cache, "version": KV_VERSION}
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "tessella_version": __version__,
            "recipe": self.recipe.to_dict(),
            **cache,
            "layers": {name: f.to_dict() for name, f in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, d: dict[str, Any], file: str) -> QuantizationConfig:
        """The inverse of :meth:`to_dict`; `file` is where `d` was read, for the messages.

        Raises CheckpointError: another quant_method, a newer format version, a recipe or a layer
        that is not valid.
        """
        where = f"{file}: quantization_config"
        if (method := d.get("quant_method")) != QUANT_METHOD:
            raise CheckpointError(
                f"{where}.quant_method: expected {QUANT_METHOD!r}, got {method!r}"
            )
        check_version(d, file)
        _check_cache(d.get("cache"), f"{where}.cache")
        try:
            recipe = Recipe.from_dict(d.get("recipe"))
        except RecipeError as e:
            raise CheckpointError(f"{where}: {e}") from None
        layers = d.get("layers")
        if not isinstance(layers, dict):
            raise CheckpointError(f"{where}.layers: expected an object, got {layers!r}")
        return cls(recipe, {n: _layer(f"{where}.layers.{n}", f) for n, f in layers.items()})


def check_version(d: dict[str, Any], file: str) -> None:
    """Refuse a `quantization_config` whose format this version cannot read (CheckpointError)."""
    version = d.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CheckpointError(
            f"{file}: quantization_config.format_version: expected a whole number from 1 to "
            f"{FORMAT_VERSION}, got {version!r}"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: quantization_config.format_version: expected at most {FORMAT_VERSION}, got "
            f"{version}: the checkpoint was written by a newer tessella "
            f"({d.get('tessella_version', 'unknown')}; this is {__version__})"
        )


def _check_cache(d: Any, where: str) -> None:
    """Refuse (CheckpointError) a cache whose codec or page version is not known here."""
    if d is None:
        return
    if not isinstance(d, dict) or d.keys() != {"codec", "version"}:
        raise CheckpointError(f"{where}: expected fields codec, version, got {d!r}")
    if d["version"] != KV_VERSION:
        raise CheckpointError(
            f"{where}.version: expected {KV_VERSION}, got {d['version']!r}: its pages are those of "
            "another version of tessella"
        )
    try:
        kv.parse(str(d["codec"]))
    except kv.CodecError as e:
        raise CheckpointError(f"{where}.codec: {e}") from None


def _layer(where: str, d: Any) -> LayerFormat:
    valid = [f.name for f in dataclasses.fields(LayerFormat)]
    if not isinstance(d, dict) or "scheme" not in d or not d.keys() <= set(valid):
        raise CheckpointError(f"{where}: expected fields {', '.join(valid)}, got {d!r}")
    f = LayerFormat(**d)
    if f.scheme not in SCHEMES or f.granularity not in GRANULARITIES:
        raise CheckpointError(
            f"{where}: expected a scheme of {', '.join(SCHEMES)} and a granularity of "
            f"{', '.join(GRANULARITIES)}, got {d!r}"
        )
    return f
