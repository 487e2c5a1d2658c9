"""Run one compiled kernel instead of the planner's choice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tessella import _native


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set TESSELLA_<NAME> variables for a while and have the kernels read them."""
    names = {f"TESSELLA_{name}": value for name, value in variables.items()}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        _native.refresh_env()
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        _native.refresh_env()


def force(*kernels: str):
    """Context in which these kernels (one a family at most) run. ValueError on unknown names."""
    return environment(FORCE=",".join(kernels))


def runnable(family: str) -> list[str]:
    """The compiled CPU kernels of a family that this machine can run."""
    if _native._C is None:
        return []
    isas = set(_native._C.cpu_isa()["supported"])
    return [k for k in _native._C.kernels().get(family, []) if k.split(".")[1] in isas]


def gpu_kernels(family: str) -> list[str]:
    """The compiled GPU kernels of a family that this GPU can run; needs no module _C."""
    if not torch.cuda.is_available() or _native._ops is None:
        return []
    try:
        with force(f"{family}.?"):
            return []
    except ValueError as e:  # the message lists the kernels of this build
        names = str(e).split("one of ")[1].split(";")[0].split(", ")
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    own = [n.split(".") for n in names if n.startswith(f"{family}.sm")]
    # sm_90a code runs on that architecture only
    return [".".join(n) for n in own if n[1] == f"sm{arch}" or (n[1] == "sm80" and arch >= 80)]
