"""w4ax_gemm and act_quant beside CANN's own operators, on an Ascend 910B.

    python -m tessella.bench.ascend_npu [--quick] [--out DIR]

Written against the schemas of torch_npu 2.13; never run, for want of the hardware. Rivals:
``npu_quant_matmul`` (INT8 weights, and INT4 ones), ``npu_weight_quant_batchmatmul`` (INT4 weights
with bf16 activations, groups of 128), ``npu_dynamic_quant``, and a bf16 product. All take turns in
one process over rotating weights; a time is the median between events of the device.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tessella import ops
from tessella.bench import BenchError, ascend
from tessella.bench.predict import Gemm
from tessella.bench.records import Record, stamp
from tessella.formats import W4Weight

LINEARS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
M_VALUES = (1, 8, 16, 32, 64, 128, 512, 4096)
QUICK_M = (16, 128)
SCHEMES = ("twolevel", "channel", "g128")
ROTATE_BYTES = 400 << 20
"""More than the 192 MB of L2, twice."""

REPS = 30


def load_npu() -> ModuleType:
    """torch_npu with a device; raises BenchError with the reason where there is none."""
    try:
        npu = importlib.import_module("torch_npu")
    except ImportError as e:
        raise BenchError(f"bench: needs torch_npu and CANN on this machine ({e})") from None
    ours, theirs = (v.__version__.split(".")[:2] for v in (torch, npu))
    if ours != theirs:
        raise BenchError(
            f"bench: torch_npu {npu.__version__} does not go with torch {torch.__version__}"
        )
    if not torch.npu.is_available():
        raise BenchError("bench: torch_npu sees no NPU")
    name = torch.npu.get_device_name()
    if not name.lower().startswith(("ascend910b", "ascend910_93")):
        raise BenchError(f"bench: expected an Ascend 910B, got {name}")
    library = Path(ascend.__file__).parents[1] / "_ascend_npu.so"
    if not library.is_file():
        raise BenchError("bench: this build has no kernels for the NPU; use TESSELLA_ASCEND=NPU")
    torch.ops.load_library(library)
    return npu


def time_npu(calls: dict[str, Callable[[int], object]], reps: int = REPS) -> dict[str, float]:
    """Median microseconds of each call; they take turns, in another order every round."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for i in range(reps + 3):
        random.shuffle(order)
        for name in order:
            begin, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
            begin.record()
            calls[name](i)
            end.record()
            end.synchronize()
            if i >= 3:
                samples[name].append(1e3 * begin.elapsed_time(end))
    return {name: median(times) for name, times in samples.items()}


