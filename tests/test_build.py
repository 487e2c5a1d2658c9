"""The compiled libraries: what they link, what they say of themselves, and life without them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from tessella import _native, ops
from tessella._version import __version__
from tessella.ops._register import SCHEMAS
from tessella.testing.force import force, runnable

ROOT = Path(__file__).resolve().parent.parent
needs_c = pytest.mark.skipif(_native._C is None, reason="needs the compiled _C module")
needs_ops = pytest.mark.skipif(not _native.HAS_OPS, reason="needs the compiled kernels")


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env
    )


def test_references_stand_in_with_one_warning():
    """Without compiled libraries the same schemas work, slower, and say so once."""
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import torch, tessella\n"
        "    from tessella.testing.cases import random_weight\n"
        "    g = torch.Generator().manual_seed(1)\n"
        "    w = tessella.ops.w4_pack(random_weight('twolevel', 70, 200, g))\n"
        "    for _ in range(3):\n"
        "        a = tessella.ops.act_quant(torch.randn(5, 200, generator=g))\n"
        "        y = tessella.ops.w4ax_gemm(a, w, dtype=torch.float32)\n"
        "kinds = [x for x in seen if 'stand in' in str(x.message)]\n"
        "print(len(kinds), tessella._native.HAS_OPS, y.double().sum().item())\n"
    )
    outputs = []
    for disable in ("1", "0"):
        done = run_python(code, TESSELLA_DISABLE_NATIVE=disable)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.split())
    assert outputs[0][:2] == ["1", "False"]
    if _native.HAS_OPS:
        assert outputs[1][:2] == ["0", "True"]
    assert float(outputs[0][2]) == pytest.approx(float(outputs[1][2]), rel=1e-5)


def test_an_unknown_setting_is_named_when_a_kernel_is_asked_for():
    code = "import torch, tessella; tessella.ops.act_quant(torch.zeros(1, 128))"
    done = run_python(code, TESSELLA_CPU_ISA="mmx")
    assert not _native.HAS_OPS or "TESSELLA_CPU_ISA: expected one of" in done.stderr


@needs_ops
def test_every_schema_has_a_compiled_cpu_kernel():
    for name in SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tessella::{name}", "CPU"), name


@needs_c
def test_build_info_and_kernel_lists():
    info = _native._C.build_info()
    assert info["version"] == __version__
    assert isinstance(info["cuda"], bool) and (bool(info["cuda_archs"]) == info["cuda"])
    kernels = _native._C.kernels()
    isa = _native._C.cpu_isa()
    assert isa["supported"][-1] == "scalar" and isa["best"] in isa["supported"]
    for family in ("act_quant", "w4ax_gemm"):
        assert kernels[family] and all(k.startswith(family + ".") for k in kernels[family])
        assert runnable(family)
    compiled = {k.split(".")[1] for k in kernels["w4ax_gemm"]}
    for name in compiled - set(isa["supported"]):
        if name.startswith("sm"):
            continue
        with (
            force(f"act_quant.{name}"),
            pytest.raises(RuntimeError, match=f"this CPU cannot run 'act_quant.{name}'"),
        ):
            ops.act_quant(torch.zeros(1, 128))


@needs_ops
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_library_loads_with_and_without_cuda():
    """No CUDA library is linked, CUDA shims are weak, libstdc++ comes before libtorch."""
    library = _native._ops.__file__
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    needed = [line.split("[")[1].split("]")[0] for line in dynamic.splitlines() if "NEEDED" in line]
    assert needed[0].startswith("libstdc++")
    assert "libtorch.so" in needed and "libtorch_cpu.so" in needed
    assert not [n for n in needed if "cuda" in n or "c10" in n or "python" in n]
    symbols = subprocess.run(["readelf", "-Ws", library], capture_output=True, text=True).stdout
    for line in symbols.splitlines():
        if "aoti_torch_get_current_cuda_stream" in line:
            assert "WEAK" in line
    assert "PyInit__ops" in symbols


def backend():
    """The in-tree build backend as a module."""
    spec = importlib.util.spec_from_file_location("backend", ROOT / "_backend" / "backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(
    importlib.util.find_spec("scikit_build_core") is None, reason="needs scikit-build-core"
)
def test_backend_asks_for_torch_only_where_there_is_none(monkeypatch, tmp_path):
    b = backend()
    monkeypatch.delenv("TESSELLA_TORCH_ROOT", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert b._extra() == ["torch>=2.11,<3"]
    header = tmp_path / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert b._extra() == []
    b._point_cmake_at_torch()
    assert os.environ["TESSELLA_TORCH_ROOT"] == str(tmp_path / "torch")
    monkeypatch.setenv("TESSELLA_TORCH_ROOT", "/nowhere")
    assert b._host_torch() == str(tmp_path / "torch")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="needs an aarch64 cross compiler"
)
def test_sources_compile_for_aarch64(tmp_path):
    include = Path(torch.__file__).parent / "include"
    for source in sorted((ROOT / "csrc").rglob("*.cpp")):
        if source.name == "module.cpp":
            continue  # needs the target's Python headers
        subprocess.run(
            ["aarch64-linux-gnu-g++", "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror",
             "-fvisibility=hidden", "-Wno-psabi", "-I", ROOT / "csrc", "-isystem", include,
             "-DTORCH_TARGET_VERSION=0x020b000000000000", "-c", source, "-o", tmp_path / "x.o"],
            check=True,
        )  # fmt: skip
