"""Cases of w4ax_gemm on a GPU: the linears of three models, from decode to prefill.

Timing "isolated": a CUDA graph of plain launches over rotating weights, activations quantised
beforehand, programmatic launch off, since identical GEMMs back to back would fetch each other's
weights early and flatter themselves. Baselines run in the same process, interleaved: cuBLAS bf16,
cuBLASLt int8 without scales (from 17 tokens up, as torch allows), cuBLAS fp8.

Apart from the kernel each record has the time of quantising its activations, and of both in a row
with programmatic launch, as a model runs them. How the linears of a block run behind each other is
the family w4ax_chain.

From 64 tokens up two-level records also say what decoding costs: the same kernel, in the same
tiles, on the packed weights (`coded_us`) and on weights that are bytes already (`widened_us`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tessella import _native, layout, ops
from tessella.bench.suite import Case, Family, Prepared, Selection, Subject
from tessella.bench.timing import Call, inner_calls
from tessella.formats import PackedW4, W4Weight
from tessella.testing.force import environment, gpu_kernels

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
PROBE_M = 64
"""Tokens from which on decoding is measured: those that have a tile of their own."""

_act_quant = torch.ops.tessella.act_quant.default
_w4ax_gemm = torch.ops.tessella.w4ax_gemm.default
_probe = torch.ops.tessella._w4ax_gemm_probe.default


def cases(quick: bool) -> list[Case]:
    """The cases of a run: every M of one weight, then the next weight."""
    return [
        {"M": M, "N": N, "K": K}
        for model, shapes in LINEARS.items()
        for N, K in (shapes if not quick or model == "llama3-8b" else ())
        for M in (QUICK_M if quick else M_VALUES)
    ]


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


def plainly(call: Call) -> Call:
    """The call without programmatic launch; it is captured, so switching costs no time."""

    def run(i: int) -> object:
        with environment(PDL="0"):
            return call(i)

    return run


class _Shape:
    """Weights of one shape, ours and the rivals'."""

    def __init__(self, N: int, K: int):
        self.N, self.K = N, K
        self.rivals = Rivals(N, K)
        self._packed: dict[str, list[Tensor]] = {}
        self._widened: list[Tensor] = []

    def packed(self, scheme: str) -> list[Tensor]:
        """Packed weights, more than the caches hold."""
        if scheme not in self._packed:
            copies = max(2, -(-ROTATE_BYTES // (self.N * self.K // 2)))
            self._packed[scheme] = random_weights(scheme, self.N, self.K, copies)
        return self._packed[scheme]

    def widened(self) -> list[Tensor]:
        """The packed two-level weights as bytes: half as many copies."""
        if not self._widened:
            copies = max(2, -(-ROTATE_BYTES // (self.N * self.K)))
            for blob in self.packed("twolevel")[:copies]:
                weight = ops.w4_unpack(PackedW4(blob, "twolevel", self.N, self.K))
                self._widened.append(layout.w4_widen_cuda(weight))
        return self._widened


_shape: _Shape | None = None
"""The shape of the last case, kept for the next one."""


def prepare(case: Case, selection: Selection) -> Prepared:
    """All selected schemes of a case, and the rivals."""
    global _shape
    M, N, K = case["M"], case["N"], case["K"]
    if _shape is None or (_shape.N, _shape.K) != (N, K):
        _shape = None  # frees the old weights first
        _shape = _Shape(N, K)
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    codes8 = _act_quant(x, -1, "token", None)[0]
    x8 = codes8.transpose(0, 1).reshape(M, -1)[:, :K].contiguous()
    return Prepared(
        [_subject(_shape, x, s) for s in SCHEMES if selection({"scheme": s})],
        _shape.rivals.calls(x, x8),
        inner=inner_calls(max(5.0, 2.0 * M * N * K / 6e8)),
    )


def _subject(shape: _Shape, x: Tensor, scheme: str) -> Subject:
    (M, K), N, blobs = x.shape, shape.N, shape.packed(scheme)
    given = _act_quant(x, -1, "token", None)

    def gemm(acts: tuple[Tensor, ...], i: int) -> Tensor:
        blob = blobs[i % len(blobs)]
        return _w4ax_gemm(*acts, blob, scheme, N, "token", None, torch.bfloat16)

    return Subject(
        name=scheme,
        kernel=kernel_name(M, N, K, scheme),
        case={"scheme": scheme, "act": "int8", "timing": "isolated"},
        call=plainly(lambda i: gemm(given, i)),
        nbytes=blobs[0].numel() + M * (K + 2 * N + 4),
        macs=M * N * K,
        parts={
            "quant": lambda i: _act_quant(x, -1, "token", None),
            "with_quant": lambda i: gemm(_act_quant(x, -1, "token", None), i),
        }
        | (probes(blobs, shape.widened(), given, N) if probed(M, scheme) else {}),
        derive=dequant_share,
    )


def probed(M: int, scheme: str) -> bool:
    """Whether a case says what decoding costs: on Hopper, unless a kernel is forced."""
    known = M >= PROBE_M and scheme == "twolevel" and "TESSELLA_FORCE" not in os.environ
    return known and any(".sm90." in k for k in gpu_kernels("w4ax_gemm"))


def probes(
    coded: list[Tensor], widened: list[Tensor], acts: tuple[Tensor, ...], N: int
) -> dict[str, Call]:
    """The kernel on packed and on widened weights, both in tiles of the same plan."""
    return {
        name: plainly(lambda i, w=w, wide=wide: _probe(*acts, w[i % len(w)], N, wide))
        for name, w, wide in (("coded", coded, False), ("widened", widened, True))
    }


def dequant_share(extra: Mapping[str, Any]) -> dict[str, float]:
    """What decoding takes of the kernel's time; below 0 where half the bytes save more."""
    if not {"coded_us", "widened_us"} <= extra.keys():
        return {}
    return {"dequant_share": round(1 - extra["widened_us"] / extra["coded_us"], 4)}


def family(device: str) -> Family:
    """w4ax_gemm on "cuda"."""
    full = cases(quick=False)
    return Family(
        "w4ax_gemm",
        device,
        cases,
        prepare,
        {k: sorted({c[k] for c in full}) for k in ("M", "N", "K")} | {"scheme": list(SCHEMES)},
        [*SCHEMES, "cublas_bf16", "cublas_fp8", "cublaslt_int8"],
    )