def copies(make: Callable[[], Tensor]) -> list[Tensor]:
    """As many weights as L2 does not hold."""
    first = make()
    return [first, *(make() for _ in range(ROTATE_BYTES // max(1, first.nbytes)))]


def rivals(npu: ModuleType, x: Tensor, N: int) -> dict[str, Callable[[int], object]]:
    """CANN's operators for activations [M, K] in bf16."""
    K, dev = x.shape[1], x.device
    x8, token_scale = npu.npu_dynamic_quant(x)
    scale = torch.rand(N, device=dev).bfloat16()
    group_scale = torch.rand(K // 128, N, device=dev).bfloat16()
    zeros = torch.zeros_like(group_scale)

    def int8() -> Tensor:
        return torch.randint(-127, 128, (K, N), dtype=torch.int8, device=dev)

    def int4() -> Tensor:
        wide = torch.randint(-8, 8, (K, N), dtype=torch.int32, device=dev)
        return npu.npu_convert_weight_to_int4pack(wide)

    w16 = copies(lambda: torch.randn(K, N, device=dev, dtype=torch.bfloat16))
    w8, w4 = copies(int8), copies(int4)

    def quant_matmul(w: list[Tensor]) -> Callable[[int], Tensor]:
        return lambda i: npu.npu_quant_matmul(
            x8, w[i % len(w)], scale, pertoken_scale=token_scale, output_dtype=torch.bfloat16
        )

    return {
        "cann_bf16": lambda i: torch.mm(x, w16[i % len(w16)]),
        "cann_quant_matmul_w8a8": quant_matmul(w8),
        "cann_weight_quant_w4a16": lambda i: npu.npu_weight_quant_batchmatmul(
            x, w4[i % len(w4)], group_scale, antiquant_offset=zeros, antiquant_group_size=128
        ),
    }


def random_weights(scheme: str, N: int, K: int, device: torch.device) -> list[Tensor]:
    """Packed weights with random codes and legal scales."""

    def make() -> Tensor:
        t = {}
        for name, (dtype, shape) in W4Weight.spec(scheme, N, K).items():
            if dtype == torch.uint8:
                most = 256 if name == "codes" else 9 if name == "group_scales" else 16
                t[name] = torch.randint(1, most, shape, dtype=dtype)
            else:
                t[name] = (torch.rand(shape) * 0.01 + 0.001).to(dtype)
        return ops.w4_pack(W4Weight.from_tensors(t, scheme, K)).blob

    first = make().to(device)
    return [first, *(first.clone() for _ in range(ROTATE_BYTES // first.nbytes))]


def run(*, quick: bool = False) -> Iterator[Record]:
    """Measure every case; yields records as they are done."""
    npu = load_npu()
    device = torch.device("npu")
    for N, K in LINEARS[:1] if quick else LINEARS:
        weights = {s: random_weights(s, N, K, device) for s in SCHEMES}
        for M in QUICK_M if quick else M_VALUES:
            x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
            yield from measure(npu, x, N, weights)


def measure(npu: ModuleType, x: Tensor, N: int, weights: dict[str, list]) -> Iterator[Record]:
    """Records of one case: our schemes, and quantisation, beside CANN's."""
    M, K = x.shape
    a = ops.act_quant(x)

    def ours(scheme: str) -> Callable[[int], object]:
        blobs = weights[scheme]
        return lambda i: torch.ops.tessella.w4ax_gemm(
            a.codes8, a.codes4, a.sums, a.scales, blobs[i % len(blobs)], scheme, N, "token", None,
            torch.bfloat16,
        )  # fmt: skip

    times = time_npu({s: ours(s) for s in weights} | rivals(npu, x, N))
    chip = ascend.CHIPS["910b"]
    for scheme in weights:
        problem = Gemm(M, N, K, scheme, "int8")
        peak = 16 * 16 * 32 * chip.cores * chip.cycles_per_us
        roofline = max(problem.nbytes / chip.read_bytes_per_us, problem.macs / peak)
        case = {"M": M, "N": N, "K": K, "scheme": scheme, "act": "int8", "timing": "isolated"}
        baselines = {name: us for name, us in times.items() if name not in weights}
        yield Record("w4ax_gemm", "w4ax_gemm.910b", case, times[scheme], roofline, baselines)
    quant = time_npu(
        {
            "ours": lambda i: ops.act_quant(x),
            "cann_dynamic_quant": lambda i: npu.npu_dynamic_quant(x),
        }
    )
    roofline = 3 * x.numel() / chip.read_bytes_per_us
    baselines = {"cann_dynamic_quant": quant["cann_dynamic_quant"]}
    case = {"M": M, "K": K, "act": "int8"}
    yield Record("act_quant", "act_quant.910b", case, quant["ours"], roofline, baselines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a line a case, and write records below --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two cases")
    parser.add_argument("--out", type=Path, default=Path("bench/results/910b"))
    options = parser.parse_args(arguments)
    by_family: dict[str, list[dict[str, Any]]] = {}
    try:
        for record in run(quick=options.quick):
            print(record.family, record.case, f"{record.us:.1f} us", record.baselines)
            where = stamp("cpu") | {"device": torch.npu.get_device_name()}
            by_family.setdefault(record.family, []).append(record.to_json(where))
    except BenchError as e:
        raise SystemExit(str(e)) from None
    options.out.mkdir(parents=True, exist_ok=True)
    for family, records in by_family.items():
        path = options.out / f"{family}.json"
        path.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
