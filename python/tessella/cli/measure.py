"""What the demo measures: bytes of weights, speed, and the kernels that ran."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

REFERENCE = "reference (no compiled kernel)"


@dataclass(frozen=True)
class Bytes:
    """Bytes of a checkpoint's tensors."""

    linears: int
    embeddings: int
    other: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linears + self.embeddings + self.other


def weight_bytes(folder: Path, linears: set[str]) -> Bytes:
    """Sizes of the tensors in a checkpoint folder, scales and zeros of 4-bit linears included.

    `linears` names the modules that count as linears; embeddings are the token embedding and the
    output head, as often as they are stored.
    """
    from safetensors import safe_open

    sums = {"linears": 0, "embeddings": 0, "other": 0}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118 (not a dict)
                module = name.rpartition(".")[0]
                kind = "linears" if module in linears else "other"
                if module.rpartition(".")[2] in ("embed_tokens", "lm_head"):
                    kind = "embeddings"
                sums[kind] += f.get_tensor(name).nbytes
    return Bytes(**sums)


@dataclass(frozen=True)
class Speed:
    """Medians over rounds, tokens a second."""

    prefill_tok_s: float
    decode_tok_s: float


def speeds(
    models: list[tuple[nn.Module, str]], tokenizer, prompt: str, new_tokens: int, rounds: int
) -> list[Speed]:
    """Speed of each (model, codec of its cache) on one prompt.

    They take turns, so that they share disturbances.
    """
    from tessella.integrations.generate import generate

    samples = [[] for _ in models]
    for _ in range(rounds):
        for (model, kv), results in zip(models, samples):
            how = {"max_new_tokens": new_tokens, "stop_at_eos": False, "kv": kv}
            results.append(generate(model, tokenizer, prompt, **how))
    return [
        Speed(median(g.prefill_tok_s for g in results), median(g.tok_s for g in results))
        for results in samples
    ]


def kernels_run(model: nn.Module, tokenizer, prompt: str, new_tokens: int) -> dict[str, int]:
    """Kernels of this package that one generation ran, and how often, from a profiler trace."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from tessella.integrations.generate import generate

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        generate(model, tokenizer, prompt, max_new_tokens=new_tokens, stop_at_eos=False)
    threads = torch.get_num_threads()
    ours = (e for e in trace.events() if e.name.startswith("tessella::"))
    return dict(Counter(_kernel(e, threads) for e in ours))


def _product(op: str, event: Any) -> tuple[int, int, int]:
    """M, N and K of a profiled product."""
    if op == "w4ax_linear":
        (M, K), *_ = event.input_shapes
        return M, event.concrete_inputs[3], K
    codes8, codes4, *_ = event.input_shapes
    return codes8[1], event.concrete_inputs[6], (codes8[0] + codes4[0]) * 128


def _kernel(event: Any, threads: int) -> str:
    """Name of the compiled kernel behind a profiler event of an op on CPU."""
    from tessella import _native

    op = event.name.removeprefix("tessella::").removesuffix("_out")
    family = "act_quant" if op.endswith("_quant") else op  # its fused producers are in its family
    if op == "w4ax_linear":
        family = "w4ax_gemm"  # named by its product
    if (caches := op.partition("_")[0]) in ("msm", "kv4", "mla"):
        family = caches
    if not _native.HAS_OPS or _native._C is None:
        return f"{family}: {REFERENCE}"
    for name in os.environ.get("TESSELLA_FORCE", "").split(","):
        if name.startswith(family + "."):
            return name
    if family == "w4ax_gemm":
        return _native._C.plan_w4ax_gemm(*_product(op, event), threads)["kernel"]
    if family == caches and not op.endswith("_attn"):
        return op  # plans and appends have one body
    return f"{family}.{_native._C.cpu_isa()['best']}"  # attention chooses its tiles task by task
