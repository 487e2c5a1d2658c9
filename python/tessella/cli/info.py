"""``tessella info``: what is installed, built and usable here."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from rich.table import Table
from rich.text import Text

from tessella.cli.session import Debug, Json, session

PACKAGES = ("transformers", "safetensors", "huggingface-hub", "tokenizers")
OPTIONAL = ("accelerate", "vllm", "lm-eval", "matplotlib")
DISPATCH_KEYS = ("CPU", "CUDA", "PrivateUse1")
"""Devices that an op may have a compiled kernel for (PrivateUse1: Ascend)."""


def info(json: Json = False, debug: Debug = False) -> None:
    """Versions, instruction sets, GPUs, and the kernels of this installation.

    JSON: tessella, torch, cpu_isa (null without compiled code), cuda, kernels
    (family: names), ops (name: devices with a compiled kernel), packages,
    optional (version, or null if not installed).

    \b
    Examples:
      tessella info
      tessella info --json
    """
    with session(json=json, debug=debug) as s:
        facts = collect()
        s.show(_table(facts))
        s.answer(facts)


def collect() -> dict[str, Any]:
    """Everything `tessella info` knows, as plain values."""
    import torch

    import tessella
    from tessella import _native
    from tessella.ops._register import SCHEMAS

    native = _native._C
    build = native.build_info() if native is not None else None
    return {
        "tessella": {
            "version": tessella.__version__,
            "python": platform.python_version(),
            "build": build,
            "kernels_missing_because": _native.OPS_ERROR,
            "build_info_missing_because": _native.C_ERROR,
        },
        "torch": {
            "version": torch.__version__,
            "cuda_version": torch.version.cuda,
            "threads": torch.get_num_threads(),
        },
        "cpu_isa": native.cpu_isa() if native is not None else None,
        "cuda": {
            "gpus": [_gpu(torch.cuda.get_device_properties(i)) for i in _gpu_range(torch)],
            "built": bool(build and build["cuda"]),
            "built_version": build["cuda_version"] if build else None,
            "built_archs": list(build["cuda_archs"]) if build else [],
        },
        "kernels": {k: list(v) for k, v in native.kernels().items()} if native else {},
        "ops": {op: _compiled_keys(op) for op in SCHEMAS},
        "packages": {name: _version(name) for name in PACKAGES},
        "optional": {name: _version(name) for name in OPTIONAL},
    }


def _gpu_range(torch) -> range:
    return range(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def _gpu(properties) -> dict[str, Any]:
    return {
        "name": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "memory_bytes": properties.total_memory,
    }


def _compiled_keys(op: str) -> list[str]:
    """Dispatch keys with a kernel of their own; the reference serves all others."""
    import torch

    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [key for key in DISPATCH_KEYS if has_kernel(f"tessella::{op}", key)]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _table(facts: dict[str, Any]) -> Table:
    own, torch, isa, cuda = (facts[k] for k in ("tessella", "torch", "cpu_isa", "cuda"))
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value))

    row("tessella", f"{own['version']}, Python {own['python']}{_build_words(own)}")
    row("torch", f"{torch['version']}, {torch['threads']} threads")
    if isa is not None:
        capped = f", capped by {isa['capped_by']}" if isa["capped_by"] else ""
        row("CPU", f"{isa['best']}{capped} (this CPU can: {', '.join(isa['supported'])})")
    gpus = [f"{g['name']} {g['arch']} {g['memory_bytes'] / 2**30:.0f} GiB" for g in cuda["gpus"]]
    row("GPUs", "\n".join(gpus) or "none")
    built = f"{cuda['built_version']}: {', '.join(cuda['built_archs'])}"
    row("built for CUDA", built if cuda["built"] else "no")
    for family, names in facts["kernels"].items():
        short = [name.removeprefix(f"{family}.") for name in names]
        row(f"kernels {family}", ", ".join(short) or "none")
    for op, keys in facts["ops"].items():
        row(f"op {op}", ", ".join(keys) or "reference only")
    for group in ("packages", "optional"):
        words = [f"{n} {v or '(not installed)'}" for n, v in facts[group].items()]
        row(group, ", ".join(words))
    return table


def _build_words(own: dict[str, Any]) -> str:
    build = own["build"]
    if own["kernels_missing_because"]:
        return f"; no compiled kernels: {own['kernels_missing_because']}"
    return f", built with {build['compiler']} from {build['git']}" if build else ""
