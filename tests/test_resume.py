"""Conversions that are killed, interrupted or run out of disk, and how they resume."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import tiny
from tessella.models import partial
from tessella.models.convert import convert
from tessella.models.errors import ConversionError
from tessella.models.partial import STATE
from tessella.quant.recipe import PRESETS
from tiny import contents

W4A8 = PRESETS["w4a8"]
SHARDS = tiny.LAYERS + 2
LINEARS = 7 * tiny.LAYERS


@pytest.fixture(scope="module")
def converted(llama, tmp_path_factory) -> Path:
    """An uninterrupted conversion of `llama`."""
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(llama, out, W4A8)
    return out


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


KILLED = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
from tessella.models.convert import convert
from tessella.quant.recipe import PRESETS

def progress(p):
    if p.done == {kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)

{before}
convert(sys.argv[1], sys.argv[2], PRESETS["w4a8"], progress=progress)
"""


def run(code: str, *args: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_a_killed_conversion_resumes_with_the_same_bytes(llama, converted, tmp_path):
    out, work = tmp_path / "out", tmp_path / "out.partial"
    code = KILLED.format(kill_at=7 + 3, before="")  # in the middle of the second layer
    assert run(code, llama, out).returncode == -signal.SIGKILL
    assert not out.exists() and (work / STATE).exists()
    done = {p.name: p.stat() for p in work.glob("*.safetensors")}
    assert len(done) == 2, "embedding and first layer"

    seen = []
    report = convert(
        llama,
        out,
        W4A8,
        resume=True,
        progress=lambda p: seen.append({q.name: q.stat() for q in work.glob("*.safetensors")}),
    )
    assert contents(out) == contents(converted)
    for name, stat in done.items():
        assert (out / name).stat().st_ino == stat.st_ino, "finished shards are not written again"
        assert (out / name).stat().st_mtime_ns == stat.st_mtime_ns
    assert len(report.layers) == LINEARS and all(r.rel_error for r in report.layers)
    assert len(seen) == LINEARS and not work.exists()


FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
"""


def test_a_disk_that_fills_up(llama, converted, tmp_path):
    """A file size limit makes a real write fail in the middle of the second layer's shard."""
    out = tmp_path / "out"
    size = (converted / f"model-00002-of-{SHARDS:05d}.safetensors").stat().st_size
    result = run(KILLED.format(kill_at=-1, before=FULL_DISK.format(limit=size - 100)), llama, out)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "ConversionError" in last and f"model-00002-of-{SHARDS:05d}.safetensors" in last
    assert "cannot be written" in last and "bytes needed" in last
    assert not out.exists()
    left = {p.name for p in (tmp_path / "out.partial").iterdir()}
    assert left == {STATE, f"model-00001-of-{SHARDS:05d}.safetensors"}
    convert(llama, out, W4A8, resume=True)
    assert contents(out) == contents(converted)


def interrupt_at(done: int, error: type[BaseException]):
    def progress(p):
        if p.done == done:
            raise error

    return progress


@pytest.mark.parametrize("done", [1, 7, LINEARS])
def test_ctrl_c(llama, converted, tmp_path, done):
    out, work = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(KeyboardInterrupt):
        convert(llama, out, W4A8, progress=interrupt_at(done, KeyboardInterrupt))
    assert not out.exists() and not list(work.glob("*.tmp"))
    convert(llama, out, W4A8, resume=True)
    assert contents(out) == contents(converted)


@pytest.mark.parametrize("step", range(1 + 2 * (2 * SHARDS + 1 + 2 + 5) + 1))
def test_every_flush_may_fail(llama, converted, tmp_path, monkeypatch, step):
    """Whichever write fails, nothing stands at the target, and resuming gives the same bytes.

    A file takes two flushes. There are the shards, the record at first and after each shard, the
    index, config.json and five files carried over; one flush publishes, and one is never reached.
    """
    out, flush, flushed = tmp_path / "out", partial._flush, []

    def fail(path):
        flushed.append(path)
        if len(flushed) == step + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    with monkeypatch.context() as m:
        m.setattr(partial, "_flush", fail)
        if step < 2 * (2 * SHARDS + 1 + 2 + 5):
            with pytest.raises(ConversionError, match=r"cannot be written.*No space left"):
                convert(llama, out, W4A8)
            assert not out.exists()
            assert not list((tmp_path / "out.partial").glob("*.tmp"))
        else:
            convert(llama, out, W4A8)
            assert len(flushed) == 1 + 2 * (2 * SHARDS + 1 + 2 + 5)
    if not out.exists():
        convert(llama, out, W4A8, resume=True)
    assert contents(out) == contents(converted)


def start(llama: Path, out: Path) -> Path:
    """Leave a conversion that was interrupted after the first layer."""
    with pytest.raises(KeyboardInterrupt):
        convert(llama, out, W4A8, progress=interrupt_at(8, KeyboardInterrupt))
    return out.with_name(out.name + ".partial")


def test_without_resume_a_conversion_starts_over(llama, converted, tmp_path):
    work = start(llama, tmp_path / "out")
    before = {p.name: p.stat().st_ino for p in work.glob("*.safetensors")}
    (work / "model-00001-of-00004.safetensors").write_bytes(b"stale")
    convert(llama, tmp_path / "out", W4A8)
    assert before and contents(tmp_path / "out") == contents(converted)


def test_resume_without_an_interrupted_conversion(llama, converted, tmp_path):
    convert(llama, tmp_path / "out", W4A8, resume=True)
    assert contents(tmp_path / "out") == contents(converted)


def test_a_damaged_shard_is_made_again(llama, converted, tmp_path):
    work = start(llama, tmp_path / "out")
    shard = work / f"model-00002-of-{SHARDS:05d}.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    convert(llama, tmp_path / "out", W4A8, resume=True)
    assert contents(tmp_path / "out") == contents(converted)


def test_resume_refuses_another_recipe(llama, tmp_path):
    work = start(llama, tmp_path / "out")
    left = contents(work)
    with pytest.raises(ConversionError, match=r"cannot resume: .* another recipe: .*w4a8-g128"):
        convert(llama, tmp_path / "out", PRESETS["w4a8-g128"], resume=True)
    assert contents(work) == left, "a refusal leaves the interrupted conversion alone"


def test_resume_refuses_another_source(copy, tmp_path):
    start(copy, tmp_path / "out")
    w = load_file(copy / "model.safetensors")
    w["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(w, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"cannot resume: .* another source"):
        convert(copy, tmp_path / "out", W4A8, resume=True)


def test_resume_refuses_a_damaged_record(llama, tmp_path):
    work = start(llama, tmp_path / "out")
    (work / STATE).write_text("{")
    with pytest.raises(ConversionError, match=rf"{STATE}: cannot resume from this record"):
        convert(llama, tmp_path / "out", W4A8, resume=True)


def test_two_conversions_at_once(llama, tmp_path):
    work = start(llama, tmp_path / "out")
    left = contents(work)
    lock = os.open(work, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ConversionError, match=r"out.partial: another conversion .* is running"):
        convert(llama, tmp_path / "out", W4A8)
    os.close(lock)
    assert contents(work) == left
