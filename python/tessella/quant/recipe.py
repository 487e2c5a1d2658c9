"""Recipes: what a conversion does to a model, as one frozen object with a name.

A recipe says which linears become 4-bit, in which weight scheme, what their activations are
quantised to at run time, and which steps are applied, in order. It is written as TOML and stored
in the checkpoint's config::

    name = "w4a8"

    [weights]
    scheme = "twolevel"         # channel, g32, g64, g128, twolevel
    lm_head = false             # quantise the output head too
    skip = []                   # linears that keep their precision, e.g. ["*.down_proj"]

    [activations]
    granularity = "token"       # token, class, block
    k8 = 1.0                    # fraction of the channels in INT8, the rest is INT4

    [cache]
    codec = "kv4-hadamard"      # of keys and values; without it they stay as computed

    [[steps]]
    use = "rtn"                 # round to nearest
    clip = "mse"                # mse, none; output with a calibration
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from torch import Tensor

from tessella.formats import GRANULARITIES, SCHEMES, W4Weight
from tessella.quant import kv
from tessella.quant.calibrate import Stats
from tessella.quant.fmpq import Fmpq
from tessella.quant.layer import Target
from tessella.quant.qoq import Reorder, Rotate, SmoothAttention, SmoothOutput
from tessella.quant.steps import CODES, Gptq, RecipeError, Rtn, Step, expect_one_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _fields(where: str, d: Any, valid: tuple[str, ...]) -> dict[str, Any]:
    """`d` if it is a table with valid fields only."""
    if not isinstance(d, dict):
        raise RecipeError(f"recipe: {where}: expected a table, got {d!r}")
    for field in d:
        if field not in valid:
            raise RecipeError(f"recipe: {where}: expected fields {', '.join(valid)}, got {field!r}")
    return d


def _check_codec(name: Any) -> None:
    try:
        kv.parse(name if isinstance(name, str) else "")
    except kv.CodecError as e:
        raise RecipeError(f"recipe: cache.codec: {e}") from None


STEPS: dict[str, type[Step]] = {
    "rotate": Rotate,
    "smooth_attention": SmoothAttention,
    "smooth_output": SmoothOutput,
    "reorder": Reorder,
    "fmpq": Fmpq,
    "rtn": Rtn,
    "gptq": Gptq,
}
"""Every step that a recipe can use (:mod:`tessella.quant.steps`), in an order that is possible."""

UNSUPPORTED = {
    "w4a16": "no kernel multiplies 4-bit weights by 16-bit activations; use 'w4a8' or 'w4a8-qoq', "
    "whose activations are INT8",
    "w8a8": "no format stores 8-bit weights; use 'w4a8' or 'w4a8-qoq', 4-bit weights with INT8 "
    "activations",
}
"""Recipes that users ask for by name and no kernel can honour yet, and why."""


def _check_steps(recipe: Recipe) -> None:
    """Raise RecipeError unless the steps can follow each other and fit the rest."""
    steps, names = recipe.steps, [_step_name(s) for s in recipe.steps]
    makers = [s.stage == CODES for s in steps]
    if not makers or not makers[-1] or any(makers[:-1]):
        raise RecipeError(
            "recipe: steps: expected exactly one step that makes the codes "
            f"({', '.join(n for n, s in STEPS.items() if s.stage == CODES)}), as the last one, "
            f"got {names}"
        )
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise RecipeError(f"recipe: steps: expected each step once, got {repeated[0]!r} twice")
    for (first, a), (second, b) in itertools.pairwise(zip(names, steps)):
        if a.stage > b.stage:
            raise RecipeError(
                f"recipe: steps: {second!r} cannot follow {first!r}: expected the order "
                f"{', '.join(n for n in STEPS if n in names)}"
            )
    for step in steps:
        step.check(recipe.scheme)
        if step.mixed and recipe.granularity == "token":
            raise RecipeError(
                "recipe: activations.granularity: 'token' has one scale per token and needs one "
                f"precision, but {_step_name(step)!r} mixes two; use 'class' or 'block'"
            )


def _options(step: Step) -> dict[str, Any]:
    """A step's options as plain values."""
    options = dataclasses.asdict(step)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


