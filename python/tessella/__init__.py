"""tessella: 4-bit LLM inference kernels for PyTorch, and the layer that runs models on them.

``import tessella`` registers the ops under ``torch.ops.tessella`` and, when transformers is
installed, the checkpoint format with ``AutoModelForCausalLM.from_pretrained``. Only the
``tessella`` command defers that until it is needed, since its help must not wait for torch.
"""

import sys
from pathlib import PurePath

from tessella._version import __version__

__all__ = ["ActBlocks", "PackedW4", "W4Weight", "__version__", "ops"]


def _load() -> None:
    """Register everything, and define the public names."""
    global ActBlocks, PackedW4, W4Weight, ops
    import tessella.ops as ops
    from tessella.formats import ActBlocks, PackedW4, W4Weight

    _register_integrations()


def _register_integrations() -> None:
    """Hook into transformers if it is installed; its import is deferred until it is used."""
    import importlib.util

    if importlib.util.find_spec("transformers"):
        from tessella.integrations import hf_hook

        hf_hook.install()


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load()
    return globals()[name]


def _is_command() -> bool:
    """Whether this process was started as ``tessella`` or ``python -m tessella``."""
    if sys.argv[:1] == ["-m"]:
        return ("-m", "tessella") in zip(sys.orig_argv, sys.orig_argv[1:])
    return PurePath(*sys.argv[:1]).stem == "tessella"


if not _is_command():
    _load()
