"""Declares an op: schema, reference stand-in, fake kernel and the no-gradient rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from tessella import _native

_library = torch.library.Library("tessella", "DEF")

SCHEMAS: dict[str, str] = {}
"""Every op this package declares: name -> schema, in order of declaration."""


def define(schema: str, *, ref: Callable, fake: Callable, differentiable: bool = False) -> None:
    """Declare ``tessella::<schema>``.

    `ref` serves every device that has no compiled kernel, with one warning per device; C++
    implementations of a device take precedence over it. `fake` gives result shapes for
    torch.compile. No op here has a gradient: asking for one raises RuntimeError. Set
    `differentiable` for ops that return nothing (out variants), which autograd never sees.
    """
    name = schema.split("(", 1)[0]
    SCHEMAS[name] = schema
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _library.define(schema, tags=tags)
    _library.impl(name, _stand_in(name, ref), "CompositeExplicitAutograd")
    torch.library.register_fake(f"tessella::{name}", fake, lib=_library)
    if not differentiable:
        torch.library.register_autograd(f"tessella::{name}", _no_gradient(name), lib=_library)


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


def _no_gradient(name: str) -> Callable:
    def backward(ctx, *grads):
        raise RuntimeError(f"tessella::{name} is for inference and has no gradient")

    return backward
