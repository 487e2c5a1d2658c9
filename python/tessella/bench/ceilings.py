"""What the hardware can do at most: the denominators of every roofline fraction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tessella import _native
from tessella.bench import BenchError
from tessella.testing.force import environment


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device, or of some threads of a CPU."""

    isa: str
    read_bytes_per_us: float
    macs_per_us: float  # 8-bit integer multiply-adds

    def roofline_us(self, bytes_read: float, macs: float) -> float:
        """The larger of memory time and arithmetic time, in microseconds."""
        return max(bytes_read / self.read_bytes_per_us, macs / self.macs_per_us)

    def best(self, other: Ceilings | None) -> Ceilings:
        """The higher of both in each rate: a disturbed measurement can only be too low."""
        if other is None:
            return self
        return Ceilings(
            self.isa,
            max(self.read_bytes_per_us, other.read_bytes_per_us),
            max(self.macs_per_us, other.macs_per_us),
        )


GPUS = {
    # measured on an idle H200: 4650 GB/s plain reads, 1910 TOPS of dense s8 wgmma
    "h200": Ceilings("sm_90a", 4650e3, 955e6),
}


@dataclass(frozen=True)
class Cpu:
    """A kind of CPU: best instruction set, and rates of one thread, of more, and of all."""

    isa: str
    read_bytes_per_us: float
    most_read_bytes_per_us: float
    macs_per_us: Mapping[str, float]


CPUS = {
    # measured on two cores of an EPYC (family 26) at 4.45 GHz
    "zen5": Cpu(
        "avx512vnni",
        44e3,
        53e3,
        {"avx512vnni": 575e3, "avxvnni": 275e3, "avx2": 144e3},
    ),
}


def measure(device: str, threads: int = 1) -> Ceilings:
    """Ceilings of this machine: measured now for a CPU, from the table for a known GPU.

    Raises BenchError for a GPU that is not in the table, or a CPU without the compiled module.
    """
    if device == "cuda":
        name = torch.cuda.get_device_name().lower()
        for key, ceilings in GPUS.items():
            if key in name:
                return ceilings
        raise BenchError(f"bench: no ceilings known for '{name}'; known: {', '.join(GPUS)}")
    if _native._C is None:
        raise BenchError(f"bench: needs the compiled module _C ({_native.C_ERROR})")
    c = _native._C.measure_ceilings(threads)
    return Ceilings(c["isa"], c["read_bytes_per_us"], c["macs_per_us"])


def of(arch: str, threads: int, isa: str | None = None) -> Ceilings:
    """Ceilings of a kind of CPU, or measured ones of this CPU ("here").

    Args:
        arch: "here" or a name in :data:`CPUS`.
        threads: arithmetic scales with them, reading only up to what all cores get.
        isa: instruction set; None: the best.

    Raises BenchError for names that are not known, or an instruction set that cannot be measured
    here or is not known of that kind.
    """
    if arch != "here":
        if arch not in CPUS:
            raise BenchError(f"arch: expected one of here, {', '.join(CPUS)}, got {arch!r}")
        cpu = CPUS[arch]
        isa = isa or cpu.isa
        if isa not in cpu.macs_per_us:
            known = ", ".join(cpu.macs_per_us)
            raise BenchError(f"isa: expected one of {known} for {arch}, got {isa!r}")
        read = min(cpu.read_bytes_per_us * threads, cpu.most_read_bytes_per_us)
        return Ceilings(isa, read, cpu.macs_per_us[isa] * threads)
    if isa is None:
        return measure("cpu", threads)
    supported = _native._C.cpu_isa()["supported"] if _native._C else []
    if isa not in supported:
        raise BenchError(
            f"isa: expected one of {', '.join(supported)} for this CPU, got {isa!r}; "
            f"--arch {'|'.join(CPUS)} knows other machines"
        )
    try:
        with environment(CPU_ISA=isa):
            _native._C.cpu_isa()  # _C keeps settings of its own, and reads them now
            return measure("cpu", threads)
    finally:
        _native._C.cpu_isa()
