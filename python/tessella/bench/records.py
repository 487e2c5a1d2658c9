"""Results files: lists of records, one a case and kernel, merged over runs."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tessella import _native


@dataclass
class Record:
    """One measured case. Times are medians in microseconds.

    `case` keys are the dimension letters plus scheme, act, timing, threads, isa... as the
    targets fix them; `baselines` are times of the same case in the same run; `spread` is the
    interquartile range over the median, so that a busy machine shows.
    """

    family: str
    kernel: str
    case: dict[str, Any]
    us: float
    roofline_us: float
    baselines: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    spread: float = 0.0

    def to_json(self, stamp: dict[str, str]) -> dict[str, Any]:
        """The record as the results files hold it, with its fraction of the roofline."""
        d = asdict(self)
        d["roofline_frac"] = round(self.roofline_us / self.us, 4) if self.us else 0.0
        for name in ("us", "roofline_us", "spread"):
            d[name] = round(d[name], 4)
        d["baselines"] = {k: round(v, 4) for k, v in self.baselines.items()}
        return d | stamp


def stamp(device: str) -> dict[str, str]:
    """commit, date, torch and device of a run."""
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "device": device_name(device),
    }


def _commit() -> str:
    """The checkout's commit, marked if it has changes; else the commit the build was made from.

    Results files do not count as changes: a run of several families writes them as it goes.
    """
    root = Path(__file__).resolve().parents[3]
    try:
        if not (root / "csrc/families.h").exists():
            raise FileNotFoundError("not a checkout")
        commit = _git(root, "rev-parse", "--short=7", "HEAD")
        changes = _git(root, "status", "--porcelain", "-uno", "--", ".", ":!bench/results")
        return f"{commit}-dirty" if changes else commit
    except (OSError, subprocess.CalledProcessError):
        built = _native._C.build_info()["git"] if _native._C else ""
        return os.environ.get("TESSELLA_COMMIT", built or "unknown")


def _git(root: Path, *args: str) -> str:
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def device_name(device: str) -> str:
    """What the hardware calls itself: the GPU's name, or the CPU model and its core count."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = "CPU"
    with open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model}, {os.cpu_count()} cores"


def device_folder(device: str) -> str:
    """Results folder of a device: "cpu", or a GPU's short name such as "h200"."""
    if device == "cpu":
        return "cpu"
    return torch.cuda.get_device_name().lower().replace("nvidia", "").split()[0]


def _key(record: dict[str, Any]) -> str:
    """What makes two records the same measurement; a better kernel replaces a worse one."""
    return json.dumps([record["family"], record["case"], record["device"]], sort_keys=True)


def save(path: Path, records: list[dict[str, Any]]) -> None:
    """Merge records into a results file: a case measured again replaces its old record."""
    old = json.loads(path.read_text()) if path.exists() else []
    merged = {_key(r): r for r in old} | {_key(r): r for r in records}
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n ".join(json.dumps(r) for r in merged.values())
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"[\n {rows}\n]\n")
    temporary.replace(path)
