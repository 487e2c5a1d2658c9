"""Recipes of several steps on checkpoints: convert, load, generate, resume; what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from command import answer_of, run
from tessella.integrations import calibrate, hf
from tessella.integrations.text import read_documents
from tessella.models import apply
from tessella.models import convert as converting
from tessella.models.apply import Calibration
from tessella.models.checkpoint import Checkpoint
from tessella.models.convert import convert
from tessella.models.errors import ConversionError
from tessella.models.linear import W4AxLinear
from tessella.quant.calibrate import SITES
from tessella.quant.qoq import Reorder, Rotate, SmoothAttention, SmoothOutput
from tessella.quant.recipe import PRESETS, Gptq, Recipe, Rtn
from tiny import contents

EVERYTHING = Recipe(
    "everything",
    steps=(
        Rotate(values=True),
        SmoothAttention(),
        SmoothOutput(sites=("down", "o")),
        Reorder(sites=tuple(SITES)),
        Gptq(act_order=True),
    ),
    lm_head=True,
)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    tiny.save(path, request.param, tied=request.param == "qwen2")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    g = torch.Generator().manual_seed(0)
    words = torch.randint(0, 91, (6, 120), generator=g).tolist()
    file = tmp_path_factory.mktemp("text") / "calib.txt"
    file.write_text("\0".join(" ".join(f"w{i}" for i in line) for line in words))
    return file


def calibration(folder: Path, text: Path, cache: Path | None = None) -> Calibration:
    """What the command makes of a text, with the tokenizer that the checkpoint was saved with."""
    batches = calibrate.token_batches(tiny.tokenizer(), read_documents(text), 6, 64)
    return Calibration(calibrate.CheckpointStream(str(folder)), batches, cache)


def distance(folder: Path, out: Path) -> float:
    """Relative error of the logits of a converted model."""
    ids = torch.arange(5, 69)[None]
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, _ = hf.load(str(out), dtype=torch.float32)
    with torch.no_grad():
        x, y = (m(input_ids=ids, use_cache=False).logits for m in (original, model))
    return ((x - y).norm() / x.norm()).item()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_convert_load_save_and_generate(name, llama, text, tmp_path):
    recipe = PRESETS[name]
    given = calibration(llama, text) if recipe.needs else None
    report = convert(llama, tmp_path / "out", recipe, calibration=given)
    model, tokenizer = hf.load(str(tmp_path / "out"), dtype=torch.float32)
    ids = tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert tokens.shape[1] > ids.shape[1]
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, _ = hf.load(str(tmp_path / "again"), dtype=torch.float32)
    assert torch.equal(again.generate(ids, max_new_tokens=5, do_sample=False), tokens)
    stored = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert Recipe.from_dict(stored["recipe"]) == recipe
    assert distance(llama, tmp_path / "out") < (0.8 if recipe.k8 == 0 else 0.4)
    assert all((r.after is not None) == bool(recipe.needs) for r in report.layers)


def test_everything_at_once(folder, text, tmp_path):
    """Runtime permutations, act order, a quantised head: close to the model, closer than rtn."""
    report = convert(folder, tmp_path / "out", EVERYTHING, calibration=calibration(folder, text))
    plain = Recipe("plain", lm_head=True, steps=(Rtn(clip="none"),))
    convert(folder, tmp_path / "plain", plain)
    assert distance(folder, tmp_path / "out") < distance(folder, tmp_path / "plain")
    model, _ = hf.load(str(tmp_path / "out"))
    perms = {
        n for n, m in model.named_modules() if isinstance(m, W4AxLinear) and m.perm is not None
    }
    wanted = {f"model.layers.{i}.{p}" for i in range(tiny.LAYERS) for s in SITES for p in SITES[s]}
    assert perms == {n for n in wanted if not n.endswith("down_proj")}
    size = sum(info.nbytes for info in Checkpoint.open(tmp_path / "out").tensors.values())
    assert report.bytes_out == size
    assert len(report.layers) == 7 * tiny.LAYERS + 1
    for r in report.layers:
        assert 0 < r.after < 0.2
        assert (r.before is None) == (r.name == "lm_head")


def test_linears_that_keep_their_precision(llama, text, tmp_path):
    """Skipped linears take part in the folds, and nobody permutes their inputs."""
    recipe = dataclasses.replace(EVERYTHING, skip=("*.o_proj", "*.up_proj", "*.0.self_attn.k_proj"))
    convert(llama, tmp_path / "out", recipe, calibration=calibration(llama, text))
    assert distance(llama, tmp_path / "out") < 0.25


def test_without_steps_a_calibration_changes_no_byte(llama, text, tmp_path):
    plain = convert(llama, tmp_path / "a", PRESETS["w4a8"])
    seen = convert(llama, tmp_path / "b", PRESETS["w4a8"], calibration=calibration(llama, text))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for a, b in zip(plain.layers, seen.layers):
        assert a.rel_error == b.rel_error and a.after is None
        assert b.before == pytest.approx(b.after) and 0.05 < b.after < 0.2


def test_conversion_is_deterministic_and_the_cache_changes_nothing(llama, text, tmp_path):
    for name, cache in (("a", None), ("b", tmp_path / "cache"), ("c", tmp_path / "cache")):
        given = calibration(llama, text, cache)
        convert(llama, tmp_path / name, EVERYTHING, calibration=given)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_resuming_gives_the_same_bytes(llama, text, tmp_path, monkeypatch):
    whole = convert(llama, tmp_path / "whole", EVERYTHING, calibration=calibration(llama, text))
    work, calls = apply.Applier.shard, []

    def fail(self, shard, advance):
        calls.append(shard.file)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return work(self, shard, advance)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(apply.Applier, "shard", fail)
        convert(llama, tmp_path / "out", EVERYTHING, calibration=calibration(llama, text))
    with pytest.raises(ConversionError, match="another calibration"):
        other = Calibration(calibrate.CheckpointStream(str(llama)), [torch.arange(40)[None]])
        convert(llama, tmp_path / "out", EVERYTHING, resume=True, calibration=other)
    given = calibration(llama, text)
    report = convert(llama, tmp_path / "out", EVERYTHING, resume=True, calibration=given)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert report.layers == whole.layers


def test_a_dry_run_knows_the_sizes(llama, text, tmp_path):
    given = calibration(llama, text)
    dry = convert(llama, tmp_path / "out", EVERYTHING, calibration=given, dry_run=True)
    assert not (tmp_path / "out").exists()
    wet = convert(llama, tmp_path / "out", EVERYTHING, calibration=given)
    assert (dry.bytes_in, dry.bytes_out) == (wet.bytes_in, wet.bytes_out)
    assert [(r.name, r.bytes) for r in dry.layers] == [(r.name, r.bytes) for r in wet.layers]
    assert (
        dry.memory_estimate
        == wet.memory_estimate
        > converting.memory_estimate(Checkpoint.open(llama), [], PRESETS["w4a8"], None)
    )


def test_a_tied_head_is_untied_by_a_rotation(tmp_path, text):
    tiny.save(tmp_path / "model", "llama", tied=True)
    recipe = Recipe("turned", steps=(Rotate(), Rtn()))
    convert(tmp_path / "model", tmp_path / "out", recipe)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert distance(tmp_path / "model", tmp_path / "out") < 0.35


@pytest.mark.parametrize("name", [n for n, r in PRESETS.items() if r.needs])
def test_recipes_that_need_text_say_so(name, llama, tmp_path):
    with pytest.raises(ConversionError, match=rf"{name}'.*\w+: expected a calibration text"):
        convert(llama, tmp_path / "out", PRESETS[name])
    assert not list(tmp_path.iterdir())


def test_mixed_precision_needs_scales_for_both(llama, text, tmp_path, monkeypatch):
    def mark(self, layer):
        layer.acts["attn"].k8 = 128

    monkeypatch.setattr(SmoothAttention, "change", mark)
    recipe = Recipe("marked", steps=(SmoothAttention(), Rtn()))
    given = calibration(llama, text)
    with pytest.raises(ConversionError, match="'token' needs one precision, got 128 INT8 channels"):
        convert(llama, tmp_path / "out", recipe, calibration=given)
    for bad in (64, 512):
        monkeypatch.setattr(
            SmoothAttention, "change", lambda self, layer, k=bad: setattr(layer.acts["o"], "k8", k)
        )
        with pytest.raises(ConversionError, match=f"INT8 channels in blocks of 128 .* got {bad}"):
            convert(llama, tmp_path / "out", recipe, calibration=given)
    monkeypatch.setattr(SmoothAttention, "change", mark)
    convert(
        llama,
        tmp_path / "out",
        dataclasses.replace(recipe, granularity="block"),
        calibration=given,
    )
    model, _ = hf.load(str(tmp_path / "out"))
    assert model.model.layers[0].self_attn.q_proj.k8 == 128
    assert model.model.layers[0].self_attn.o_proj.k8 == -1


def test_on_the_command_line(llama, text, tmp_path):
    toml = tmp_path / "mine.toml"
    toml.write_text(EVERYTHING.to_toml())
    options = ["--recipe", toml, "--calib", text, "--calib-samples", "4", "--calib-ctx", "32"]
    dry = answer_of(run("quantize", llama, tmp_path / "out", *options, "--dry-run", "--json"))
    assert dry["memory_estimate"] > 1e8 and dry["layers"][0]["after"] is None
    cache = ["--calib-cache", tmp_path / "cache"]
    done = answer_of(run("quantize", llama, tmp_path / "out", *options, *cache, "--json"))
    assert all(layer["after"] > 0 for layer in done["layers"])
    assert done["recipe"]["steps"][0] == {"use": "rotate", "seed": 0, "values": True}
    table = run("quantize", llama, tmp_path / "two", *options, *cache).stdout
    assert re.search(r"results: rounded\s+stored", table)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    refused = run("quantize", llama, tmp_path / "no", "--recipe", "w4a16")
    assert refused.exit_code == 1 and "use 'w4a8' or 'w4a8-qoq'" in " ".join(refused.output.split())
