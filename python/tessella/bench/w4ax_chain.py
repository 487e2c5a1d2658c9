"""The linear layers of a transformer block in a row, as a model runs them on a GPU.

norm and quantise -> qkv, quantise -> o, norm and quantise -> gate and up, silu(gate) * up and
quantise -> down: eight kernels a layer with real dependencies, in one CUDA graph over layers whose
weights are more than the cache holds. Attention is left out: its output stands for the first
channels of the qkv product. Ours with programmatic launch ("chain"), apart without it. Rivals: the
same chain in bf16 on cuBLAS, and in fp8 with static scales on torch._scaled_mm, their norms, gates
and casts fused by torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tessella.bench.suite import Case, Family, Prepared, Selection, Subject
from tessella.bench.timing import inner_calls
from tessella.bench.w4ax_gemm_cuda import ROTATE_BYTES, plainly, random_weights
from tessella.ops.act_quant import empty_blocks

EPS = 1e-5
M_VALUES = (1, 8, 16, 32, 64, 128, 256, 1024)
QUICK_M = (1, 16)
SCHEMES = ("twolevel", "channel")
RIVALS = ("cublas_bf16", "cublas_fp8")
FP8_MOST = 448.0

_tessella = torch.ops.tessella


@dataclass(frozen=True)
class Block:
    """Widths of a transformer block: hidden, queries, keys and values together, intermediate."""

    hidden: int
    queries: int
    keys_values: int
    intermediate: int

    def linears(self) -> tuple[tuple[int, int], ...]:
        """[N, K] of qkv, o, gate and up, down."""
        return (
            (self.queries + self.keys_values, self.hidden),
            (self.hidden, self.queries),
            (2 * self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        )

    def weights(self) -> int:
        """Weights of the four linears."""
        return sum(N * K for N, K in self.linears())


BLOCKS = {
    "llama3-8b": Block(4096, 4096, 2048, 14336),
    "llama3-70b": Block(8192, 8192, 2048, 28672),
    "qwen2.5-7b": Block(3584, 3584, 1024, 18944),
}


def layers_of(block: Block, bytes_per_weight: float) -> int:
    """Layers whose weights no cache holds."""
    return max(2, -(-ROTATE_BYTES // int(block.weights() * bytes_per_weight)))


class Chain:
    """Our layers, on buffers made once: a call allocates nothing.

    `out` [M, hidden] is the last product and `h` the residual stream before and after the
    attention; both carry over from one layer to the next.
    """

    def __init__(self, block: Block, scheme: str, M: int, layers: int | None = None):
        self.block, self.scheme = block, scheme
        n = layers or layers_of(block, 0.5)
        by_linear = [random_weights(scheme, N, K, n) for N, K in block.linears()]
        self.blobs = list(zip(*by_linear))
        self.norms = [_norms(block.hidden) for _ in range(n)]
        self.nbytes = sum(b.numel() for b in self.blobs[0])

        def empty(width: int) -> Tensor:
            return torch.empty(M, width, device="cuda", dtype=torch.bfloat16)

        self.out = empty(block.hidden).normal_()
        self.h = [empty(block.hidden).normal_(), empty(block.hidden)]
        self.qkv, self.o, self.gate_up, _ = (empty(N) for N, _ in block.linears())
        widths = block.hidden, block.queries, block.hidden, block.intermediate
        self.acts = [empty_blocks(empty(width), -1, "token") for width in widths]

    def __call__(self, i: int) -> None:
        """Layer i, modulo the number of layers."""
        block, acts, h = self.block, self.acts, self.h
        blobs, (first, second) = (each[i % len(self.blobs)] for each in (self.blobs, self.norms))
        how = -1, "token", None
        norm, gemm = _tessella.rms_norm_quant_out, self._product
        norm(self.out, first, EPS, h[0], *how, *acts[0], None, h[1])
        gemm(acts[0], blobs[0], self.qkv)
        _tessella.act_quant_out(self.qkv[:, : block.queries], *how, *acts[1])
        gemm(acts[1], blobs[1], self.o)
        norm(self.o, second, EPS, h[1], *how, *acts[2], None, h[0])
        gemm(acts[2], blobs[2], self.gate_up)
        _tessella.silu_mul_quant_out(*self.gate_up.chunk(2, 1), *how, *acts[3])
        gemm(acts[3], blobs[3], self.out)

    def _product(self, acts: tuple[Tensor, ...], blob: Tensor, out: Tensor) -> None:
        _tessella.w4ax_gemm_out(*acts, blob, self.scheme, out.shape[1], "token", None, out)


def _norms(width: int) -> tuple[Tensor, Tensor]:
    """Weights of a layer's two norms."""
    first, second = (torch.rand(width, device="cuda") + 0.5 for _ in range(2))
    return first.bfloat16(), second.bfloat16()


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual), as torch would write it."""
    h = x + residual
    f = h.float()
    f = f * torch.rsqrt(f.square().mean(1, keepdim=True) + EPS)
    return weight * f.to(x.dtype), h


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of their joint product."""
    gate, up = gate_up.chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


