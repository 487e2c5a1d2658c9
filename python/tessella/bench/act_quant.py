"""Cases of act_quant and its fused producers: activations of Llama-3-8B's linears, INT8.

The limit is memory: 2 bytes read an operand and 1 written a channel (and 2 for the residual sum
behind a norm), plus scales and sums. Rivals: the same written with torch's ops (compiled where
the device is a GPU), and a copy of the first operand. On a GPU calls follow each other with
programmatic launch, as they follow a model's products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tessella import _native
from tessella.bench.suite import Case, Family, Prepared, Selection, Subject
from tessella.bench.timing import Call, inner_calls, last_level_cache_bytes, rotations
from tessella.formats import BLOCK_K
from tessella.ops.act_quant import empty_blocks
from tessella.testing.cases import random_activations

QUICK_M = (1, 64)
M_VALUES = (1, 16, 64, 256, 1024, 4096, 8192)
MOST_CPU_M = 512
OPS = {
    "act_quant": (4096, 14336),
    "rms_norm_quant": (4096, 8192),
    "silu_mul_quant": (14336,),
}
"""The ops and their numbers of channels. The norm has a residual and stores the sum, not its
result, as between the layers of a model."""
ACTS = {"int8": "token", "int8b128": "block"}
"""Record name and granularity of the formats."""
GPU_CACHE_BYTES = 60 << 20
EPS = 1e-5

_tessella = torch.ops.tessella


def torch_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a user would write with torch: per-token symmetric INT8."""
    s = x.abs().amax(1, keepdim=True).float().clamp(min=1e-8) / 127
    return torch.round(x.float() / s).clamp(-127, 127).to(torch.int8), s


def torch_rms_norm_quant(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Residual sum, RMS norm and quantisation with torch's ops."""
    h = x + residual
    f = h.float()
    f = f * torch.rsqrt(f.square().mean(1, keepdim=True) + EPS)
    return *torch_quant(weight * f.to(x.dtype)), h


def torch_silu_mul_quant(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up, quantised, with torch's ops."""
    return torch_quant(torch.nn.functional.silu(gate) * up)


def cases(device: str, quick: bool) -> list[Case]:
    """The cases of a run, in order."""
    most = MOST_CPU_M if device == "cpu" else max(M_VALUES)
    return [
        {"op": op, "M": M, "K": K}
        for op, ks in OPS.items()
        for K in ks[: 1 if quick else None]
        for M in (QUICK_M if quick else M_VALUES)
        if most >= M
    ]


class _Buffers:
    """Operands and results of a case, as many as no cache holds."""

    def __init__(self, device: str, op: str, M: int, K: int):
        self.op, self.M, self.K = op, M, K
        cache = last_level_cache_bytes() if device == "cpu" else GPU_CACHE_BYTES
        self.n = n = rotations(self.bytes(), cache)
        generator = torch.Generator().manual_seed(0)

        def make() -> list[Tensor]:
            first = random_activations(M, K, torch.bfloat16, generator).to(device)
            return [first, *(first.roll(i + 1, 0 if M > 1 else 1) for i in range(n - 1))]

        self.xs = make()
        self.others = self.xs if op == "act_quant" else make()
        self.weight = torch.ones(K, dtype=torch.bfloat16, device=device)
        self.hs = [torch.empty_like(x) for x in self.xs] if op == "rms_norm_quant" else []
        self.blocks = {
            g: [empty_blocks(x, -1, g) for x in self.xs] for g in dict.fromkeys(ACTS.values())
        }

    def bytes(self) -> int:
        """Codes, operands and the residual sum of one call."""
        return self.M * self.K * {"act_quant": 3, "silu_mul_quant": 5, "rms_norm_quant": 7}[self.op]

    def ours(self, granularity: str) -> Call:
        """The op into buffers."""
        how, blocks = (-1, granularity, None), self.blocks[granularity]

        def norm(i: int) -> None:
            i %= self.n
            of = self.xs[i], self.weight, EPS, self.others[i]
            _tessella.rms_norm_quant_out(*of, *how, *blocks[i], None, self.hs[i])

        def gate(i: int) -> None:
            i %= self.n
            _tessella.silu_mul_quant_out(self.xs[i], self.others[i], *how, *blocks[i])

        def plain(i: int) -> None:
            _tessella.act_quant_out(self.xs[i % self.n], *how, *blocks[i % self.n])

        return {"rms_norm_quant": norm, "silu_mul_quant": gate, "act_quant": plain}[self.op]

    def rival(self, wrap: Callable[[Callable], Callable]) -> Call:
        """The same in torch's ops."""
        if self.op == "rms_norm_quant":
            f = wrap(torch_rms_norm_quant)
            return lambda i: f(self.xs[i % self.n], self.others[i % self.n], self.weight)
        if self.op == "silu_mul_quant":
            f = wrap(torch_silu_mul_quant)
            return lambda i: f(self.xs[i % self.n], self.others[i % self.n])
        f = wrap(torch_quant)
        return lambda i: f(self.xs[i % self.n])


def prepare(device: str, case: Case, selection: Selection) -> Prepared:
    """Both formats of one op and shape."""
    M, K = case["M"], case["K"]
    buffers = _Buffers(device, case["op"], M, K)
    blocks = K // BLOCK_K
    kernel = "act_quant." + ("cuda" if device == "cuda" else _native._C.cpu_isa()["best"])
    subjects = [
        Subject(
            name=act,
            kernel=kernel,
            case={"act": act},
            call=buffers.ours(granularity),
            nbytes=buffers.bytes() + M * 4 * (blocks + (blocks if act == "int8b128" else 1)),
            macs=0,
        )
        for act, granularity in ACTS.items()
        if selection({"act": act})
    ]
    torch._dynamo.reset()  # each shape is compiled for itself
    wrap = partial(torch.compile, dynamic=False) if device == "cuda" else lambda f: f
    rivals = {
        _torch_name(device): buffers.rival(wrap),
        "copy": lambda i: buffers.xs[i % buffers.n].clone(),
    }
    return Prepared(subjects, rivals, inner=inner_calls(max(2.0, buffers.bytes() / 3e6)))


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
        {k: sorted({c[k] for c in full}) for k in ("op", "M", "K")} | {"act": list(ACTS)},
        [*ACTS, _torch_name(device), "copy"],
    )
