"""The recipes' table and its front, the papers' page: also where files are missing."""

from __future__ import annotations

import json

import pytest

from command import answer_of, run
from tessella.bench import choice, papers
from tessella.bench.papers import CLAIMS, MLA, RECIPES, Results
from tessella.quant.recipe import PRESETS

EVALUATION = {
    "model": "m",
    "kv": None,
    "ctx": 64,
    "tokens": 500,
    "outliers": None,
    "ppl": 5.5,
    "ppl_ratio": 1.1,
    "ppl_ratio_stderr": 0.01,
    "w4a4_fraction": 0.8,
    "weight_bytes": 2_000_000,
    "cache_bytes_per_token": None,
    "commit": "abc1234",
    "date": "2026-01-02",
}


def reader(files: dict):
    texts = {f"bench/results/{k}": json.dumps(v) for k, v in files.items()}
    return texts.__getitem__


def gemm(us: float, bf16: float, **case) -> dict:
    case = {"scheme": "twolevel", "act": "int8", "isa": "avx512vnni"} | case
    case = {"M": 1, "N": 64, "K": 64, "threads": 1} | case
    return {"family": "w4ax_gemm", "case": case, "us": us, "baselines": {"torch_bf16": bf16}}


def test_the_table_joins_accuracy_bytes_and_speed():
    evaluations = [
        EVALUATION | {"recipe": "w4ax", "outliers": "1.00% x100", "ppl_ratio": 1.3},
        EVALUATION | {"recipe": "w4ax"},
        EVALUATION | {"recipe": "w4a8", "w4a4_fraction": 0.0},
        EVALUATION | {"recipe": "bf16", "w4a4_fraction": None, "ppl_ratio": 1.0},
        EVALUATION | {"recipe": "w4a8", "model": "other"},
    ]
    speeds = [gemm(10, 40), gemm(10, 90, N=128), gemm(5, 1000, act="int8b128")]
    speeds.append(gemm(5, 5, isa="avx2"))
    results = Results(reader({RECIPES: evaluations, papers.CPU_GEMM: speeds}))
    assert choice.models(results) == ["m", "other"]
    table = choice.table(results, "m")
    cells = {row[0]: dict(zip(table.head, row)) for row in table.rows}
    assert list(cells) == ["`bf16`", "`w4a8`", "`w4ax`"]
    assert cells["`w4ax`"]["ratio, 1.00% x100"] == "1.3000 ± 0.0100"
    assert cells["`w4a8`"]["ratio, 1.00% x100"] == ""
    assert cells["`w4ax`"]["W4A4"] == "80%" and cells["`w4ax`"]["weights MB"] == "2.0"
    assert cells["`w4a8`"]["CPU M=1 vs bf16"] == "6.00x"  # geometric mean of 4 and 9
    assert cells["`w4ax`"]["CPU M=1 vs bf16"] == cells["`w4a8`"]["CPU M=512 vs bf16"] == ""
    assert cells["`bf16`"]["CPU M=1 vs bf16"] == "1.00x"
    assert "500 tokens" in table.notes[0] and "abc1234 of 2026-01-02" in table.notes[0]


def test_worst_ratio_and_front():
    results = Results(
        reader(
            {
                RECIPES: [
                    EVALUATION | {"recipe": "w4a8"},
                    EVALUATION | {"recipe": "w4a8", "outliers": "1.00% x20", "ppl_ratio": 1.7},
                ]
            }
        )
    )
    assert choice.rows(results, "m")[0].worst == 1.7
    points = [(1.0, 1.0), (2.0, 1.1), (2.0, 1.05), (1.5, 1.2), (3.0, 1.4), (0.5, 0.9)]
    assert choice.front(points) == [5, 0, 2, 4]
    assert choice.front([]) == []


@pytest.mark.parametrize(
    "recipe, act",
    [
        ("w4a8", "int8"),
        ("w4a8-b128", "int8b128"),
        ("w4a4", "int4b128"),
        ("w4ax", "mixed"),
        ("w4a8kv4", "int8"),
    ],
)
def test_activations_of_a_recipe(recipe, act):
    assert choice.acts(PRESETS[recipe]) == act


