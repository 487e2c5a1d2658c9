"""Registers the checkpoint format with transformers, without importing transformers.

Importing transformers' quantizers takes seconds, so ``import tessella`` only leaves a note in
the import system: once something imports ``transformers.quantizers.auto`` (every model does),
:mod:`tessella.integrations.hf` is imported and registers itself.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings

_REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Register now if transformers' quantizers are loaded, otherwise as soon as they are."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing itself; it makes the registry's loader register us after loading."""

    def find_spec(self, fullname, path, target=None):
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module) -> None:
            load(module)
            _register()

        spec.loader.exec_module = load_and_register
        return spec


def _register() -> None:
    """Register; a transformers that does not fit must stay usable for everything else."""
    try:
        # It registers itself, also when this runs in the middle of its own import.
        importlib.import_module("tessella.integrations.hf")
    except Exception as e:
        warnings.warn(
            f"tessella: 4-bit checkpoints cannot be loaded with this transformers: {e}",
            RuntimeWarning,
            stacklevel=2,
        )
