"""Cases of act_quant: activations of Llama-3-8B's linears, INT8 per token and per block.

The limit is memory: 2 bytes read and 1 written a channel, plus scales and sums. Baselines: torch's
own dynamic quantisation written with its ops, compiled where the device is a GPU, and a plain copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tessella.bench import ceilings
from tessella.bench.records import Record
from tessella.bench.timing import last_level_cache_bytes, rotations, time_cpu, time_cuda

QUICK_M = (1, 64)
M_VALUES = (1, 16, 64, 256, 1024, 4096, 8192)
K_VALUES = (4096, 14336)


def torch_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a user would write with torch: per-token symmetric INT8."""
    s = x.abs().amax(1, keepdim=True).float().clamp(min=1e-8) / 127
    return torch.round(x.float() / s).clamp(-127, 127).to(torch.int8), s


def cases(device: str, quick: bool) -> Iterator[dict]:
    """The cases of a run, in order."""
    most = 512 if device == "cpu" else 8192
    for K in K_VALUES[: 1 if quick else None]:
        for M in QUICK_M if quick else M_VALUES:
            for act in ("int8", "int8b128"):
                if M <= most:
                    yield {"M": M, "K": K, "act": act}


def run(device: str, *, quick: bool = False, threads: int = 1) -> Iterator[Record]:
    """Measure every case; yields records as they are done."""
    limits = ceilings.measure(device, threads)
    op = torch.ops.tessella.act_quant
    cache = last_level_cache_bytes() if device == "cpu" else 60 << 20
    for case in cases(device, quick):
        M, K = case["M"], case["K"]
        torch._dynamo.reset()  # or the compiler gives up specialising after eight shapes
        compiled = torch.compile(torch_quant, dynamic=False) if device == "cuda" else torch_quant
        granularity = "block" if case["act"] == "int8b128" else "token"
        n = rotations(M * K * 3, cache)
        xs = [torch.randn(M, K, device=device).bfloat16() for _ in range(n)]
        variants = {
            "tessella": lambda i, xs=xs, g=granularity, n=n: op(xs[i % n], -1, g, None),
            "torch_compiled" if device == "cuda" else "torch": lambda i, xs=xs, n=n, compiled=compiled: compiled(
                xs[i % n]
            ),
            "copy": lambda i, xs=xs, n=n: xs[i % n].clone(),
        }
        timer = time_cuda if device == "cuda" else time_cpu
        times = timer(variants)
        blocks = K // 128
        moved = M * (3 * K + 4 * blocks + 4 * (blocks if granularity == "block" else 1))
        ours = times.pop("tessella")
        if device == "cpu":
            case |= {"threads": threads, "isa": limits.isa}
        kernel = "act_quant." + ("cuda" if device == "cuda" else limits.isa)
        yield Record(
            "act_quant",
            kernel,
            case,
            ours.us,
            moved / limits.read_bytes_per_us,
            {name: t.us for name, t in times.items()},
            {"best_us": round(ours.best_us, 3), "gbs": round(moved / ours.us / 1e3, 1)},
            ours.spread,
        )
