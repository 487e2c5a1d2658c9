"""Benches: selection, records, reports, and the commands. Nothing here asserts a time."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from command import one_object, refused, run
from tessella import _native
from tessella.bench import (
    BenchError,
    e2e,
    families,
    plots,
    records,
    report,
    suite,
    tables,
    timing,
)
from tessella.bench import rivals as rival_kinds
from tessella.bench.records import Record
from tessella.bench.suite import Family, Prepared, Selection, Settings, Subject
from tessella.formats import SCHEMES
from tessella.ops import w4_pack
from tessella.testing.cases import random_weight
from tessella.testing.metrics import relative_diff

needs_native = pytest.mark.skipif(_native._C is None, reason="needs compiled kernels")
needs_matplotlib = pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib")

STAMP = {"commit": "abc1234", "date": "2026-01-01", "torch": "2.13.0", "device": "CPU, 2 cores"}
KEYS = {"family", "kernel", "case", "us", "roofline_us", "roofline_frac", "baselines", "extra"}
KEYS |= {"spread", *STAMP}


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


# ---------------------------------------------------------------- selection and running


def family_of_two(log: list) -> Family:
    """A family whose calls only note that they ran."""

    def prepare(case, selection):
        subjects = [
            Subject(
                name=act,
                kernel=f"toy.{act}",
                case={"act": act},
                call=lambda i, act=act: log.append((case["M"], act)),
                nbytes=1000,
                macs=10,
                parts={"quant": lambda i: log.append("quant")},
                predicted_us=lambda limits: 1.5,
            )
            for act in ("x", "y")
            if selection({"act": act})
        ]
        rivals = {"torch": lambda i: log.append("torch")}
        return Prepared(subjects, rivals, {"alone": lambda i: log.append("alone")}, {"gone": "why"})

    return Family(
        "toy",
        "cpu",
        lambda quick: [{"M": M} for M in ((1,) if quick else (1, 2, 3))],
        prepare,
        {"M": (1, 2, 3), "act": ("x", "y")},
        ("x", "y", "torch", "alone"),
    )


def settings(*filters, **kwargs) -> Settings:
    return Settings(selection=Selection(filters), reps=3, threads=(1,), **kwargs)


@needs_native
def test_records_of_a_run():
    log, seen = [], []
    family = family_of_two(log)
    made = list(suite.run(family, settings("M=1,3"), lambda *args: seen.append(args)))
    assert [(r.case["M"], r.case["act"]) for r in made] == [(1, "x"), (1, "y"), (3, "x"), (3, "y")]
    assert [(done, total) for done, total, _ in seen] == [(0, 2), (1, 2)]
    r = made[0].to_json(STAMP)
    assert r.keys() == KEYS
    assert r["kernel"] == "toy.x" and r["case"]["threads"] == 1 and r["case"]["isa"]
    assert r["baselines"].keys() == {"torch", "alone"} == r["extra"]["baseline_samples"].keys()
    assert r["extra"]["samples"] == 3 and r["extra"]["quant_us"] > 0
    assert r["extra"]["absent"] == {"gone": "why"} and r["extra"]["predicted_us"] == 1.5
    assert r["roofline_frac"] == pytest.approx(r["roofline_us"] / r["us"], rel=0.01, abs=1e-3)
    first, last = log.index("alone"), len(log) - log[::-1].index("alone")
    between = log[first : log.index("alone", first + 1)]
    assert set(between) == {"alone"} and last > first  # never between the interleaved ones


@needs_native
def test_a_rival_that_is_too_slow_is_named(monkeypatch):
    monkeypatch.setattr(
        suite,
        "time_cpu",
        lambda calls, **_: {n: timing.summarise([1]) for n in calls if n != "torch"},
    )
    r = next(suite.run(family_of_two([]), settings(quick=True))).to_json(STAMP)
    assert r["extra"]["too_slow"] == ["torch"] and r["baselines"].keys() == {"alone"}


@needs_native
def test_a_forced_kernel_makes_a_record_of_its_own(monkeypatch):
    monkeypatch.setenv("TESSELLA_FORCE", "toy.z")
    r = next(suite.run(family_of_two([]), settings(quick=True)))
    assert r.case["forced"] == "toy.z"


@pytest.mark.parametrize(
    "filters, words",
    [
        (["M"], ("KEY=VALUE", "'M'")),
        (["M="], ("KEY=VALUE",)),
        (["J=1"], ("M, act, threads", "'J'")),
        (["M=4"], ("1, 2, 3", "'4'")),
        (["threads=8"], ("expected one of 1", "'8'")),
    ],
)
def test_a_wrong_filter_names_the_right_ones(filters, words):
    with pytest.raises(BenchError) as e:
        suite.selected(family_of_two([]), settings(*filters))
    assert all(word in str(e.value) for word in words)


def test_an_empty_selection_is_refused():
    with pytest.raises(BenchError, match="no case of --quick is selected"):
        suite.selected(family_of_two([]), settings("M=3", quick=True))


def test_threads_are_restored_after_a_failure():
    def fail(case, selection):
        assert torch.get_num_threads() == 2
        raise RuntimeError("prepare failed")

    family = Family("toy", "cpu", lambda quick: [{}], fail, {}, ())
    with pytest.raises(RuntimeError, match="prepare failed"):
        list(suite.run(family, Settings(threads=(2,))))
    assert torch.get_num_threads() == 1


MISSING = {("e2e", "cuda"), ("mla", "cuda"), ("w4ax_chain", "cpu")}


@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.parametrize("name", families.FAMILIES)
def test_families_agree_with_their_cases(name, device):
    if (name, device) in MISSING:
        with pytest.raises(BenchError, match=f"{name}: has no cases for {device}"):
            families.load(name, device)
        return
    family = families.load(name, device)
    assert family.name == name and family.device == device
    for quick in (True, False):
        cases = family.cases(quick)
        assert cases and all(c.keys() <= family.values.keys() for c in cases)
        assert all(c[k] in family.values[k] for c in cases for k in c)
    assert len(family.cases(True)) < len(family.cases(False))


def test_a_device_may_have_cases_of_its_own(monkeypatch):
    module = SimpleNamespace(family=lambda device: (device, "own"))
    monkeypatch.setattr(families, "find_spec", lambda name: name == "tessella.bench.toy_cuda")
    monkeypatch.setattr(families, "import_module", lambda name: module)
    assert families.load("toy", "cuda") == ("cuda", "own")


# ---------------------------------------------------------------- what is timed


@pytest.mark.parametrize("name", rival_kinds.RIVALS)
@pytest.mark.parametrize("M", [1, 5])
def test_rivals_compute_the_product(name, M, rng):
    kind = rival_kinds.RIVALS[name]
    if why := kind.missing():
        pytest.skip(why)
    w_NK = torch.randn(256, 384, generator=rng).bfloat16()
    x_MK = torch.randn(M, 384, generator=rng).bfloat16()
    rival = kind(w_NK, 2, 1)
    want = x_MK.double() @ w_NK.double().T
    got = [rival.run(rival.input(x_MK), i).clone() for i in range(3)]
    assert got[0].shape == want.shape
    error = float((got[0].double() - want).norm() / want.norm())
    assert error < (0.15 if kind.bytes_per_weight < 1 else 0.03)
    assert torch.equal(got[1], got[0]) and torch.equal(got[2], got[0])


@needs_native
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_of_a_problem(scheme, rng):
    from tessella.bench.predict import Gemm

    problem = Gemm(3, 130, 384, scheme, "int8b128")
    weight = w4_pack(random_weight(scheme, 130, 384, rng)).blob.nbytes
    acts = torch.ops.tessella.act_quant(torch.randn(3, 384), -1, "block", None)
    assert problem.nbytes == weight + sum(t.nbytes for t in acts) + 3 * 130 * 2
    assert problem.macs == 3 * 130 * 384


def test_converted_models_share_all_but_the_linears(monkeypatch):
    monkeypatch.setitem(e2e.SHAPES, "test", e2e.SHAPES["tiny"] | {"num_hidden_layers": 1})
    original, plain = e2e.original("test"), e2e.converted("test", "w4a8")
    head = e2e.converted("test", "w4a8-head")
    embedding = original.get_input_embeddings().weight
    assert embedding.data_ptr() == original.get_output_embeddings().weight.data_ptr()
    for model in (plain, head):
        assert model.get_input_embeddings().weight.data_ptr() == embedding.data_ptr()
    assert isinstance(plain.get_output_embeddings(), torch.nn.Linear)
    assert isinstance(head.get_output_embeddings(), e2e.W4AxLinear)
    shared = [m.model.layers[0].self_attn.q_proj for m in (plain, head)]
    assert shared[0] is shared[1] and isinstance(shared[0], e2e.W4AxLinear)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        want, *got = (m(input_ids=ids).logits.float() for m in (original, plain, head))
    assert all(0 < relative_diff(g, want) < 0.05 for g in got)


def test_work_of_a_model(monkeypatch):
    monkeypatch.setitem(e2e.SHAPES, "test", e2e.SHAPES["tiny"] | {"num_hidden_layers": 1})
    model = e2e.original("test")
    linears = 256 * (256 + 64 + 64 + 256) + 3 * 256 * 512
    nbytes, macs = e2e.work(model, {"phase": "prefill", "B": 1, "ctx": 10})
    assert macs == 10 * linears + 256 * 1024
    assert nbytes == 2 * (linears + 256 * 1024) + 10 * 2 * 2 * 32 * 2
    assert e2e.work(model, {"phase": "decode", "B": 1, "ctx": 10})[1] == linears + 256 * 1024


@pytest.mark.parametrize("ctx", [5, 16])
def test_decode_leaves_the_cache_as_it_was(ctx, monkeypatch):
    monkeypatch.setitem(e2e.SHAPES, "test", e2e.SHAPES["tiny"] | {"num_hidden_layers": 1})
    call = e2e._decode(e2e.original("test"), {"phase": "decode", "B": 1, "ctx": ctx})
    first, second = call(0), call(1)
    assert first.shape == (1, 1, 1024) and torch.equal(first, second)


# ---------------------------------------------------------------- records


def gemm_record(M: int, N: int = 4096, us: float = 100.0, **changes) -> dict:
    """A stored record of w4ax_gemm."""
    case = {"M": M, "N": N, "K": 4096, "threads": 1, "scheme": "twolevel", "act": "int8"}
    extra = {"samples": 30, "gbs": 9.0, "gmacs": 16.0 * M, "ceiling_gbs": 20.0}
    extra |= {"ceiling_gmacs": 130.0, "quant_us": 5.0, "with_quant_us": 104.0}
    extra |= {"predicted_us": 80.0, "baseline_spread": {"torch_bf16": 0.02}}
    r = Record("w4ax_gemm", "w4ax_gemm.avx2.gemv", case, us, us / 2, {"torch_bf16": 3 * us}, extra)
    stored = r.to_json(STAMP)
    for key, value in changes.items():
        stored[key] = stored[key] | value if isinstance(value, dict) else value
    return stored


def test_a_case_measured_again_replaces_its_record(tmp_path):
    path = tmp_path / "cpu/w4ax_gemm.json"
    records.save(path, [gemm_record(1), gemm_record(4)])
    records.save(path, [gemm_record(4, us=50, kernel="w4ax_gemm.avx2.skinny"), gemm_record(16)])
    stored = json.loads(path.read_text())
    assert [(r["case"]["M"], r["us"]) for r in stored] == [(1, 100), (4, 50), (16, 100)]
    records.save(path, [gemm_record(1, device="another CPU")])
    assert len(json.loads(path.read_text())) == 4
    assert [p.name for p in path.parent.iterdir()] == ["w4ax_gemm.json"]


def test_stamp_names_this_machine(monkeypatch):
    s = records.stamp("cpu")
    assert s.keys() == STAMP.keys() and all(s.values())
    assert records.device_folder("cpu") == "cpu"

    def no_git(*args):
        raise FileNotFoundError

    monkeypatch.setattr(records, "_git", no_git)
    monkeypatch.setenv("TESSELLA_COMMIT", "fedcba9")
    assert records.stamp("cpu")["commit"] == "fedcba9"


# ---------------------------------------------------------------- tables and reports


def test_summary_is_a_geometric_mean_over_shapes():
    rows = [
        gemm_record(1),
        gemm_record(1, N=6144, baselines={"torch_bf16": 1200.0}),
        gemm_record(4),
    ]
    t = tables.summary(rows, "title")
    assert t.head == ["M", "of roofline", "vs torch_bf16"]
    assert t.rows == [["1", "50%", f"{math.sqrt(3 * 12):.2f}x"], ["4", "50%", "3.00x"]]
    assert "4096 x 4096, 6144 x 4096" in t.notes[0]
    assert "scheme twolevel" in t.notes[1]


def test_detail_shows_every_figure():
    t = tables.detail([gemm_record(16), gemm_record(2, us=2500)], "title")
    assert t.head[:4] == ["M", "µs", "spread", "of roofline"]
    assert t.head[4:] == ["quant µs", "with quant µs", "vs torch_bf16", "predicted / measured"]
    assert t.rows[0] == ["2", "2,500", "0%", "50%", "5.0", "104.0", "3.00x", "0.03"]
    assert t.rows[1][0] == "16"


def test_unsteady_figures_are_marked():
    own = gemm_record(1, spread=0.5)
    rival = gemm_record(4, extra={"baseline_spread": {"torch_bf16": 0.4}})
    for make in (tables.detail, tables.summary):
        t = make([own, rival, gemm_record(16)], "title")
        marked = [[tables.MARK in cell for cell in row] for row in t.rows]
        assert marked[0].count(True) >= 2 and marked[0][-1 if make is tables.summary else -2]
        assert sum(marked[1]) == 1 and not any(marked[2])
        assert tables.MARK_NOTE in t.notes


def test_missing_rivals_are_explained():
    slow = gemm_record(
        1, extra={"too_slow": ["torch_bf16"], "most_s": 5.0, "absent": {"openvino": "not there"}}
    )
    slow["baselines"] = {}
    t = tables.summary([slow, gemm_record(4)], "title")
    assert t.rows[0][-1] == "too slow" and t.rows[1][-1] == "3.00x"
    assert any("openvino (not there)" in n for n in t.notes)
    assert any("more than 5 seconds" in n for n in t.notes)


def test_text_is_aligned():
    t = tables.Table(
        "title", ["M", "vs torch_bf16"], [["16", "3.00x"], ["512", "11.00x"]], ["note"]
    )
    lines = ["title", "         vs", "      torch", "  M    bf16", " 16   3.00x", "512  11.00x"]
    assert t.text() == "\n".join([*lines, "note"])


def test_tables_escape_html():
    t = tables.Table("t", ["a<b", "c"], [["1", "<script>"]])
    assert "<script>" not in t.html() and "&lt;script&gt;" in t.html()


@pytest.fixture
def results(tmp_path):
    """A small folder of results: two families, two devices, and a file of another kind."""
    gemms = [gemm_record(M, N, threads) for M in (1, 16) for N in (4096, 6144) for threads in (90,)]
    gemms += [r | {"case": r["case"] | {"threads": 2}} for r in gemms]
    records.save(tmp_path / "cpu/w4ax_gemm.json", gemms)
    other = [r | {"device": "other", "case": r["case"] | {"M": 8}} for r in gemms[:1]]
    records.save(tmp_path / "cpu/w4ax_gemm.json", other)
    case = {"model": "tiny", "phase": "decode", "B": 1, "ctx": 16, "threads": 1, "recipe": "w4a8"}
    e2e_record = gemm_record(1) | {"family": "e2e", "case": case}
    e2e_record["extra"] = {"tokens": 1}
    records.save(tmp_path / "cpu/e2e.json", [e2e_record])
    (tmp_path / "accuracy").mkdir()
    (tmp_path / "accuracy/a.json").write_text('[{"model": "m", "ppl": 3.0}]')
    return tmp_path


@needs_matplotlib
def test_report(results, tmp_path):
    files = report.write(results, tmp_path / "out")
    names = {f.name for f in files}
    assert {"report.md", "report.html"} <= names and all(f.stat().st_size > 0 for f in files)
    drawn = [f for f in files if f.suffix == ".png"]
    assert len(drawn) == 3 * 2 + 3 + 1  # threads of one device, the other device, end to end
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in drawn)
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") == len(drawn)
    text = (tmp_path / "out/report.md").read_text()
    for words in ("w4ax_gemm on CPU, 2 cores", "w4ax_gemm on other", "tokens/s", "commit abc1234"):
        assert words in text
    assert "Predicted over measured time: median 0.89" in text


@needs_matplotlib
def test_plots_of_attention(tmp_path):
    case = {"kind": "decode", "B": 4, "ctx": 512, "q": 1, "H": 8, "J": 2, "D": 64, "page": 16}
    rival = {"sdpa_cudnn": 300.0}
    made = [
        gemm_record(1) | {"family": "kv4", "case": case | {"B": b, "kv": kv}, "baselines": rival}
        for b in (1, 8)
        for kv in ("int4", "int8")
    ]
    made[0]["baselines"] = {}  # a case that no rival takes
    alone = [r | {"baselines": {}} for r in made]
    latent = {k: v for k, v in case.items() if k not in ("kind", "J", "D", "page")}
    mla = [
        gemm_record(1) | {"family": "mla", "case": latent | {"L": 64, "R": 16, "latent": "int4"}}
    ]
    for records_, names in (
        (made, ["kv4-time", "kv4-speedup"]),
        (alone, ["kv4-time"]),
        (mla, ["mla-time"]),
    ):
        paths = plots.draw(records_, tmp_path, records_[0]["family"])
        assert [p.stem for p in paths] == names
        assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)


def test_the_repositorys_own_results_make_a_report(tmp_path):
    own = Path(__file__).resolve().parents[1] / "bench/results"
    if not own.is_dir():
        pytest.skip("not in a checkout")
    assert len(report.write(own, tmp_path / "out", images=False)) == 2


def test_report_without_plots_needs_no_matplotlib(results, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert len(report.write(results, tmp_path / "out", images=False)) == 2
    with pytest.raises(BenchError, match=r"pip install 'tessella\[plot\]'"):
        report.write(results, tmp_path / "out")


@pytest.mark.parametrize(
    "text, words",
    [
        (None, ("holds no results", "tessella bench")),
        ("{", ("a.json", "expected JSON")),
        ("{}", ("a.json", "expected a list", "dict")),
        ('[{"family": "x"}]', ("a.json", "record 0", "'kernel'")),
    ],
)
def test_report_refuses_damaged_results(text, words, tmp_path):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    done = run("bench", "report", "--results", tmp_path, "--out", tmp_path / "out")
    refused(done, *words)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- commands


@needs_native
@pytest.mark.parametrize("name", [n for n in families.FAMILIES if (n, "cpu") not in MISSING])
def test_quick_run(name, tmp_path):
    args = ("--quick", "--out", tmp_path, "--threads", 1, "--budget", 0.3, "--json")
    done = run("bench", name, *args)
    assert done.exit_code == 0, done.stderr
    answer = one_object(done.stdout)
    stored = json.loads((tmp_path / f"cpu/{name}.json").read_text())
    assert stored == answer["records"] and stored
    for r in stored:
        assert r.keys() == KEYS and r["family"] == name
        assert r["us"] > 0 and r["roofline_us"] > 0 and r["baselines"]
        assert {"threads", "isa"} <= r["case"].keys()
        assert r["extra"]["samples"] >= families.load(name, "cpu").fewest
    if name == "w4ax_gemm":
        gemm_keys = {"M", "N", "K", "scheme", "act", "timing", "threads", "isa"}
        assert all(r["case"].keys() == gemm_keys for r in stored)
        assert all(
            {"quant_us", "with_quant_us", "predicted_us"} <= r["extra"].keys() for r in stored
        )
    shown = run("bench", "report", "--results", tmp_path, "--out", tmp_path / "out", "--no-plots")
    assert shown.exit_code == 0 and "report.html" in shown.stdout


@pytest.mark.parametrize(
    "args",
    [
        ["bench"],
        ["bench", "nonsense"],
        ["bench", "act_quant", "--threads", "0"],
        ["bench", "act_quant", "--device", "tpu"],
    ],
    ids=" ".join,
)
def test_wrong_usage(args):
    assert run(*args).exit_code == 2


def test_a_wrong_filter_is_refused_on_one_screen(tmp_path):
    done = run("bench", "act_quant", "--filter", "M=3", "--out", tmp_path)
    refused(done, "M: expected one of", "'3'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_device_is_refused(tmp_path):
    refused(run("bench", "all", "--device", "cuda", "--out", tmp_path), "torch finds no CUDA GPU")
