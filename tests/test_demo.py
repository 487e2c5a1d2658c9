"""The demo, as a user starts it: with the kernels of this build, and with none."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from command import answer_of, refused, run, run_process
from tessella import _native
from tessella.cli import demo, loading, measure
from tessella.formats import W4Weight

LINEARS = 42
"""Of the bundled model: 6 layers of q, k, v, o, gate, up and down."""


def check(answer: dict) -> None:
    """What must hold of a demo's JSON whatever computed it."""
    before, after, cached = answer["original"], answer["converted"], answer["cached"]
    assert answer["recipe"] == "w4a8kv4-rtn"
    assert 4 < before["ppl"] < 20
    assert 0.98 < after["ppl_ratio"] < 1.1
    assert after["ppl"] / before["ppl"] == pytest.approx(after["ppl_ratio"])
    assert 0 < after["kl"] < 0.15 and 0.75 < after["top1"] < 1
    few = f"kv4: {measure.REFERENCE}" in answer["kernels"]
    most_ratio, most_kl = (1.3, 0.3) if few else (1.15, 0.2)  # references score 128 tokens only
    assert 0.97 < cached["ppl_ratio"] < most_ratio and 0 < cached["kl"] < most_kl
    assert after["cache_bytes_per_token"] == before["cache_bytes_per_token"]
    assert 0.25 < cached["cache_bytes_per_token"] / after["cache_bytes_per_token"] < 0.35
    assert cached["bytes"] == after["bytes"]
    for side in (before, after, cached):
        assert min(side["prefill_tok_s"], side["decode_tok_s"], side["ppl_stderr"]) > 0
        assert side["bytes"]["embeddings"] == 4096 * 256 * 2
        parts = [side["bytes"][k] for k in ("linears", "embeddings", "other")]
        assert side["bytes"]["total"] == sum(parts)
    layer = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 768
    assert before["bytes"]["linears"] == 6 * layer * 2
    assert answer["completion"] and answer["seconds"] > 0


def calls(kernels: dict[str, int], family: str) -> int:
    return sum(n for name, n in kernels.items() if name.startswith(family))


def test_the_demo(tmp_path):
    answer = answer_of(run_process("demo", "--keep", tmp_path / "kept", "--json"))
    check(answer)
    # One prompt and four tokens after it, the last of which is not fed back.
    # of a layer's seven linears the output projection quantises its own input, unless nothing is
    # compiled; the norms and the gates quantise for the others
    quantised = 3 if _native.HAS_OPS else 4
    assert calls(answer["kernels"], "act_quant") == LINEARS // 7 * quantised * 4
    products = 4 if _native.HAS_OPS else 7  # of a layer: q, k, v are one, and gate, up
    assert calls(answer["kernels"], "w4ax_gemm") == LINEARS // 7 * products * 4
    assert calls(answer["kernels"], "kv4_append") == 6 * 4 or not _native.HAS_OPS
    if _native.HAS_OPS:
        compiled = {name for names in _native._C.kernels().values() for name in names}
        for name in answer["kernels"].keys() - {"msm_plan", "kv4_append"}:
            assert any(c == name or c.startswith(f"{name}.") for c in compiled), name

    dtype = ("--dtype", loading.throughput_dtype(loading.Device.cpu).value)  # as the demo's
    prompt = ("--prompt", demo.BOS + demo.PROMPT)
    kept = run("generate", tmp_path / "kept", *prompt, *dtype, "--json")
    text = answer_of(kept)["text"]
    assert text.startswith(answer["completion"])


@pytest.mark.skipif(not _native.HAS_OPS, reason="the demo above ran on the reference already")
def test_the_demo_without_compiled_kernels():
    done = run_process("demo", "--json", TESSELLA_DISABLE_NATIVE="1")
    answer = answer_of(done)
    check(answer)
    assert set(answer["kernels"]) == {
        f"{family}: {measure.REFERENCE}" for family in ("act_quant", "w4ax_gemm", "msm", "kv4")
    }
    assert "No compiled kernels here" in done.stderr


@pytest.fixture
def tiny_budget(monkeypatch):
    budget = demo.Budget(eval_tokens=64, cache_tokens=64, prompt_chars=100, new_tokens=4, rounds=1)
    monkeypatch.setattr(demo, "COMPILED", budget)
    monkeypatch.setattr(demo, "STAND_IN", budget)


def test_the_demo_for_people(tiny_budget, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = run("demo", "--prompt", "class Stack:")
    assert result.exit_code == 0, result.stderr
    for word in ("original", "perplexity", "linears", "decode", "kernels that ran", "w4ax_gemm"):
        assert word in result.stdout
    assert "\nclass Stack:" in result.stdout
    assert list(tmp_path.iterdir()) == [], "the converted model was left behind"


def test_the_demo_keeps_nothing_over_what_is_there(tiny_budget, tmp_path):
    (tmp_path / "taken").write_text("")
    refused(run("demo", "--keep", tmp_path), str(tmp_path))


def test_the_demo_needs_the_bundled_model_and_the_library_source(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    refused(run("demo"), str(tmp_path), "no source text")
    monkeypatch.setattr(demo, "MODEL", tmp_path / "nothing")
    refused(run("demo"), "nothing", "missing")


def test_the_excerpts_are_the_same_each_time():
    excerpts = demo.stdlib_excerpts()
    assert excerpts == demo.stdlib_excerpts()
    assert len(excerpts) == len(demo.STDLIB_FILES)
    assert all(0 < len(text) <= demo.EXCERPT_CHARS for text in excerpts)


def test_weight_bytes_are_those_of_the_formats(tmp_path):
    run("quantize", demo.MODEL, tmp_path / "out", "--quiet")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    expected = 0
    with safe_open(demo.MODEL / "model.safetensors", "pt") as f:
        for name, layer in layers.items():
            N, K = f.get_slice(f"{name}.weight").get_shape()
            for dtype, shape in W4Weight.spec(layer["scheme"], N, K).values():
                size = dtype.itemsize
                for n in shape:
                    size *= n
                expected += size
    assert measure.weight_bytes(tmp_path / "out", set(layers)).linears == expected


def test_the_model_card_travels_with_the_model():
    card = (Path(demo.MODEL) / "MODEL_CARD.md").read_text()
    config = json.loads((demo.MODEL / "config.json").read_text())
    for fact in (
        f"{config['num_hidden_layers']} layers",
        f"hidden size {config['hidden_size']}",
        f"{config['vocab_size']} byte-level",
        "Apache-2.0",
        "demonstration only",
    ):
        assert fact in card
