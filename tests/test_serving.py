"""tessella plan serving: the arithmetic, published figures from it, and the command."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from command import answer_of, refused, run
from tessella.models.serving import SHAPES, Setting, Shape, plan, token_bytes, weight_bytes


def rows(name: str, **setting) -> dict:
    return {r.cache: r for r in plan(SHAPES[name], Setting(**setting))}


@pytest.mark.parametrize(
    "name, gqa, mla_bf16, added",
    [
        ("qwen2.5-7b", 57_344, 32_256, 238),
        ("qwen2.5-14b", 196_608, 55_296, 519),
        ("llama-3-8b", 131_072, 36_864, 210),
        ("openpangu-7b", 139_264, 39_168, 223),
        ("llama-2-7b", 524_288, 36_864, None),
    ],
)
def test_bytes_and_parameters(name, gqa, mla_bf16, added):
    shape = SHAPES[name]
    assert token_bytes(shape, "gqa-bf16", (512, 64)) == gqa
    assert token_bytes(shape, "mla-bf16", (512, 64)) == mla_bf16
    assert token_bytes(shape, "mla-int8", (512, 64)) == shape.layers * (512 + 2 + 128)
    assert token_bytes(shape, "mla-int4", (512, 64)) == shape.layers * (256 + 2 + 128)
    if added is not None:
        more = sum(shape.parameters((512, 64))) - sum(shape.parameters())
        assert round(more / 1e6) == added
    assert abs(weight_bytes(SHAPES["llama-3-8b"], "bf16", None) - 16.06e9) < 0.01e9


def test_youzhis_7b_is_the_limit_of_its_engine():
    """95 -> 256 sequences (2.69x): the cache alone would give 3.5x; 256 is the engine's limit."""
    free = rows("openpangu-7b", base_sequences=95)
    assert free["gqa-bf16"].sequences == 95
    assert free["mla-bf16"].sequences == 332 and free["mla-bf16"].limited_by == "memory"
    capped = rows("openpangu-7b", base_sequences=95, max_seqs=256)
    mla = capped["mla-bf16"]
    assert (mla.sequences, mla.fit, mla.limited_by) == (256, 332, "max-seqs")
    assert round(mla.ratio, 2) == 2.69


def test_youzhis_14b_needs_memory_that_is_not_published():
    """55 -> 134 (2.43x) is below the limit: weights explain 195 -> 186, the rest is workspace."""
    base = {"base_sequences": 55, "max_seqs": 256}
    ideal = 55 * 196_608 / 55_296
    assert int(ideal) == 195
    assert rows("qwen2.5-14b", **base)["mla-bf16"].sequences == 186
    published = rows("qwen2.5-14b", **base, mla_extra=5.9e9)["mla-bf16"]
    assert published.sequences == 134 and published.limited_by == "memory"
    assert 2.43 <= published.ratio < 2.445


def test_four_bits_beside_kv4():
    """What an INT4 latent adds: 2.8x over KV4 with 8 kv heads, 1.4x with 4."""
    for name, want in (("llama-3-8b", 2.82), ("qwen2.5-7b", 1.41)):
        shape = SHAPES[name]
        kv4, mla = (token_bytes(shape, c, (512, 64)) for c in ("gqa-kv4", "mla-int4"))
        assert round(kv4 / mla, 2) == want


@given(
    st.sampled_from(sorted(SHAPES)),
    st.floats(20e9, 500e9),
    st.integers(1, 100_000),
    st.sampled_from(["bf16", "w8a8", "w4a8"]),
    st.integers(0, 300),
)
def test_any_plan_fits_its_memory(name, memory, tokens, weights, max_seqs):
    setting = Setting(memory, tokens, 1, weights, max_seqs=max_seqs)
    try:
        made = plan(SHAPES[name], setting)
    except ValueError:
        assert weight_bytes(SHAPES[name], weights, None) > memory * 0.9
        return
    for row in made:
        used = row.weight_bytes + row.fit * (tokens + 1) * row.bytes_per_token
        assert row.fit == 0 or used <= memory * 0.9 * (1 + 1e-9)
        assert row.sequences <= row.fit and (not max_seqs or row.sequences <= max_seqs)
    gqa = [r.bytes_per_token for r in made[:3]]
    mla = [r.bytes_per_token for r in made[3:]]
    assert gqa == sorted(gqa, reverse=True) and mla == sorted(mla, reverse=True)


def test_the_command(tmp_path):
    args = ("plan", "serving", "llama-3-8b", "--memory", "141", "--bandwidth", "4650")
    answer = answer_of(run(*args, "--price", "3.6", "--json"))
    made = {r["cache"]: r for r in answer["plan"]["rows"]}
    first = made["gqa-bf16"]
    read = first["weight_bytes"] + first["sequences"] * 1536 * first["bytes_per_token"]
    assert first["tok_s"] == pytest.approx(first["sequences"] * 4650e9 / read)
    assert first["cost"] == pytest.approx(1000 / first["tok_s"])
    assert made["mla-int4"]["cost"] < made["mla-bf16"]["cost"] < first["cost"]
    shown = run("plan", "serving", "openpangu-7b", "--base-sequences", "95", "--max-seqs", "256")
    (line,) = [x for x in shown.stdout.splitlines() if x.startswith("mla-bf16")]
    assert line.split()[-3:] == ["332", "256", "2.69x"]
    config = {
        "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 200, "vocab_size": 96,
        "num_attention_heads": 4, "kv_lora_rank": 128, "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    answer = answer_of(run("plan", "serving", tmp_path, "--memory", "1", "--json"))
    caches = [r["cache"] for r in answer["plan"]["rows"]]
    assert caches == ["mla-bf16", "mla-int8", "mla-int4"]
    assert answer["plan"]["rows"][0]["bytes_per_token"] == 2 * 2 * 160
    assert Shape.of(config, "x").latent == (128, 32)


def test_what_makes_no_sense_is_refused(tmp_path):
    llama = ("plan", "serving", "llama-3-8b")
    refused(run(*llama), "expected --memory GB, or --base-sequences")
    refused(run(*llama, "--memory", "10"), "expected memory for the weights, 16.1 GB, got 9.0 GB")
    refused(run(*llama, "--memory", "80", "--rank", "500"), "64..512, got 500")
    refused(run("plan", "serving", "gpt-5", "--memory", "80"), "one of llama-2-7b")
    (tmp_path / "config.json").write_text("{}")
    refused(run("plan", "serving", tmp_path, "--memory", "80"), "num_hidden_layers")
