"""A 4-bit cache from the recipe to the text: recipes, checkpoints, commands."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import tiny
from command import answer_of, refused, run
from tessella.bench import accuracy
from tessella.cli import demo
from tessella.integrations import paged
from tessella.integrations.evaluate import perplexity
from tessella.integrations.generate import GenerationError, generate
from tessella.integrations.hf import load
from tessella.models.config import QuantizationConfig
from tessella.models.errors import CheckpointError
from tessella.quant.recipe import PRESETS, Recipe, RecipeError

TEXT = 'def read_json(path):\n    """Read a JSON file."""\n    with open(path) as f:\n' * 8


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("kv") / "out"
    answer_of(run("quantize", demo.MODEL, out, "--recipe", "w4a8kv4-rtn", "--json"))
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("kv") / "text.txt"
    file.write_text(TEXT)
    return file


def test_a_recipe_carries_its_cache():
    recipe = PRESETS["w4a8kv4-rtn"]
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert recipe.to_dict()["cache"] == {"codec": recipe.cache}
    assert "cache" not in PRESETS["w4a8"].to_dict()
    assert Recipe.from_toml('name = "x"\n[cache]\ncodec = "k4v2-kivi"').cache == "k4v2-kivi"


@pytest.mark.parametrize(
    "cache, words",
    [
        ('codec = "kv5"', "cache.codec: kv codec: expected bf16"),
        ("codec = 4", "cache.codec"),
        ('codex = "kv4"', "cache: expected fields codec"),
    ],
)
def test_recipes_with_an_impossible_cache(cache: str, words: str):
    with pytest.raises(RecipeError, match=words):
        Recipe.from_toml(f'name = "x"\n[cache]\n{cache}')


def test_a_codec_that_does_not_fit_the_model_is_refused_at_conversion(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('name = "x"\n[cache]\ncodec = "kv4-g48"')
    result = run("quantize", demo.MODEL, tmp_path / "out", "--recipe", file, "--dry-run")
    refused(result, "config.json", "multiple of 48, got D=64")


@pytest.mark.parametrize(
    "cache, words",
    [
        ({"codec": "kv4", "version": 2}, "cache.version: expected 1, got 2"),
        ({"codec": "kv9", "version": 1}, "cache.codec: kv codec: expected bf16"),
        ({"codec": "kv4"}, "expected fields codec, version"),
        ("kv4", "expected fields codec, version"),
    ],
)
def test_checkpoints_with_an_unknown_cache(cache, words: str):
    d = QuantizationConfig(PRESETS["w4a8kv4-rtn"], {}).to_dict() | {"cache": cache}
    with pytest.raises(CheckpointError, match=words):
        QuantizationConfig.from_dict(d, "config.json")


def test_a_converted_model_runs_on_its_cache(converted, monkeypatch):
    made = []

    class Watched(paged.PagedCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(paged, "PagedCache", Watched)
    prompt = ("generate", converted, "--prompt", TEXT, "--max-new-tokens", "12", "--json")
    answer = answer_of(run(*prompt))
    (cache,) = made
    assert cache.codec.name == PRESETS["w4a8kv4-rtn"].cache
    assert cache.pages.main.layers[0].blob.dtype == torch.uint8
    assert answer["tokens"] == 12 and answer["steps"] is None
    assert cache.seen == answer["prompt_tokens"] + 11
    made.clear()
    answer_of(run(*prompt, "--kv", "none"))
    assert not made
    answer_of(run(*prompt, "--kv", "int8"))
    assert made[0].codec.name == "int8"


def test_speculation_says_how_many_steps_it_took(converted):
    prompt = ("generate", converted, "--prompt", TEXT, "--max-new-tokens", "20", "--json")
    plain, fast = answer_of(run(*prompt)), answer_of(run(*prompt, "--speculate", "8"))
    assert fast["text"] == plain["text"] and fast["tokens"] == 20
    assert fast["steps"] < 20
    result = run(*prompt, "--speculate", "8", "--temperature", "0.5")
    assert result.exit_code == 2
    refused(run(*prompt, "--speculate", "8", "--kv", "kv4-kivi"), "each token by itself")


def test_eval_through_caches(converted, text, tmp_path):
    file = tmp_path / "kv.json"
    args = ("eval", converted, "--text", text, "--ref", converted, "--ctx", "300", "--json")
    caches = [x for name in ("none", "bf16", "kv4", "kv2", "paper:kivi:4") for x in ("--kv", name)]
    answers = answer_of(run(*args, *caches, "--save", file))["caches"]
    assert [a["kv"] for a in answers] == [None, "bf16", "kv4", "kv2", "paper:kivi:4"]
    none, bf16, kv4, kv2, kivi = answers
    assert none["kl"] == 0 and none["cache_bytes_per_token"] is None
    assert 0 < bf16["kl"] < kv4["kl"] < kv2["kl"] and kivi["cache_bytes_per_token"] is None
    assert kv4["cache_bytes_per_token"] == 6 * 2 * 2 * (32 + 4)
    records = json.loads(file.read_text())
    assert [r["kv"] for r in records] == [a["kv"] for a in answers]
    assert records[2]["ppl"] == pytest.approx(kv4["ppl"], abs=1e-6)
    assert records[2]["recipe"] == "w4a8kv4-rtn" and records[2]["weight_bytes"] > 0
    table = accuracy.markdown(records)
    assert f"| w4a8kv4-rtn | `kv4` | 864 | 28.1% | {kv4['ppl']:.4f} |" in table
    assert "| w4a8kv4-rtn | `paper:kivi:4` |  |  |" in table
    default = answer_of(run(*args, "--limit-tokens", "50", "--save", file))
    assert default["kv"] == PRESETS["w4a8kv4-rtn"].cache
    assert len(json.loads(file.read_text())) == 5 + (default["kv"] != "kv4")


@pytest.mark.parametrize("kv", ["kv5", "paper:x:4", "kv4-g48", "kv4-deco-kivi-deco"])
def test_codecs_that_do_not_exist_are_refused(converted, text, kv):
    refused(run("eval", converted, "--text", text, "--kv", kv), "kv codec")


def test_perplexity_reads_each_token_through_the_cache():
    """A window in one piece is scored as token by token (by another kernel, in 8 bits)."""
    model, tokenizer = load(str(demo.MODEL), dtype=torch.float32)
    doc = TEXT[:150]
    made = []

    def cache():
        made.append(paged.paged_cache(model, "int8"))
        return made[-1]

    whole = perplexity(model, tokenizer, [doc], ctx=200, cache=cache)
    ids = [tokenizer.bos_token_id, *tokenizer(doc, add_special_tokens=False)["input_ids"]]
    stepped, nll = paged.paged_cache(model, "int8"), 0.0
    with torch.inference_mode():
        for now, then in pairwise(ids):
            out = model(torch.tensor([[now]]), past_key_values=stepped).logits[0, 0]
            nll -= float(torch.log_softmax(out, -1)[then])
    assert whole.tokens == len(ids) - 1
    assert whole.ppl == pytest.approx(float(torch.tensor(nll / whole.tokens).exp()), rel=5e-3)
    assert made[-1].seen == len(ids) - 1


def test_generation_settings_that_exclude_each_other():
    model = tiny.model("llama").float()
    with pytest.raises(GenerationError, match="speculate: expected temperature 0, got"):
        generate(model, tiny.tokenizer(), "w1", max_new_tokens=4, speculate=4, temperature=0.5)
