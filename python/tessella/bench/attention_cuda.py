"""Cases and rivals of attention on a GPU, shared by the families msm and kv4.

Everything runs from CUDA graphs over rotating caches that the L2 cannot hold. Rivals get the same
numbers of keys contiguous, in bf16; for trees they score every pair, since none takes a tree.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from tessella import ops
from tessella.bench import attention as shared
from tessella.bench.suite import Case
from tessella.formats_kv import MsmBatch
from tessella.kv.step import workers

TARGET = shared.case("decode", 64, 4096, 1)
DECODE = [
    shared.case("decode", B, ctx, 1)
    for B, ctx in (
        (1, 8192), (16, 4096), (64, 1024), (64, 8192), (128, 2048), (16, 32768), (1, 131072),
    )
]  # fmt: skip
VERIFY = shared.case("verify", 64, 4096, 8)
CPU = [*shared.DECODE, *shared.MORE_DECODE, *shared.VERIFY]
PREFILL = [
    shared.case("prefill", B, ctx, q)
    for B, ctx, q in ((1, 8192, 8192), (4, 8192, 8192), (8, 2048, 2048), (1, 8192, 2048))
]
MIXED = shared.case("mixed-decode", 64, 8192, 2048)
LARGE = [*PREFILL, MIXED, *(case | {"page": 16} for case in (PREFILL[0], MIXED))]
"""Cases of 16-bit pages alone, bound by arithmetic."""
PAGE_16 = [case | {"page": 16} for case in (TARGET, DECODE[1], DECODE[3], VERIFY)]
CASES = [TARGET, *DECODE, VERIFY, *PAGE_16, *CPU]
QUICK = [TARGET, VERIFY]
ROTATE_BYTES = 200 << 20


def rows(c: Case) -> int:
    """Packed rows of a case's longest request: query tokens times query heads of a kv head."""
    return c["q"] * c["H"] // c["J"]


def units() -> int:
    """Workers of this GPU."""
    return workers(torch.device("cuda"))


def problem(c: Case) -> tuple[shared.Problem, MsmBatch]:
    """A case's problem with its plan for this GPU, and the batch in its memory."""
    p = shared.problem(c)
    plan = ops.msm_plan(p.batch, c["H"], c["J"], units=units()).cuda()
    there = MsmBatch(*(None if t is None else t.cuda() for t in vars(p.batch).values()))
    return shared.Problem(p.batch, p.pages, p.q.cuda(), plan, p.pairs, p.keys), there


def copies(nbytes: int) -> int:
    """Caches to rotate over."""
    return max(2, -(-ROTATE_BYTES // nbytes))


def inner(nbytes: int) -> int:
    """Calls in one CUDA graph."""
    return int(min(20, max(4, 4000 / max(10.0, nbytes / 4e6))))


def plan_call(c: Case, p: shared.Problem) -> float:
    """Microseconds of making the plan on the CPU: one serves all layers of a model."""
    from time import perf_counter

    before = perf_counter()
    for _ in range(20):
        ops.msm_plan(p.batch, c["H"], c["J"], units=units())
    return (perf_counter() - before) / 20 * 1e6


def rivals(c: Case, p: shared.Problem) -> tuple[dict[str, Callable[[int], Tensor]], dict[str, str]]:
    """(calls, what is absent and why): SDPA by its backends, flashinfer where it is installed."""
    if c["kind"] == "mixed-decode":
        return _mixed_rivals(c, p)
    B, q, H, J, D, ctx = (c[k] for k in ("B", "q", "H", "J", "D", "ctx"))
    n = copies(4 * B * J * ctx * D)
    caches = [
        tuple(torch.randn(B, J, ctx, D, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        for _ in range(n)
    ]
    qs = p.q.view(B, q, H, D).transpose(1, 2).contiguous()
    causal = c["kind"] == "prefill" and q == ctx
    if c["kind"] == "prefill" and not causal:
        return {"sdpa_flash": _chunk(c, qs[:1])}, {"sdpa_cudnn": "takes no cached prefix"}

    def sdpa(backend: SDPBackend) -> Callable[[int], Tensor]:
        def run(i: int) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    qs, *caches[i % n], is_causal=causal, enable_gqa=True
                )

        return run

    found, absent = {}, {}
    named = {"sdpa_cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa_flash": SDPBackend.FLASH_ATTENTION}
    for name, backend in named.items():
        try:
            sdpa(backend)(0)
            found[name] = sdpa(backend)
        except RuntimeError as e:
            absent[name] = str(e).splitlines()[0]
    for name, module in (("flashinfer", "flashinfer"), ("flash_attn", "flash_attn")):
        if find_spec(module) is None:
            absent[name] = "not installed"
    return found, absent


def _chunk(c: Case, qs: Tensor) -> Callable[[int], Tensor]:
    """SDPA of q tokens at the end of ctx, which only its flash backend takes, heads repeated."""
    shape, mask = (1, c["H"], c["ctx"], c["D"]), causal_lower_right(c["q"], c["ctx"])
    k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))

    def run(_: int) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(qs, k, v, attn_mask=mask)

    return run


def _mixed_rivals(c: Case, p: shared.Problem) -> tuple[dict, dict[str, str]]:
    """The chunk by SDPA's flash backend, then the decodes by cuDNN, which is faster at them."""
    B, q, H, J, D, ctx = (c[k] for k in ("B", "q", "H", "J", "D", "ctx"))
    chunk = _chunk(c, p.q[:q].view(1, q, H, D).transpose(1, 2).contiguous())
    shape = (B - 1, J, ctx // 2, D)
    k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    qs = p.q[q:].view(B - 1, 1, H, D).transpose(1, 2).contiguous()

    def run(i: int) -> Tensor:
        chunk(i)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(qs, k, v, enable_gqa=True)

    return {"sdpa_separate": run}, {"sdpa_cudnn": "takes no mixed batch"}


def values(kv: list[str]) -> dict[str, list]:
    """Possible values of every key of the cases."""
    return shared.values([*CASES, *LARGE, *QUICK], kv)
