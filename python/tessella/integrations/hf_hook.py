"""Registers the checkpoint formats with transformers, without importing transformers.

Importing transformers takes seconds, so ``import tessella`` only leaves a note in the import
system: once something imports one of transformers' registries (every model does), our module that
belongs to it is imported and registers itself.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings

_REGISTRIES = {
    "transformers.quantizers.auto": "tessella.integrations.hf",
    "transformers.models.auto.configuration_auto": "tessella.integrations.mla_config",
}
"""Module of transformers that holds a registry, and ours that adds to it when imported."""


def install() -> None:
    """Register now with what is loaded of transformers, and with the rest as soon as it is."""
    watched = [name for name in _REGISTRIES if name not in sys.modules]
    for name in _REGISTRIES.keys() - set(watched):
        _register(name)
    if watched and not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher(watched))


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing itself; it makes a registry's loader register us after loading."""

    def __init__(self, watched: list[str]):
        self._watched = set(watched)

    def find_spec(self, fullname, path, target=None):
        if fullname not in self._watched:
            return None
        self._watched.remove(fullname)
        if not self._watched:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module) -> None:
            load(module)
            _register(fullname)

        spec.loader.exec_module = load_and_register
        return spec


def _register(registry: str) -> None:
    """Register; a transformers that does not fit must stay usable for everything else."""
    try:
        # It registers itself, also when this runs in the middle of its own import.
        importlib.import_module(_REGISTRIES[registry])
    except Exception as e:
        warnings.warn(
            f"tessella: its checkpoints cannot be loaded with this transformers: {e}",
            RuntimeWarning,
            stacklevel=2,
        )
