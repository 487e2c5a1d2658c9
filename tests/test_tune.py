"""``tessella tune`` and its tables: what they override, and how a bad one is refused."""

from __future__ import annotations

import json

import pytest
import torch

from command import one_object, refused, run
from tessella import _native, ops, tuned
from tessella.bench import BenchError
from tessella.bench import tune as measuring
from tessella.formats import W4Weight
from tessella.testing.cases import random_weight
from tessella.testing.force import environment

ROW = {"scheme": "twolevel", "N": 128, "K": 256, "M": 8, "kernel": "w4ax_gemm.sm90.t8", "split": 1}
SM90 = _native._C is not None and any(".sm90." in k for k in _native._C.kernels()["w4ax_gemm"])
needs_sm90 = pytest.mark.skipif(not SM90, reason="needs a build with sm_90a kernels")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """An empty cache folder for every test; the real tables are back afterwards."""
    with monkeypatch.context() as m:
        m.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield
    tuned.install()


def test_a_table_is_written_at_once_and_merged(tmp_path):
    path = tuned.folder() / tuned.file_name("w4ax_gemm", "NVIDIA H200")
    assert path == tmp_path / "cache/tessella/tune/w4ax_gemm-nvidia-h200.json"
    tuned.write(path, "w4ax_gemm", "NVIDIA H200", [ROW, ROW | {"M": 16, "us": 3.5}])
    tuned.write(path, "w4ax_gemm", "NVIDIA H200", [ROW | {"split": 2}])
    assert tuned.read(path) == {
        "format": tuned.FORMAT,
        "family": "w4ax_gemm",
        "device": "NVIDIA H200",
        "rows": [ROW | {"split": 2}, ROW | {"M": 16, "us": 3.5}],
    }
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    fields = tuned.lines([path]).splitlines()[0].split("\t")
    assert fields[0] == f"{path}: row 0" and fields[1:4] == ["NVIDIA H200", "w4ax_gemm", "twolevel"]


@pytest.mark.parametrize(
    "text,words",
    (
        ("{", "expected a tuning table"),
        ("[]", "expected a tuning table of format 1"),
        ('{"format": 2}', "expected a tuning table of format 1"),
        ('{"format": 1, "family": "w4ax_gemm"}', "device: expected a name, got None"),
        ('{"format": 1, "family": "f", "device": "d"}', "rows: expected a list"),
        ({"kernel": 3}, "row 0: kernel: expected a name, got 3"),
        ({"kernel": "a\tb"}, "row 0: kernel: expected a name"),
        ({"split": 0}, "row 0: split: expected a positive number, got 0"),
        ({"N": "128"}, "row 0: N: expected a positive number, got '128'"),
    ),
)
def test_a_damaged_table_is_named(text, words, tmp_path):
    path = tmp_path / "bad.json"
    if isinstance(text, dict):
        table = {"format": 1, "family": "w4ax_gemm", "device": "GPU", "rows": [ROW | text]}
        text = json.dumps(table)
    path.write_text(text)
    with pytest.raises(tuned.TableError) as e:
        tuned.read(path)
    assert str(path) in str(e.value) and words in str(e.value)


@needs_sm90
def test_the_kernel_library_refuses_what_it_does_not_have(tmp_path):
    path = tmp_path / "t.json"
    tuned.write(path, "w4ax_gemm", "GPU", [ROW])
    tuned.use(tuned.lines([path]))
    tuned.write(path, "w4ax_gemm", "GPU", [ROW | {"kernel": "w4ax_gemm.sm90.t7"}])
    with pytest.raises(tuned.TableError) as e:
        tuned.use(tuned.lines([path]))
    for words in (f"{path}: row 0", "w4ax_gemm.sm90.t8", "got 'w4ax_gemm.sm90.t7'"):
        assert words in str(e.value)
    with pytest.raises(tuned.TableError, match="expected 9 fields in a row, got 2"):
        tuned.use("a\tb")


def test_shipped_tables_are_sound():
    paths = sorted(tuned.SHIPPED.glob("*.json"))
    tuned.use(tuned.lines(paths))
    for path in paths:
        table = tuned.read(path)
        assert path.name == tuned.file_name(table["family"], table["device"])
        assert all(r["M"] in measuring.M_VALUES for r in table["rows"])


def test_cases():
    found = measuring.cases(["llama3-8b"], ["twolevel", "g128"], [8, 64])
    assert len(found) == 4 * 2 * 2 and found[1] == found[0] | {"M": 64}
    with pytest.raises(BenchError, match=r"model: expected one of llama3-8b, .* got 'gpt'"):
        measuring.cases(["gpt"], ["twolevel"], [8])
    assert measuring.worth({"us": 90, "planner_us": 100})
    assert not measuring.worth({"us": 99, "planner_us": 100})


def test_command_line():
    assert run("tune").exit_code == 2
    assert run("tune", "act_quant").exit_code == 2
    assert run("tune", "w4ax_gemm", "--tokens", 4).exit_code == 2
    if not torch.cuda.is_available():
        refused(run("tune", "w4ax_gemm"), "no CUDA GPU")


def problem(rng):
    """(activations, packed weight) of the case of ROW on the GPU."""
    w = random_weight("twolevel", ROW["N"], ROW["K"], rng)
    w = W4Weight.from_tensors({n: t.cuda() for n, t in w.tensors().items()}, w.scheme, w.K)
    x = torch.randn(5, ROW["K"], generator=rng).bfloat16().cuda()
    return ops.act_quant(x), ops.w4_pack(w)


@pytest.mark.gpu
def test_a_table_overrides_the_planner(rng):
    a, w = problem(rng)
    want = ops.w4ax_gemm(a, w)
    device = torch.cuda.get_device_name()
    path = tuned.folder() / "mine.json"
    for row in (ROW, ROW | {"kernel": "w4ax_gemm.sm90.t64"}, ROW | {"split": 2}):
        tuned.write(path, "w4ax_gemm", device, [row])
        tuned.install()
        assert torch.equal(ops.w4ax_gemm(a, w), want)
    for change in ({"split": 3}, {"split": 64}, {"kernel": "w4ax_gemm.sm80.plain"}):
        tuned.write(path, "w4ax_gemm", device, [ROW | change])
        tuned.install()
        with pytest.raises(RuntimeError, match=r"mine.json: row 0: .* cannot run M=5 N=128 K=256"):
            ops.w4ax_gemm(a, w)
        with environment(TUNE="0"):
            assert torch.equal(ops.w4ax_gemm(a, w), want)
    path.write_text("{")
    tuned.install()
    with pytest.raises(RuntimeError, match=r"mine.json: expected a tuning table.*TESSELLA_TUNE=0"):
        ops.w4ax_gemm(a, w)


@pytest.mark.gpu
def test_tune_measures_and_writes(monkeypatch, tmp_path):
    monkeypatch.setitem(measuring.LINEARS, "llama3-8b", ((256, 512),))
    monkeypatch.setattr(measuring, "LEAST_GAIN", -1.0)
    args = ("--model", "llama3-8b", "--scheme", "twolevel", "--tokens", 16, "--out", tmp_path)
    answer = one_object(run("tune", "w4ax_gemm", *args, "--json").stdout)
    (row,) = answer["rows"]
    assert answer["measured"] == 1 and row["us"] > 0 and row["planner_us"] > 0
    assert tuned.read(tmp_path / tuned.file_name("w4ax_gemm", answer["device"]))["rows"] == [row]
