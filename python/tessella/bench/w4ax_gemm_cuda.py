"""Cases of w4ax_gemm on a GPU: the linears of three models, from decode to prefill.

Timing "isolated": a CUDA graph of plain launches over rotating weights, activations quantised
beforehand, programmatic launch off, since identical GEMMs back to back would fetch each other's
weights early and flatter themselves. Baselines run in the same process, interleaved: cuBLAS bf16,
cuBLASLt int8 without scales (from 17 tokens up, as torch allows), cuBLAS fp8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tessella import _native, ops
from tessella.bench import ceilings
from tessella.bench.records import Record
from tessella.bench.timing import time_cuda
from tessella.formats import W4Weight
from tessella.testing.force import environment

LINEARS = {
    "llama3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "llama3-70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    "qwen2.5-7b": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
}
"""Fused qkv, o, fused gate_up, down: [N, K]."""

M_VALUES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
QUICK_M = (16, 128)
SCHEMES = ("twolevel", "channel", "g128")
ROTATE_BYTES = 240 << 20
MOST_INNER_US = 4000.0  # of one graph, so that large cases do not take minutes


def cases(quick: bool) -> Iterator[tuple[int, int, int]]:
    """(M, N, K) in the order of a run: every M of one weight, then the next weight."""
    for model, shapes in LINEARS.items():
        for N, K in shapes if not quick or model == "llama3-8b" else ():
            for M in QUICK_M if quick else M_VALUES:
                yield M, N, K


def random_weights(scheme: str, N: int, K: int, copies: int) -> list[Tensor]:
    """Packed weights on the GPU with random codes and legal scales."""
    packed = []
    for _ in range(copies):
        t: dict[str, Tensor] = {}
        for name, (dtype, shape) in W4Weight.spec(scheme, N, K).items():
            if dtype == torch.uint8:
                most = 256 if name == "codes" else 9 if name == "group_scales" else 16
                t[name] = torch.randint(1, most, shape, dtype=dtype, device="cuda")
            else:
                t[name] = (torch.rand(shape, device="cuda") * 0.01 + 0.001).to(dtype)
        packed.append(ops.w4_pack(W4Weight.from_tensors(t, scheme, K)).blob)
    return packed


class Rivals:
    """What a user would run instead, with rotating weights of its own type."""

    def __init__(self, N: int, K: int):
        def copies(make: Callable[[], Tensor]) -> list[Tensor]:
            first = make()
            n = max(2, -(-ROTATE_BYTES // (first.numel() * first.element_size())))
            return [first, *(make() for _ in range(n - 1))]

        def int8() -> Tensor:
            return torch.randint(-127, 128, (N, K), dtype=torch.int8, device="cuda")

        self.bf16 = copies(lambda: torch.randn(N, K, device="cuda", dtype=torch.bfloat16))
        self.int8 = copies(int8)
        self.fp8 = [w.float().mul_(0.01).to(torch.float8_e4m3fn) for w in self.int8]

    def calls(self, x: Tensor, x8: Tensor) -> dict[str, Callable[[int], object]]:
        """The baselines for activations [M, K] in bf16 and INT8."""
        one = torch.ones((), device="cuda")
        xf = (x8.float() * 0.01).to(torch.float8_e4m3fn)

        def fp8(i: int) -> Tensor:
            w = self.fp8[i % len(self.fp8)].t()
            return torch._scaled_mm(xf, w, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        calls = {
            "cublas_bf16": lambda i: torch.mm(x, self.bf16[i % len(self.bf16)].t()),
            "cublas_fp8": fp8,
        }
        if x.shape[0] > 16:
            calls["cublaslt_int8"] = lambda i: torch._int_mm(x8, self.int8[i % len(self.int8)].t())
        return calls


def kernel_name(M: int, N: int, K: int, scheme: str) -> str:
    """The body that the planner takes, as far as module _C is there to say."""
    if _native._C is None:
        return "w4ax_gemm.sm90"
    return _native._C.plan_w4ax_gemm_sm90(M, N, K, scheme)["kernel"]


def run(*, quick: bool = False, schemes: tuple[str, ...] = SCHEMES) -> Iterator[Record]:
    """Measure every case; yields one record per scheme as they are done."""
    limits = ceilings.measure("cuda")
    last = None
    with environment(PDL="0"):
        for M, N, K in cases(quick):
            if last != (N, K):
                last, rivals, weights = (N, K), None, None
                rivals = Rivals(N, K)
                copies = max(2, -(-ROTATE_BYTES // (N * K // 2)))
                weights = {s: random_weights(s, N, K, copies) for s in schemes}
            yield from measure(M, N, K, weights, rivals, limits)


def measure(M, N, K, weights, rivals, limits) -> Iterator[Record]:
    """One record per scheme of one case, all timed together."""
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    a = ops.act_quant(x)
    x8 = a.codes8.transpose(0, 1).reshape(M, -1)[:, :K].contiguous()

    def ours(scheme: str) -> Callable[[int], object]:
        blobs = weights[scheme]
        return lambda i: torch.ops.tessella.w4ax_gemm(
            a.codes8, a.codes4, a.sums, a.scales, blobs[i % len(blobs)], scheme, N, "token", None,
            torch.bfloat16,
        )  # fmt: skip

    variants = {s: ours(s) for s in weights} | rivals.calls(x, x8)
    guess_us = max(5.0, 2.0 * M * N * K / 6e8)
    inner = int(min(20, max(2, MOST_INNER_US / guess_us)))
    times = time_cuda(variants, inner=inner)
    baselines = {name: times[name].us for name in times if name not in weights}
    for scheme, blobs in weights.items():
        t = times[scheme]
        moved = blobs[0].numel() + M * (a.Kp + 2 * N + 4)
        yield Record(
            "w4ax_gemm",
            kernel_name(M, N, K, scheme),
            {"M": M, "N": N, "K": K, "scheme": scheme, "act": "int8", "timing": "isolated"},
            t.us,
            limits.roofline_us(moved, M * N * K),
            baselines,
            {"best_us": round(t.best_us, 3), "tops": round(2e-6 * M * N * K / t.us, 1)},
            t.spread,
        )