def _to_fp8(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn)


class RivalChain:
    """The same layers in bf16 or fp8, norms and gates (with their casts) compiled by torch.

    Activations live in memory of the graph that captures a call.
    """

    def __init__(self, block: Block, kind: str, M: int):
        self.block, self.fp8 = block, kind == "cublas_fp8"
        n = layers_of(block, 1 if self.fp8 else 2)

        def weight(N: int, K: int) -> Tensor:
            w = torch.randn(N, K, device="cuda", dtype=torch.bfloat16) * 0.02
            return w.to(torch.float8_e4m3fn) if self.fp8 else w

        self.weights = [[weight(N, K) for N, K in block.linears()] for _ in range(n)]
        self.norms = [_norms(block.hidden) for _ in range(n)]
        self.out, self.h = torch.randn(2, M, block.hidden, device="cuda").bfloat16().unbind()
        self.one = torch.ones((), device="cuda")
        self.kept: list[Tensor] = []  # what captured graphs read from before
        cast = _to_fp8 if self.fp8 else lambda x: x

        def norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            y, h = add_norm(x, residual, weight)
            return cast(y), h

        compiled = {"dynamic": False}
        self.norm = torch.compile(norm, **compiled)
        self.gate = torch.compile(lambda gate_up: cast(silu_mul(gate_up)), **compiled)
        self.cast = torch.compile(cast, **compiled) if self.fp8 else cast

    def __call__(self, i: int) -> None:
        """Layer i, modulo the number of layers."""
        self.kept += [self.out, self.h]
        qkv, o, gate_up, down = self.weights[i % len(self.weights)]
        first, second = self.norms[i % len(self.norms)]
        y, h = self.norm(self.out, self.h, first)
        y = self._product(self.cast(self._product(y, qkv)[:, : self.block.queries]), o)
        y, self.h = self.norm(y, h, second)
        self.out = self._product(self.gate(self._product(y, gate_up)), down)

    def _product(self, x: Tensor, w: Tensor) -> Tensor:
        if not self.fp8:
            return torch.mm(x, w.t())
        return torch._scaled_mm(
            x, w.t(), scale_a=self.one, scale_b=self.one, out_dtype=torch.bfloat16
        )


def cases(quick: bool) -> list[Case]:
    """The cases of a run, in order."""
    models = ("llama3-8b",) if quick else BLOCKS
    return [{"model": m, "M": M} for m in models for M in (QUICK_M if quick else M_VALUES)]


def prepare(case: Case, selection: Selection) -> Prepared:
    """Both schemes and both rivals of a case."""
    torch._dynamo.reset()  # each M is compiled for itself
    block, M = BLOCKS[case["model"]], case["M"]
    subjects = [
        _subject(Chain(block, scheme, M), M) for scheme in SCHEMES if selection({"scheme": scheme})
    ]
    rivals: dict[str, Callable] = {name: RivalChain(block, name, M) for name in RIVALS}
    us = max(40.0, 2.0 * M * block.weights() / 6e8)
    return Prepared(subjects, rivals, inner=inner_calls(us))


def _subject(chain: Chain, M: int) -> Subject:
    linears = chain.block.linears()
    moved = sum(t.nbytes for acts in chain.acts for t in acts) + 2 * M * sum(N for N, _ in linears)
    return Subject(
        name=chain.scheme,
        kernel="w4ax_gemm.sm90 and act_quant.cuda",
        case={"scheme": chain.scheme, "act": "int8", "timing": "chain"},
        call=chain,
        nbytes=chain.nbytes + moved,
        macs=M * chain.block.weights(),
        parts={"plain_launches": plainly(chain)},
    )


def family(device: str) -> Family | None:
    """w4ax_chain on "cuda"; there is none on a CPU, where `e2e` shows a whole model."""
    if device != "cuda":
        return None
    return Family(
        "w4ax_chain",
        device,
        cases,
        prepare,
        {"model": list(BLOCKS), "M": M_VALUES, "scheme": list(SCHEMES)},
        [*SCHEMES, *RIVALS],
    )
