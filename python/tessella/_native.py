"""Loads the compiled libraries, if this installation has them.

* ``_ops``: the kernels, on the LibTorch stable ABI; importing it registers them with torch.
* ``_C``: pybind11, no torch inside: build information, kernel lists, plans, layouts.

Without ``_ops`` the reference implementations stand in for every op, with one warning.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence

import torch  # the libraries link against torch's, which must be loaded first


class StandInWarning(UserWarning):
    """A reference implementation runs where a compiled kernel was expected."""


def _load(name: str):
    """Import a compiled submodule; (module, None), or (None, reason) when it cannot be had."""
    if os.environ.get("TESSELLA_DISABLE_NATIVE", "") not in ("", "0"):
        return None, "TESSELLA_DISABLE_NATIVE is set"
    try:
        return importlib.import_module(f"tessella.{name}"), None
    except ModuleNotFoundError as e:
        if e.name != f"tessella.{name}":
            raise
        return None, "not built for this interpreter"
    except ImportError as e:
        return None, str(e)


_ops, OPS_ERROR = _load("_ops")
_C, C_ERROR = _load("_C")

HAS_OPS = _ops is not None

if not HAS_OPS:
    warnings.warn(
        f"tessella: no compiled kernels ({OPS_ERROR}); slow reference implementations stand in. "
        "Reinstall with a C++ compiler at hand to build them.",
        StandInWarning,
        stacklevel=2,
    )


def refresh_env() -> None:
    """Read TESSELLA_FORCE, TESSELLA_CPU_ISA and TESSELLA_LOG again (the kernels cache them).

    Raises ValueError naming the valid values when one is unknown.
    """
    if _ops is not None and (error := _ops.refresh_env()):
        raise ValueError(error)


def empty_pages(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Uninitialised memory that will be streamed: on a CPU in huge pages where there are any.

    Behind pages of 4 KB a virtual machine reads at half its rate (csrc/cpu/pages.h).
    """
    t = torch.empty(shape, dtype=dtype, device=device)
    if t.device.type == "cpu" and _C is not None:
        _C.advise_huge_pages(t.data_ptr(), t.nbytes)
    return t
