"""Reads Hugging Face checkpoints in safetensors, sharded or in one file, with thorough checks.

A safetensors file is: the header's length (8 bytes, little-endian), the header (JSON: dtype,
shape and byte range of each tensor), the data. Headers are read and checked when a checkpoint is
opened, so that a missing or cut file is found before any work is done; data is read on demand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tessella.models.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class TensorInfo:
    """Where a stored tensor is, and what it is; `dtype` in safetensors' words ("BF16", "U8")."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder: its config, and what each of its tensors is."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a folder with config.json and model.safetensors or model.safetensors.index.json.

        Raises CheckpointError, naming file and tensor: no such folder, no config, no safetensors,
        a shard that is missing, cut short or without a tensor that the index places in it.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path}: expected a folder with a checkpoint, found none")
        config = read_json(path / CONFIG)
        return cls(path, config, _tensors(path))

    @property
    def config_file(self) -> str:
        """Path of config.json, for messages."""
        return str(self.path / CONFIG)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def require(self, names: Iterable[str]) -> None:
        """Raise CheckpointError unless every tensor of `names` is stored."""
        for name in names:
            if name not in self.tensors:
                raise CheckpointError(
                    f"{self.path}: expected a tensor {name!r}, but no file of the checkpoint has it"
                )

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU. Raises CheckpointError when it is absent or unreadable."""
        self.require([name])
        file = self.tensors[name].file
        try:
            with safe_open(file, framework="pt") as f:
                return f.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{file}: tensor {name!r}: {e}") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError naming the file."""
    try:
        d = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{file}: cannot be read as JSON: {e}") from None
    if not isinstance(d, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(d).__name__}")
    return d


def read_header(file: Path) -> dict[str, TensorInfo]:
    """What a safetensors file holds. Raises CheckpointError when it is missing, cut or damaged."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{file}: truncated: expected a header of {length} bytes, got a file of {size}"
                )
            header = json.loads(f.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except OSError as e:
        raise CheckpointError(f"{file}: {e.strerror}") from None
    except ValueError as e:
        raise CheckpointError(f"{file}: not a safetensors file: {e}") from None
    data = size - 8 - length
    tensors = {}
    for name, t in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = t["data_offsets"]
            tensors[name] = TensorInfo(file, t["dtype"], tuple(t["shape"]), end - begin)
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{file}: tensor {name!r}: damaged header entry {t!r}") from None
        if end > data:
            raise CheckpointError(
                f"{file}: truncated: tensor {name!r} ends at byte {end} of the data, "
                f"but the file has {data}"
            )
    return tensors


def _tensors(path: Path) -> dict[str, TensorInfo]:
    """What the files of a checkpoint folder hold."""
    if (path / WEIGHTS).exists():
        return read_header(path / WEIGHTS)
    if not (path / INDEX).exists():
        others = sorted(p.name for p in path.glob("*.bin"))
        hint = f"; {others[0]} is not safetensors" if others else ""
        raise CheckpointError(f"{path}: expected {WEIGHTS} or {INDEX}, found neither{hint}")
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX}: weight_map: expected an object with file names")
    headers: dict[str, dict[str, TensorInfo]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{path / INDEX}: weight_map: {name!r}: expected a file name, got {shard!r}"
            )
        if shard not in headers:
            if not (path / shard).exists():
                raise CheckpointError(
                    f"{path / shard}: missing shard: {INDEX} expects tensor {name!r} in it"
                )
            headers[shard] = read_header(path / shard)
        if name not in headers[shard]:
            raise CheckpointError(
                f"{path / shard}: expected tensor {name!r} as {INDEX} says, found no such tensor"
            )
    return {name: headers[shard][name] for name, shard in weight_map.items()}
