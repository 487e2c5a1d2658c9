"""Cases of act_quant: activations of Llama-3-8B's linears, INT8 per token and per block.

The limit is memory: 2 bytes read and 1 written a channel, plus scales and sums. Rivals: torch's
own dynamic quantisation written with its ops (compiled where the device is a GPU), and a copy.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tessella import _native
from tessella.bench.suite import Case, Family, Prepared, Selection, Subject
from tessella.bench.timing import last_level_cache_bytes, rotations
from tessella.formats import BLOCK_K
from tessella.testing.cases import random_activations

QUICK_M = (1, 64)
M_VALUES = (1, 16, 64, 256, 1024, 4096, 8192)
MOST_CPU_M = 512
K_VALUES = (4096, 14336)
ACTS = {"int8": "token", "int8b128": "block"}
"""Record name and granularity of the formats."""
GPU_CACHE_BYTES = 60 << 20

_act_quant = torch.ops.tessella.act_quant.default


def torch_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a user would write with torch: per-token symmetric INT8."""
    s = x.abs().amax(1, keepdim=True).float().clamp(min=1e-8) / 127
    return torch.round(x.float() / s).clamp(-127, 127).to(torch.int8), s


def cases(device: str, quick: bool) -> list[Case]:
    """The cases of a run, in order."""
    most = MOST_CPU_M if device == "cpu" else max(M_VALUES)
    return [
        {"M": M, "K": K}
        for K in K_VALUES[: 1 if quick else None]
        for M in (QUICK_M if quick else M_VALUES)
        if most >= M
    ]


def prepare(device: str, case: Case, selection: Selection) -> Prepared:
    """Both formats of one shape."""
    M, K = case["M"], case["K"]
    cache = last_level_cache_bytes() if device == "cpu" else GPU_CACHE_BYTES
    n = rotations(M * K * 3, cache)
    generator = torch.Generator().manual_seed(0)
    xs = [random_activations(M, K, torch.bfloat16, generator).to(device) for _ in range(n)]
    compiled = torch.compile(torch_quant, dynamic=False) if device == "cuda" else torch_quant
    blocks = K // BLOCK_K
    kernel = "act_quant." + ("cuda" if device == "cuda" else _native._C.cpu_isa()["best"])
    subjects = [
        Subject(
            name=act,
            kernel=kernel,
            case={"act": act},
            call=lambda i, g=granularity: _act_quant(xs[i % n], -1, g, None),
            nbytes=M * (3 * K + 4 * blocks + 4 * (blocks if act == "int8b128" else 1)),
            macs=0,
        )
        for act, granularity in ACTS.items()
        if selection({"act": act})
    ]
    return Prepared(
        subjects,
        {
            _torch_name(device): lambda i: compiled(xs[i % n]),
            "copy": lambda i: xs[i % n].clone(),
        },
    )


def _torch_name(device: str) -> str:
    return "torch_compiled" if device == "cuda" else "torch"


def family(device: str) -> Family:
    """act_quant on "cpu" or "cuda"."""
    full = cases(device, quick=False)
    return Family(
        "act_quant",
        device,
        partial(cases, device),
        partial(prepare, device),
        {k: sorted({c[k] for c in full}) for k in ("M", "K")} | {"act": list(ACTS)},
        [*ACTS, _torch_name(device), "copy"],
    )
