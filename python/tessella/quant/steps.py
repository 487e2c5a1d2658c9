"""What a step of a recipe is, and the two that make codes: ``rtn`` and ``gptq``.

Steps change a decoder layer one after the other, each without changing what it computes
(:mod:`tessella.quant.layer`); the last one makes the codes. A step is a frozen dataclass whose
fields are its options. Its `stage` says where it may stand: stages never go down in a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tessella.formats import W4Weight
from tessella.quant import gptq, rtn
from tessella.quant.calibrate import Stats
from tessella.quant.grid import FORMS
from tessella.quant.layer import Layer

STATS, HESSIAN = frozenset({"stats"}), frozenset({"stats", "hessian"})
"""What a step may need of a calibration: statistics, and Hessians among them."""

ROTATE, SCALE, PERMUTE, CODES = range(4)
"""Stages: of the residual stream, of channels, of their order and precision, of the weights."""


class RecipeError(ValueError):
    """A recipe that does not exist or does not make sense; the message is for the user."""


class Step:
    """One step of a recipe; the defaults here do nothing and need nothing."""

    stage: ClassVar[int] = SCALE
    mixed: ClassVar[bool] = False
    """Whether it gives some channels INT8 and others INT4 activations."""

    @property
    def needs(self) -> frozenset[str]:
        """What it needs of a calibration: empty, :data:`STATS` or :data:`HESSIAN`."""
        return frozenset()

    @property
    def permutes(self) -> tuple[str, ...]:
        """Sites whose activations are permuted at run time from then on."""
        return ()

    @property
    def turns(self) -> bool:
        """Whether it changes the residual stream, so that embedding and head must follow."""
        return False

    def check(self, scheme: str) -> None:
        """Raise RecipeError unless it can be done for this weight scheme."""

    def change(self, layer: Layer) -> None:
        """Change a layer, its statistics along with it; what it computes stays."""

    def change_outer(self, role: str, rows: Tensor, gain_K: Tensor) -> Tensor:
        """The same for rows [n, K] of "embedding" or "head", and for the "norm" before the head.

        `gain_K` is the gain of that norm as it was.
        """
        return rows


def expect_one_of(where: str, value: Any, valid) -> None:
    """Raise RecipeError unless `value` is one of these strings."""
    if not isinstance(value, str) or value not in valid:
        raise RecipeError(f"recipe: {where}: expected one of {', '.join(valid)}, got {value!r}")


def expect_number(where: str, value: Any, lo: float, hi: float) -> None:
    """Raise RecipeError unless `value` is a number in lo..hi."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not lo <= value <= hi:
        raise RecipeError(f"recipe: {where}: expected a number in {lo:g}..{hi:g}, got {value!r}")


def expect_bool(where: str, value: Any) -> None:
    """Raise RecipeError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise RecipeError(f"recipe: {where}: expected true or false, got {value!r}")


@dataclass(frozen=True)
class Rtn(Step):
    """Makes the codes by rounding to nearest (:mod:`tessella.quant.rtn`)."""

    clip: str = "mse"
    stage: ClassVar[int] = CODES

    def __post_init__(self):
        expect_one_of("steps.rtn.clip", self.clip, rtn.CLIPS)

    @property
    def needs(self) -> frozenset[str]:
        return HESSIAN if self.clip == "output" else frozenset()

    def quantize(self, w_NK: Tensor, scheme: str, stats: Stats | None = None) -> W4Weight:
        """[N, K] floats -> codes. Raises ValueError on weights that cannot be quantised."""
        hessian = stats.hessian if stats is not None and self.clip == "output" else None
        return rtn.quantize(w_NK, scheme, self.clip, hessian)


@dataclass(frozen=True)
class Gptq(Step):
    """Makes the codes with error feedback (:mod:`tessella.quant.gptq`)."""

    clip: str = "output"
    form: str = "direct"
    damping: float = 0.01
    act_order: bool = False
    stage: ClassVar[int] = CODES

    def __post_init__(self):
        expect_one_of("steps.gptq.clip", self.clip, rtn.CLIPS)
        expect_one_of("steps.gptq.form", self.form, FORMS)
        expect_number("steps.gptq.damping", self.damping, 1e-6, 1)
        expect_bool("steps.gptq.act_order", self.act_order)

    @property
    def needs(self) -> frozenset[str]:
        return HESSIAN

    def check(self, scheme: str) -> None:
        if self.form != "direct" and scheme != "twolevel":
            raise RecipeError(
                f"recipe: steps.gptq.form: {self.form!r} is a form of two-level scales: expected "
                f"weights.scheme 'twolevel', got {scheme!r}"
            )

    def quantize(self, w_NK: Tensor, scheme: str, stats: Stats | None = None) -> W4Weight:
        """[N, K] floats -> codes. Raises ValueError on weights that cannot be quantised."""
        if stats is None or stats.hessian is None:
            raise ValueError("gptq: expected the Hessian of calibrated inputs, got none")
        options = {k: getattr(self, k) for k in ("clip", "form", "damping", "act_order")}
        return gptq.quantize(w_NK, scheme, stats.hessian, **options)