def _step_name(step: object) -> str:
    names = {cls: name for name, cls in STEPS.items()}
    return names.get(type(step), type(step).__name__)


@dataclass(frozen=True)
class Recipe:
    """What a conversion does; see the module's docstring for the fields and their meaning.

    Raises :class:`RecipeError` when a field has a value that is not possible.
    """

    name: str
    scheme: str = "twolevel"
    granularity: str = "token"
    k8: float = 1.0
    lm_head: bool = False
    skip: tuple[str, ...] = ()
    steps: tuple[Step, ...] = (Rtn(),)
    cache: str | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise RecipeError(f"recipe: name: expected a non-empty string, got {self.name!r}")
        expect_one_of("weights.scheme", self.scheme, SCHEMES)
        expect_one_of("activations.granularity", self.granularity, GRANULARITIES)
        if isinstance(self.k8, bool) or not isinstance(self.k8, int | float):
            raise RecipeError(f"recipe: activations.k8: expected a number, got {self.k8!r}")
        if not 0 <= self.k8 <= 1:
            raise RecipeError(f"recipe: activations.k8: expected 0..1, got {self.k8}")
        object.__setattr__(self, "k8", float(self.k8))
        if self.granularity == "token" and 0 < self.k8 < 1:
            raise RecipeError(
                "recipe: activations.granularity: 'token' has one scale per token and needs one "
                f"precision, got k8 = {self.k8}; use 'class' or 'block'"
            )
        if not isinstance(self.lm_head, bool):
            raise RecipeError(
                f"recipe: weights.lm_head: expected true or false, got {self.lm_head!r}"
            )
        if isinstance(self.skip, str) or not all(isinstance(s, str) for s in self.skip):
            raise RecipeError(
                f"recipe: weights.skip: expected a list of name patterns, got {self.skip!r}"
            )
        object.__setattr__(self, "skip", tuple(self.skip))
        if self.cache is not None:
            _check_codec(self.cache)
        object.__setattr__(self, "steps", tuple(self.steps))
        _check_steps(self)

    @property
    def needs(self) -> frozenset[str]:
        """What its steps need of a calibration; empty: no text is needed."""
        return frozenset().union(*(step.needs for step in self.steps))

    @property
    def permutes(self) -> frozenset[str]:
        """Sites whose activations are permuted at run time."""
        return frozenset().union(*(step.permutes for step in self.steps))

    @property
    def turns(self) -> bool:
        """Whether embedding and output head change too."""
        return any(step.turns for step in self.steps)

    @property
    def changes(self) -> tuple[Step, ...]:
        """The steps before the one that makes the codes."""
        return self.steps[:-1]

    @property
    def target(self) -> Target:
        """What is stored and run."""
        return Target(self.scheme, self.granularity, self.k8)

    def skips(self, module: str) -> bool:
        """Whether the linear of this module name keeps its precision."""
        return any(fnmatch.fnmatchcase(module, pattern) for pattern in self.skip)

    def k8_of(self, K: int) -> int:
        """INT8 channels of a linear with K in features, whole blocks of 128; -1 means all."""
        return self.target.k8_of(K)

    def quantize(self, w_NK: Tensor, stats: Stats | None = None) -> W4Weight:
        """One weight [N, K] through the step that makes the codes (ValueError: bad weights)."""
        return self.steps[-1].quantize(w_NK, self.scheme, stats)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values: what TOML and the checkpoint's config hold."""
        cache = {} if self.cache is None else {"cache": {"codec": self.cache}}
        return {
            "name": self.name,
            "weights": {"scheme": self.scheme, "lm_head": self.lm_head, "skip": list(self.skip)},
            "activations": {"granularity": self.granularity, "k8": self.k8},
            **cache,
            "steps": [{"use": _step_name(s), **_options(s)} for s in self.steps],
        }

    def to_toml(self) -> str:
        """TOML text; :meth:`from_toml` gives an equal recipe back."""
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Recipe:
        """The inverse of :meth:`to_dict`; absent fields take their defaults.

        Raises RecipeError on unknown fields, steps or values, listing the valid ones.
        """
        top = _fields("recipe", d, ("name", "weights", "activations", "cache", "steps"))
        if "name" not in top:
            raise RecipeError("recipe: name: expected a non-empty string, got nothing")
        weights = _fields("weights", top.get("weights", {}), ("scheme", "lm_head", "skip"))
        acts = _fields("activations", top.get("activations", {}), ("granularity", "k8"))
        kwargs = {"name": top["name"], **weights, **acts}
        if "cache" in top:
            kwargs["cache"] = _fields("cache", top["cache"], ("codec",)).get("codec")
        if "steps" in top:
            if not isinstance(top["steps"], list):
                raise RecipeError(f"recipe: steps: expected a list, got {top['steps']!r}")
            kwargs["steps"] = tuple(_step(s) for s in top["steps"])
        return cls(**kwargs)

    @classmethod
    def from_toml(cls, text: str) -> Recipe:
        """A recipe from TOML text. Raises RecipeError, also when the text is not TOML."""
        try:
            d = tomllib.loads(text)
        except tomllib.TOMLDecodeError as e:
            raise RecipeError(f"recipe: not valid TOML: {e}") from None
        return cls.from_dict(d)