def test_every_claim_says_what_is_missing_without_files():
    text = papers.markdown(reader({}))
    rows = text.splitlines()[2:]
    assert len(rows) == len(CLAIMS)
    for claim in CLAIMS:
        row = next(r for r in rows if f"| {claim.number} |" in r and claim.paper in r)
        status = row.split("|")[4].strip()
        assert status in (papers.PREDICTED, papers.NOT, papers.PENDING)
    numbers = " ".join(c.number for c in CLAIMS)
    for number in ("2.88x", "2.02x", "1.2-3.5x", "20-90 %", "14.6 %", "21.5 %", "89 %", "75 %"):
        assert number in numbers
    for number in ("35 %", "2.69x / 2.43x", "12.3 % / 7.0 %"):
        assert number in numbers


def test_rows_fill_themselves():
    serve = [
        {"model_shape": "8b", "in": 1024, "out": 512, "recipe": r, "tok_s": t}
        for r, t in (("w4a16", 100.0), ("w4a8kv4", 150.0), ("w4a8kv4", 170.0), ("bf16", 85.0))
    ]
    plain = {"rank": 64, "rope": 32, "ranks": None, "hadamard": False, "healed": {}}
    mla = [{"model": "m", "recipe": "bf16", "kv": None, "ppl": 6.0, "latent": {}}]
    for fold, ppl in ((1, 12.0), (2, 10.0), ("adaptive", 9.0)):
        mla.append(mla[0] | {"ppl": ppl, "latent": plain | {"fold": fold}})
    mla.append(mla[0] | {"ppl": 6.1, "latent": plain | {"fold": "adaptive", "healed": {"gkd": 9}}})
    claims = {c.number: c for c in CLAIMS}
    results = Results(reader({papers.SERVE: serve, MLA: mla}))
    comet = claims["2.02x"].ours(results)
    assert comet.status == papers.MEASURED and "1.70x (8b)" in comet.text
    assert "2.00x (8b)" in claims["89 %"].ours(results).text
    folds = claims["35 %"].ours(results)
    assert folds.status == papers.MEASURED and "25 % (m, 64 + 32)" in folds.text


def test_speed_of_the_kernel_claim_is_the_mean_over_its_batches():
    records = [
        gemm(10, 0, M=M) | {"baselines": {"cublas_bf16": 10.0 * x}}
        for M, x in ((8, 100), (16, 2), (256, 8), (512, 100))
    ]
    ours = papers.CLAIMS[0].ours(Results(reader({papers.GEMM: records})))
    assert ours.text.startswith("**4.00x**") and "16: 2.00x, 256: 8.00x" in ours.text


def test_cost_of_decoding():
    """A bound from the roofline until the loop on widened weights is on record; negative shares."""
    claim = next(c for c in CLAIMS if c.number == "20-90 %")
    plain = gemm(10, 0, M=8192) | {"roofline_frac": 0.8, "extra": {}}
    bound = claim.ours(Results(reader({papers.GEMM: [plain]})))
    assert bound.status == papers.PREDICTED and "at most 20%" in bound.text
    shares = [
        gemm(10, 0, M=M) | {"roofline_frac": 0.8, "extra": {"dequant_share": x}}
        for M, x in ((64, -0.18), (256, 0.034))
    ]
    ours = claim.ours(Results(reader({papers.GEMM: [plain, *shares]})))
    assert ours.status == papers.MEASURED
    assert ours.text.startswith("-18% to 3% of the kernel's time") and "below 0 %" in ours.text
    assert "2 cases of M = 64 to 256" in ours.text
    one = claim.ours(Results(reader({papers.GEMM: shares[1:]})))
    assert "3% to 3%" in one.text and "below 0 %" not in one.text


def test_synthetic_layers_through_the_command(tmp_path):
    found = answer_of(run("bench", "fmpq", "--quick", "--out", tmp_path, "--json"))
    of = {r["recipe"]: r for r in found["records"]}
    stored = json.loads((tmp_path / "accuracy/fmpq_layer.json").read_text())
    assert stored == found["records"]
    assert of["w4a4"]["w4a4_fraction"] == 1 and of["w4a8"]["w4a4_fraction"] == 0
    assert 0 < of["w4ax"]["int8_channels"] < 1024
    assert of["w4ax"]["error"] < of["w4a4"]["error"] / 2
