"""The folder in which a conversion works until it is finished: ``<out>.partial``.

Every file is written under a temporary name, flushed to the disk and renamed, and the shards
that are finished are recorded the same way; at the end the whole folder is renamed to ``<out>``.
So nothing half-written ever stands at ``<out>``, and an interrupted conversion can resume with
the shards it has, provided that recipe and source are the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tessella.models.errors import ConversionError

STATE = ".tessella-conversion.json"
"""The record of a conversion: its fingerprint, and what was stored in each finished shard."""


class Partial:
    """The working folder of one conversion; use it as a context manager.

    Args:
        out: where the finished checkpoint will stand.
        fingerprint: what the bytes depend on (recipe, source, versions), as JSON values by topic.
        resume: keep the finished shards of an interrupted conversion with an equal fingerprint;
            otherwise they are discarded.

    Raises ConversionError: `out` is taken, the folder belongs to something else or to a running
    conversion, or `resume` meets another fingerprint.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any], resume: bool):
        check_target(out)
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.fingerprint = fingerprint
        self.finished: dict[str, dict[str, Any]] = {}
        with self._writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            self._take(resume)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_) -> None:
        os.close(self._lock)

    def _take(self, resume: bool) -> None:
        """Lock the folder, then keep or discard what an earlier conversion left in it."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConversionError(
                f"{self.folder}: another conversion to {self.out} is running"
            ) from None
        left = [p for p in self.folder.iterdir() if p.suffix != ".tmp"]
        if left and not (self.folder / STATE).exists():
            raise ConversionError(
                f"{self.folder}: expected an empty folder or one of an interrupted conversion, "
                f"found {left[0].name}"
            )
        if left and resume:
            self.finished = self._read_state()
        with self._writing(self.folder):
            for path in self.folder.iterdir():
                if path.name != STATE and path.name not in self.finished:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._write_state()

    def _read_state(self) -> dict[str, dict[str, Any]]:
        """Finished shards on record whose files are whole. The fingerprint must be equal."""
        try:
            state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            before, finished = dict(state["fingerprint"]), dict(state["finished"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ConversionError(
                f"{self.folder / STATE}: cannot resume from this record: {e}"
            ) from None
        for topic, now in self.fingerprint.items():
            if before.get(topic) != now:
                raise ConversionError(
                    f"{self.folder}: cannot resume: the interrupted conversion had another "
                    f"{topic}: expected {_brief(before.get(topic))}, got {_brief(now)}; "
                    "convert without resume to start over"
                )
        sizes = {p.name: p.stat().st_size for p in self.folder.iterdir()}
        return {name: f for name, f in finished.items() if sizes.get(name) == f["file_bytes"]}

    def _write_state(self) -> None:
        state = {"fingerprint": self.fingerprint, "finished": self.finished}
        self.write_text(STATE, json.dumps(state))

    def write_shard(self, name: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Store a shard and put it on record together with `record` (JSON values)."""
        size = sum(t.nbytes for t in tensors.values())
        self._write(name, lambda temp: save_file(tensors, temp, {"format": "pt"}), size)
        file_bytes = (self.folder / name).stat().st_size
        self.finished[name] = {"file_bytes": file_bytes, **record}
        self._write_state()

    def note(self, name: str, record: dict[str, Any]) -> None:
        """Put JSON values on record without a file; `finished[name]` has them after a resume."""
        self.finished[name] = {"file_bytes": None, **record}
        self._write_state()

    def write_text(self, name: str, text: str) -> None:
        """Store a text file."""
        self._write(name, lambda temp: temp.write_text(text, encoding="utf-8"), len(text))

    def copy_file(self, source: Path, name: str) -> None:
        """Store a copy of a file (its contents only)."""
        self._write(name, lambda temp: shutil.copyfile(source, temp), source.stat().st_size)

    def publish(self) -> None:
        """Rename the folder to `out`: the conversion is finished."""
        with self._writing(self.out):
            os.replace(self.folder, self.out)
        with contextlib.suppress(OSError):  # the checkpoint is whole and in its place
            (self.out / STATE).unlink()
            _flush(self.out.parent)

    def _write(self, name: str, write: Callable[[Path], Any], size: int) -> None:
        final, temp = self.folder / name, self.folder / f"{name}.tmp"
        try:
            with self._writing(final, size):
                final.parent.mkdir(exist_ok=True)
                write(temp)
                if name != STATE:  # safetensors makes its files readable for their owner only
                    shutil.copymode(self.folder / STATE, temp)
                _flush(temp)
                os.replace(temp, final)
                _flush(final.parent)
        finally:
            with contextlib.suppress(OSError):
                temp.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self, path: Path, size: int = 0):
        """Turn the errors of a full or failing disk into ConversionError."""
        try:
            yield
        except (OSError, SafetensorError) as e:
            needed = f" ({size} bytes needed, {free_bytes(path)} free)" if size else ""
            raise ConversionError(
                f"{path}: cannot be written{needed}: {e}; nothing was left at {self.out}, and "
                f"the finished shards are kept in {self.folder} for resume"
            ) from e


def check_target(out: Path) -> None:
    """Refuse (ConversionError) a target that exists, unless it is an empty folder."""
    if not out.name:
        raise ConversionError(f"{out}: expected a folder to create, got the root folder")
    if out.is_dir() and any(out.iterdir()):
        raise ConversionError(f"{out}: expected a new or an empty folder, found files in it")
    if out.exists() and not out.is_dir():
        raise ConversionError(f"{out}: expected a new or an empty folder, found a file")


def free_bytes(path: Path) -> int:
    """Free space where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _brief(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 300 else f"{text[:300]}..."
