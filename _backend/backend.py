"""In-tree PEP 517 backend: scikit-build-core, built against the torch that is already installed.

Thanks to the stable ABI the torch *version* built against does not matter, so a build never needs
to download a second torch. torch becomes a build requirement only where no headers are found.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403  (re-exports the hooks that need no change)


def _host_torch() -> str | None:
    """The installed torch package: $TESSELLA_TORCH_ROOT, else the site-packages of this Python.

    Under pip's build isolation sysconfig still points at the environment being installed into.
    """
    roots = [os.environ.get("TESSELLA_TORCH_ROOT")]
    roots += [os.path.join(sysconfig.get_path(k), "torch") for k in ("purelib", "platlib")]
    for root in filter(None, roots):
        if (Path(root) / "include/torch/csrc/stable/library.h").exists():
            return root
    return None


def _extra() -> list[str]:
    root = _host_torch()
    print(f"[tessella] torch headers: {root or 'none found, asking for torch'}", file=sys.stderr)
    return [] if root else ["torch>=2.11,<3"]


def _point_cmake_at_torch() -> None:
    if root := _host_torch():
        os.environ["TESSELLA_TORCH_ROOT"] = root


def get_requires_for_build_wheel(config_settings=None):
    return _build.get_requires_for_build_wheel(config_settings) + _extra()


def get_requires_for_build_editable(config_settings=None):
    return _build.get_requires_for_build_editable(config_settings) + _extra()


def build_wheel(*args, **kwargs):
    _point_cmake_at_torch()
    return _build.build_wheel(*args, **kwargs)


def build_editable(*args, **kwargs):
    _point_cmake_at_torch()
    return _build.build_editable(*args, **kwargs)