QOQ = (Rotate(), SmoothOutput(), Reorder(), Gptq())
"""QoQ's steps for weights and activations; a 4-bit cache adds SmoothAttention."""

FMPQ = (Fmpq(hadamard=True), Gptq())
"""COMET's blocks; what COMET does not have are the smoothing, the rotation and the feedback."""

COMET = (Fmpq(smooth=0.0), Rtn(clip="output"))
"""The same as published: outliers in INT8, clipped weights."""

PRESETS: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe("w4a8"),
        Recipe("w4a8-g128", scheme="g128"),
        Recipe("w4a8-channel", scheme="channel"),
        Recipe("w4a8-b128", granularity="block"),
        Recipe("w4a4", granularity="block", k8=0.0),
        Recipe("w4a8kv4-rtn", cache=kv.DEFAULT),
        Recipe("w4a8-qoq", steps=QOQ),
        Recipe("w4a8kv4", steps=(QOQ[0], SmoothAttention(), *QOQ[1:]), cache="kv4"),
        Recipe("w4ax", granularity="block", steps=FMPQ),
        Recipe("w4ax-class", granularity="class", steps=FMPQ),
        Recipe("w4ax-comet", granularity="block", steps=COMET),
        Recipe("w4axkv4", granularity="block", steps=(SmoothAttention(), *FMPQ), cache=kv.DEFAULT),
    )
}
"""Recipes by name. ``w4a8`` (two-level scales, per-token INT8) is what the kernels favour."""


def load(name_or_path: str | os.PathLike) -> Recipe:
    """A preset by its name, or a recipe from a TOML file.

    Raises RecipeError: no such preset or file (listing the presets), or a file that is not a
    valid recipe (naming the file).
    """
    if str(name_or_path) in PRESETS:
        return PRESETS[str(name_or_path)]
    if reason := UNSUPPORTED.get(str(name_or_path)):
        raise RecipeError(f"recipe: {str(name_or_path)!r}: {reason}")
    path = Path(name_or_path)
    if path.suffix != ".toml" and not path.is_file():
        raise RecipeError(
            f"recipe: expected one of {', '.join(PRESETS)} or a TOML file, got {str(path)!r}"
        )
    try:
        return Recipe.from_toml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise RecipeError(f"recipe: cannot read {path}: {e}") from None
    except RecipeError as e:
        raise RecipeError(f"{path}: {e}") from None


def _step(d: Any) -> Any:
    """One entry of `steps` as its dataclass."""
    use = d.get("use") if isinstance(d, dict) else None
    expect_one_of("steps.use", use, STEPS)
    cls = STEPS[use]
    options = _fields(f"steps.{use}", d, ("use", *(f.name for f in dataclasses.fields(cls))))
    return cls(**{k: v for k, v in options.items() if k != "use"})
