"""Cases of w4ax_gemm on CPU: linears of Llama-3-8B, kernel alone on given codes.

All schemes and activation formats of a shape are timed in turn with the rivals. Apart from the
kernel, each record has the time of quantising its activations, and of both in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessella import _native
from tessella.bench import predict
from tessella.bench.rivals import RIVALS, Rival
from tessella.bench.suite import Case, Family, Prepared, Selection, Subject
from tessella.bench.timing import Call, last_level_cache_bytes, rotations
from tessella.formats import PackedW4
from tessella.ops import w4_pack
from tessella.testing.cases import LLM_NK, k8_of, random_activations, random_weight

M_VALUES = (1, 4, 16, 64, 512)
QUICK_M = (1, 16)
QUICK_NK = ((1024, 1024),)
SCHEMES = ("twolevel", "g128", "channel")
ACTS = {
    "int8": ("token", 1.0),
    "int8b128": ("block", 1.0),
    "mixed": ("block", 0.25),
    "int4b128": ("block", 0.0),
}
"""Granularity of the scales, and the share of channels in INT8: a quarter as in COMET, or none."""

_act_quant = torch.ops.tessella.act_quant.default
_w4ax_linear = torch.ops.tessella.w4ax_linear.default
_w4ax_gemm = torch.ops.tessella.w4ax_gemm.default


def cases(quick: bool) -> list[Case]:
    """The cases of a run; those of one shape follow each other."""
    shapes, tokens = (QUICK_NK, QUICK_M) if quick else (LLM_NK, M_VALUES)
    return [{"M": M, "N": N, "K": K} for N, K in shapes for M in tokens]


class _Shape:
    """Weights of one shape in every form, built when first asked for."""

    def __init__(self, N: int, K: int):
        self.N, self.K = N, K
        self.generator = torch.Generator().manual_seed(0)
        self.w_NK = torch.randn(N, K, generator=self.generator).bfloat16()
        self.cache = last_level_cache_bytes()
        self._packed: dict[str, list[PackedW4]] = {}
        self._rivals: dict[tuple[str, int], Rival] = {}

    def packed(self, scheme: str) -> list[PackedW4]:
        """Copies of a packed weight, more than the caches hold."""
        if scheme not in self._packed:
            w = random_weight(scheme, self.N, self.K, self.generator)
            copies = rotations(w4_pack(w).blob.nbytes, self.cache)
            self._packed[scheme] = [w4_pack(w) for _ in range(copies)]  # as a layer's is made
        return self._packed[scheme]

    def rival(self, name: str, threads: int) -> Rival:
        """A rival's weights, as many copies as the caches do not hold."""
        kind = RIVALS[name]
        key = name, threads if kind.own_threads else 0
        if key not in self._rivals:
            copies = rotations(int(self.N * self.K * kind.bytes_per_weight), self.cache)
            self._rivals[key] = kind(self.w_NK, copies, threads)
        return self._rivals[key]


_shape: _Shape | None = None
"""The shape of the last case, kept for the next one."""


def prepare(case: Case, selection: Selection) -> Prepared:
    """All selected schemes and activation formats of a shape, and the rivals."""
    global _shape
    N, K, threads = case["N"], case["K"], case["threads"]
    if _shape is None or (_shape.N, _shape.K) != (N, K):
        _shape = None  # frees the old weights first
        _shape = _Shape(N, K)
    shape = _shape
    x_MK = random_activations(case["M"], K, torch.bfloat16, shape.generator)
    subjects = [
        _subject(shape, x_MK, scheme, act, threads)
        for scheme in SCHEMES
        for act in ACTS
        if selection({"scheme": scheme, "act": act})
    ]
    absent = {name: why for name, kind in RIVALS.items() if (why := kind.missing())}
    rivals = {
        name: _rival_call(shape.rival(name, threads), x_MK) for name in RIVALS if name not in absent
    }
    apart = {name: rivals.pop(name) for name in list(rivals) if RIVALS[name].own_threads}
    return Prepared(subjects, rivals, apart, absent)


def _rival_call(rival: Rival, x_MK: Tensor) -> Call:
    x = rival.input(x_MK)
    return lambda i: rival.run(x, i)


def _subject(shape: _Shape, x_MK: Tensor, scheme: str, act: str, threads: int) -> Subject:
    (M, K), N = x_MK.shape, shape.N
    granularity, share = ACTS[act]
    k8 = k8_of(share, K)
    ws = shape.packed(scheme)
    given = _act_quant(x_MK, k8, granularity, None)

    def gemm(acts: tuple[Tensor, ...], i: int) -> Tensor:
        blob = ws[i % len(ws)].blob
        return _w4ax_gemm(*acts, blob, scheme, N, granularity, None, torch.bfloat16)

    def linear(i: int) -> Tensor:
        return _w4ax_linear(x_MK, ws[i % len(ws)].blob, scheme, N, k8, granularity, None, None)

    def quant() -> tuple[Tensor, ...]:
        return _act_quant(x_MK, k8, granularity, None)

    problem = predict.Gemm(M, N, K, scheme, act, threads)
    return Subject(
        name=f"{scheme}-{act}",
        kernel=_native._C.plan_w4ax_gemm(M, N, K, threads)["kernel"],
        case={"scheme": scheme, "act": act, "timing": "isolated"},
        call=lambda i: gemm(given, i),
        nbytes=problem.nbytes,
        macs=problem.macs,
        parts={
            "quant": lambda i: quant(),
            "with_quant": lambda i: gemm(quant(), i),
            "linear": linear,
        },
        predicted_us=lambda limits: predict.gemm(problem, limits).us,
    )


def family(device: str) -> Family | None:
    """w4ax_gemm on "cpu"; another device has a module of its own."""
    if device != "cpu":
        return None
    full = cases(quick=False) + cases(quick=True)
    return Family(
        "w4ax_gemm",
        "cpu",
        cases,
        prepare,
        {k: sorted({c[k] for c in full}) for k in ("M", "N", "K")}
        | {"scheme": list(SCHEMES), "act": list(ACTS)},
        [*(f"{scheme}-{act}" for scheme in SCHEMES for act in ACTS), *RIVALS],
    )
