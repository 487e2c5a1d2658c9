"""What the hardware can do at most: the denominators of every roofline fraction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tessella import _native


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device, or of some threads of a CPU."""

    isa: str
    read_bytes_per_us: float
    macs_per_us: float  # 8-bit integer multiply-adds

    def roofline_us(self, bytes_read: float, macs: float) -> float:
        """The larger of memory time and arithmetic time, in microseconds."""
        return max(bytes_read / self.read_bytes_per_us, macs / self.macs_per_us)


GPUS = {
    # measured on an idle H200: 4650 GB/s plain reads, 1910 TOPS of dense s8 wgmma
    "h200": Ceilings("sm_90a", 4650e3, 955e6),
}


def measure(device: str, threads: int = 1) -> Ceilings:
    """Ceilings of this machine: measured now for a CPU, from the table for a known GPU.

    Raises RuntimeError for a GPU that is not in the table, or a CPU without the compiled module.
    """
    if device == "cuda":
        name = torch.cuda.get_device_name().lower()
        for key, ceilings in GPUS.items():
            if key in name:
                return ceilings
        raise RuntimeError(f"bench: no ceilings known for '{name}'; known: {', '.join(GPUS)}")
    if _native._C is None:
        raise RuntimeError(f"bench: needs the compiled module _C ({_native.C_ERROR})")
    c = _native._C.measure_ceilings(threads)
    return Ceilings(c["isa"], c["read_bytes_per_us"], c["macs_per_us"])
