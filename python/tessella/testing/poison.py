"""Memory that must not be read or written, made noticeable."""

from __future__ import annotations

import torch
from torch import Tensor

_MARGIN = 256  # elements on either side


def poison_value(dtype: torch.dtype) -> float | int:
    """A value that spoils any result it enters: NaN, or an integer far from any real one."""
    if dtype.is_floating_point:
        return float("nan")
    return {torch.uint8: 0xEE, torch.int8: -113}.get(dtype, -(2**30))


def guarded(t: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of `t` with poison before and after it, and the memory around it.

    Pass the pair to :func:`assert_untouched` afterwards.
    """
    whole = torch.full(
        (t.numel() + 2 * _MARGIN,), poison_value(t.dtype), dtype=t.dtype, device=t.device
    )
    inner = whole[_MARGIN : _MARGIN + t.numel()].view(t.shape)
    inner.copy_(t)
    return inner, whole


def poisoned_output(like: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`guarded`, with the inside poisoned too: every element must be written."""
    return guarded(torch.full_like(like, poison_value(like.dtype)))


def assert_untouched(whole: Tensor) -> None:
    """Raise AssertionError if the poison around a guarded tensor was overwritten."""
    bad = poison_value(whole.dtype)
    for side in (whole[:_MARGIN], whole[-_MARGIN:]):
        same = torch.isnan(side) if whole.dtype.is_floating_point else side == bad
        assert bool(same.all()), "memory outside the tensor was written"
