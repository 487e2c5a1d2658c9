"""Around the Ascend kernels: what a build and a bench without the hardware say, and predictions."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from ascend_twin import ROOT, build, ops
from command import run
from tessella.bench import BenchError, ascend, ascend_npu
from tessella.bench.predict import Gemm

FAKE_CANN = """
function(ascendc_library name kind)
  add_library(${name} INTERFACE)
endfunction()
function(ascendc_include_directories)
endfunction()
"""


@pytest.fixture
def npu_build(tmp_path):
    """Configures ascend/ for a 910B; returns the exit status and all that was said."""

    def configure(**environment: str) -> tuple[int, str]:
        env = {k: v for k, v in os.environ.items() if k not in ("ASCEND_HOME_PATH", "SOC_VERSION")}
        command = ["cmake", "-S", ROOT / "ascend", "-B", tmp_path / "build", "-G", "Ninja"]
        command += ["-DTESSELLA_ASCEND=NPU", f"-DPython_EXECUTABLE={sys.executable}"]
        done = subprocess.run(command, env=env | environment, capture_output=True, text=True)
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    build("twin_tests")  # skips where there is no CMake
    return configure


def fake_cann(folder, text=FAKE_CANN):
    """A folder that passes for a CANN toolkit during configuration."""
    path = folder / "cann/tools/tikcpp/ascendc_kernel_cmake/ascendc.cmake"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return str(folder / "cann")


def fake_torch_npu(folder, version: str) -> str:
    """A folder in which a package torch_npu of this version seems to be installed."""
    (folder / "torch_npu").mkdir(parents=True)
    (folder / "torch_npu/__init__.py").write_text("raise ImportError('libhccl.so is missing')\n")
    info = folder / f"torch_npu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
    return str(folder)


def test_no_cann(npu_build):
    status, said = npu_build()
    assert status != 0 and "no CANN toolkit: ASCEND_HOME_PATH is ''" in said


@pytest.mark.parametrize("soc", ["", "Ascend310P3", "Ascend910A", "Ascend910B9"])
def test_another_chip(soc, npu_build, tmp_path):
    status, said = npu_build(ASCEND_HOME_PATH=str(tmp_path), SOC_VERSION=soc)
    assert status != 0 and "SOC_VERSION: expected Ascend910B1..B4" in said
    assert f"got '{soc}'" in said


def test_cann_without_its_compiler(npu_build, tmp_path):
    status, said = npu_build(ASCEND_HOME_PATH=str(tmp_path), SOC_VERSION="Ascend910B2")
    assert status != 0 and "has no ascendc.cmake" in said


def test_no_torch_npu(npu_build, tmp_path):
    status, said = npu_build(ASCEND_HOME_PATH=fake_cann(tmp_path), SOC_VERSION="Ascend910B2")
    assert status != 0 and "torch_npu is not installed in" in said


def test_torch_npu_of_another_minor_version(npu_build, tmp_path):
    path = fake_torch_npu(tmp_path / "site", "1.0.1")
    status, said = npu_build(
        ASCEND_HOME_PATH=fake_cann(tmp_path), SOC_VERSION="Ascend910B2", PYTHONPATH=path
    )
    assert status != 0 and "torch_npu 1.0.1 does not go with torch" in said


def test_a_toolkit_that_fits_configures(npu_build, tmp_path):
    version = ".".join(torch.__version__.split(".")[:2])
    path = fake_torch_npu(tmp_path / "site", f"{version}.7")
    status, said = npu_build(
        ASCEND_HOME_PATH=fake_cann(tmp_path), SOC_VERSION="Ascend910B2", PYTHONPATH=path
    )
    assert status == 0, said


def test_an_unknown_kind_of_build(tmp_path):
    command = ["cmake", "-S", ROOT / "ascend", "-B", tmp_path, "-G", "Ninja"]
    build("twin_tests")
    done = subprocess.run([*command, "-DTESSELLA_ASCEND=MAYBE"], capture_output=True, text=True)
    assert done.returncode != 0 and "expected OFF, TWIN or NPU, got 'MAYBE'" in done.stderr


def test_the_bench_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    with pytest.raises(BenchError, match="needs torch_npu and CANN on this machine"):
        next(ascend_npu.run(quick=True))
    monkeypatch.syspath_prepend(fake_torch_npu(tmp_path, "2.0.0"))
    with pytest.raises(BenchError, match=r"libhccl.so is missing"):
        next(ascend_npu.run(quick=True))
    with pytest.raises(SystemExit, match="needs torch_npu"):
        ascend_npu.main(["--quick", "--out", str(tmp_path / "out")])


@pytest.fixture
def twin(monkeypatch):
    """The emulator, for tessella.bench.ascend."""
    ops()
    monkeypatch.setenv("TESSELLA_ASCEND_TWIN", str(build("_ascend_twin") / "_ascend_twin.so"))


@pytest.mark.parametrize("M, mode", [(1, "split"), (63, "split"), (64, "widen"), (500, "widen")])
@pytest.mark.parametrize("scheme", ["channel", "g128", "twolevel"])
def test_counts_are_those_of_the_problem(M, mode, scheme, twin):
    """The instructions that are counted do each product once, and read each weight once a tile."""
    N, K, chip = 512, 1024, ascend.Chip(cores=5)
    problem = Gemm(M, N, K, scheme)
    plan, cores = ascend.plan(problem, chip), ascend.counts(problem, chip)
    assert ascend.MODES[plan["mode"]] == mode and len(cores) == 3 * plan["cores"]
    rows = [min(plan["tokens"], M - i * plan["tokens"]) for i in range(plan["m_tiles"])]
    rows = [2 * r + 1 if mode == "split" else max(r, 2) for r in rows]
    k, kind = (64, "s4") if mode == "split" else (32, "s8")
    want = sum(-(-r // 16) for r in rows) * (N // 16) * (K // k)
    assert sum(c[f"fractals_{kind}"] for c in cores) == want
    weights = plan["m_tiles"] * N * K // 2
    if mode == "split":
        activations = sum(rows) * plan["n_tiles"] * K // 2
        assert sum(c["bytes_gm_l1"] for c in cores) == weights + activations
    else:
        read = sum(c["bytes_gm_ub"] for c in cores)
        assert read > weights
        assert sum(c["bytes_gm_l1"] for c in cores) == 2 * weights + M * plan["n_tiles"] * K


def test_every_tile_is_in_the_plan_once(twin):
    """The table of tasks: every core has a share, and no tile is left out or done twice."""
    for M, N, cores in ((1, 64, 1), (300, 1000, 7), (64, 4096, 24), (1000, 130, 5)):
        table = (
            ops().gemm_plan(torch.empty(0), M, N, 256, "channel", True, False, cores, "").tolist()
        )
        plan = dict(zip(ascend.HEADER, table))
        first = table[plan["tasks_at"] : plan["tasks_at"] + plan["cores"] + 1]
        tasks = table[plan["tasks_at"] + plan["cores"] + 1 :]
        tiles = set(zip(tasks[::2], tasks[1::2]))
        assert len(tasks) == 2 * first[-1] and first[0] == 0
        assert tiles == {(m, n) for m in range(plan["m_tiles"]) for n in range(plan["n_tiles"])}
        assert len(tiles) == first[-1]
        shares = [b - a for a, b in itertools.pairwise(first)]
        assert max(shares) - min(shares) <= 1
        assert plan["m_tiles"] * plan["tokens"] >= M and plan["n_tiles"] * plan["n_tile"] >= N


@pytest.mark.parametrize("M", [1, 16, 64, 1024])
def test_a_prediction_respects_the_roofline(M, twin):
    p = ascend.predict(Gemm(M, 4096, 4096, "twolevel"))
    assert 0 < p.roofline_frac <= 1
    assert p.us >= max(p.memory_us, p.l2_us, p.cube_us, p.vector_us)
    assert p.bound in ("memory", "L2", "cube cores", "vector cores")


def test_plan_command(twin):
    done = run("plan", "gemm", "16", "1024", "1024", "--arch", "910b", "--json")
    answer = json.loads(done.stdout)
    assert answer["plan"]["kernel"] == "w4ax_gemm.910b.split"
    assert answer["plan"]["measured"] is False and answer["ceilings"]["arch"] == "910b"
    said = run("plan", "gemm", "16", "1024", "1024", "--arch", "910b").stdout
    assert "a prediction, not run on a 910B" in " ".join(said.split())


def test_plan_command_without_the_emulator(monkeypatch):
    monkeypatch.setenv("TESSELLA_ASCEND_TWIN", "nowhere.so")
    done = run("plan", "gemm", "16", "1024", "1024", "--arch", "910b")
    assert done.exit_code == 1
    assert "TESSELLA_ASCEND_TWIN=nowhere.so is no file" in " ".join(done.stderr.split())


def test_plan_command_refuses_schemes_that_the_kernels_do_not_have(twin):
    done = run("plan", "gemm", "16", "1024", "1024", "--arch", "910b", "--scheme", "g32")
    assert done.exit_code == 1 and "channel, g128 or twolevel" in " ".join(done.stderr.split())
