"""Declares an op: schema, reference stand-in, fake kernel and the no-gradient rule.

No op here has a gradient. A Python autograd kernel that says so would cost every call more than a
decode-sized op takes (12 us of 25 in a measurement), so the autograd keys fall through, which makes
results non-differentiable, and the public entries call :func:`refuse_gradient`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from tessella import _native

_library = torch.library.Library("tessella", "DEF")

SCHEMAS: dict[str, str] = {}
"""Every op this package declares for others: name -> schema, in order of declaration."""


def define(schema: str, *, ref: Callable, fake: Callable) -> None:
    """Declare ``tessella::<schema>``.

    `ref` serves every device that has no compiled kernel, with one warning per device; C++
    implementations of a device take precedence over it. `fake` gives result shapes for
    torch.compile. A name with a leading underscore is for this package's own measurements.
    """
    name = schema.split("(", 1)[0]
    if not name.startswith("_"):
        SCHEMAS[name] = schema
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _library.define(schema, tags=tags)
    _library.impl(name, _stand_in(name, ref), "CompositeExplicitAutograd")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"tessella::{name}", fake, lib=_library)


def refuse_gradient(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError if autograd would have to differentiate `op` with respect to a tensor."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"tessella::{op} is for inference and has no gradient: "
            "call it under torch.no_grad(), or detach its inputs"
        )


def _stand_in(name: str, ref: Callable) -> Callable:
    warned = set()

    def run(*args, **kwargs):
        device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
        if _native.HAS_OPS and device not in warned:
            warned.add(device)
            warnings.warn(
                f"tessella::{name}: this build has no {device} kernel; "
                "the slow reference implementation stands in",
                _native.StandInWarning,
                stacklevel=2,
            )
        return ref(*args, **kwargs)

    return run
