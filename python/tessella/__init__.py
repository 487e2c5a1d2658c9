"""tessella: 4-bit LLM inference kernels for PyTorch, and the layer that runs models on them.

``import tessella`` registers the ops under ``torch.ops.tessella`` and, when transformers is
installed, the checkpoint format with ``AutoModelForCausalLM.from_pretrained``.
"""

from tessella import _native, ops
from tessella._version import __version__
from tessella.formats import ActBlocks, PackedW4, W4Weight

__all__ = ["ActBlocks", "PackedW4", "W4Weight", "__version__", "ops"]


def _register_integrations() -> None:
    """Hook into transformers if it is installed; its import is deferred until it is used."""
    import importlib.util

    if importlib.util.find_spec("transformers"):
        from tessella.integrations import hf_hook

        hf_hook.install()
