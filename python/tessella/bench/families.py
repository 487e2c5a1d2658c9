"""The families that can be measured. Importing this imports no torch, so help is immediate."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tessella.bench import BenchError

if TYPE_CHECKING:
    from tessella.bench.suite import Family

FAMILIES: dict[str, str] = {
    "act_quant": "dynamic quantisation of activations, alone and after norms and gates",
    "w4ax_gemm": "4-bit linear layers, the kernel alone",
    "w4ax_chain": "the linear layers of a transformer block in a row, on a GPU",
    "msm": "attention over 16-bit pages",
    "kv4": "attention over coded pages",
    "mla": "attention over latents (MLA), absorbed",
    "e2e": "prefill and decode of a whole model with random weights",
}
"""Name and meaning of every family; the module of a family is ``tessella.bench.<name>``."""


def load(name: str, device: str) -> Family:
    """A family as it is measured on "cpu" or "cuda".

    ``tessella.bench.<name>_<device>`` serves a device whose cases are its own, else
    ``tessella.bench.<name>`` does; both have ``family(device)``, which may be None.

    Raises BenchError when the family has no cases for the device.
    """
    own = f"tessella.bench.{name}_{device}"
    family = import_module(own if find_spec(own) else f"tessella.bench.{name}").family(device)
    if family is None:
        raise BenchError(f"{name}: has no cases for {device}")
    return family
