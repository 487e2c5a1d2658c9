"""Outliers on demand: the same function in fp64, larger activations, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import tiny
from command import answer_of, run
from tessella.models import outliers
from tessella.models.errors import ConversionError
from tessella.models.outliers import Outliers

IDS = torch.tensor([[0, 7, 30, 12, 55, 90, 8, 8, 21]])


def double(arch: str, **options):
    return tiny.model(arch, **options).double()


def config_of(model) -> dict:
    """What the config.json of a saved model holds."""
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


def norm_outputs(model) -> torch.Tensor:
    """Inputs [2 * layers, tokens, K] of the linears behind the norms of all layers."""
    seen = []
    hooks = [
        m.register_forward_hook(lambda m, i, o: seen.append(o[0]))
        for layer in model.model.layers
        for m in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
@pytest.mark.parametrize("factor", [20.0, 100.0])
def test_the_function_stays_the_same_in_fp64(arch, factor):
    plain, wild = double(arch), double(arch)
    chosen = Outliers(0.01, factor)
    wild.load_state_dict(outliers.inject(plain.state_dict(), config_of(plain), chosen))
    with torch.no_grad():
        a, b = plain(IDS).logits, wild(IDS).logits
    assert (a - b).abs().max() <= 1e-12 * a.abs().max()
    c = chosen.channels(tiny.HIDDEN)
    before, after = norm_outputs(plain), norm_outputs(wild)
    torch.testing.assert_close(after[..., c], before[..., c] * factor, rtol=1e-9, atol=0)
    rest = torch.ones(tiny.HIDDEN, dtype=torch.bool).index_fill_(0, c, False)
    torch.testing.assert_close(after[..., rest], before[..., rest], rtol=1e-9, atol=1e-12)


def test_a_power_of_two_is_exact_in_bf16_too():
    model = tiny.model("llama")
    with torch.no_grad():
        before = model(IDS).logits
        state = outliers.inject(model.state_dict(), config_of(model), Outliers(0.02, 64.0))
        model.load_state_dict(state)
        assert torch.equal(model(IDS).logits, before)


@given(st.integers(1, 600), st.floats(1e-3, 1), st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_channels(K, fraction, seed):
    c = Outliers(fraction, 20, seed).channels(K)
    assert len(c) == max(1, round(fraction * K)) == len(set(c.tolist()))
    assert c.min() >= 0 and c.max() < K and torch.equal(c, c.sort().values)
    assert torch.equal(c, Outliers(fraction, 3, seed).channels(K))


def test_a_norm_weight_of_zero_leaves_its_column_alone():
    chosen = Outliers(1.0, 20.0)
    w, norm = torch.randn(3, 4), torch.tensor([0.0, 1.0, -2.0, 0.5])
    made = chosen.linear(w, norm)
    assert torch.equal(made[:, 0], w[:, 0])
    torch.testing.assert_close(made[:, 1:], w[:, 1:] / 20)
    torch.testing.assert_close(chosen.norm(norm), norm * 20)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_command_writes_a_checkpoint_that_computes_the_same(tmp_path, sharded):
    before = tiny.save(tmp_path / "m", "qwen2", sharded=sharded, tied=True)
    found = answer_of(run("outliers", tmp_path / "m", tmp_path / "out", "--factor", "20", "--json"))
    assert found["channels"] == Outliers().channels(tiny.HIDDEN).tolist()
    assert found["layers"] == tiny.LAYERS
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert after.dtype == torch.bfloat16
    assert Outliers(**after.config.tessella_outliers) == Outliers()
    with torch.no_grad():
        a, b = before.float()(IDS).logits, after.float()(IDS).logits
    assert 0 < (a - b).norm() / a.norm() < 4e-3  # each changed weight is rounded to bf16 once
    assert (tmp_path / "out/LICENSE").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--fraction", "0"], "fraction: expected above 0"),
        (["--fraction", "1.5"], "fraction: expected above 0"),
        (["--factor", "-3"], "factor: expected a positive number"),
        (["--factor", "nan"], "factor: expected a positive number"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    tiny.save(tmp_path / "m", "llama")
    result = run("outliers", tmp_path / "m", tmp_path / "out", *options)
    assert result.exit_code == 1 and message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_bad_sources_are_refused(tmp_path):
    tiny.save(tmp_path / "m", "llama")
    with pytest.raises(ConversionError, match="new or an empty folder"):
        outliers.convert(tmp_path / "m", tmp_path / "m", Outliers())
    config = (tmp_path / "m/config.json").read_text()
    (tmp_path / "m/config.json").write_text(config.replace("LlamaForCausalLM", "GPT2LMHeadModel"))
    with pytest.raises(ConversionError, match="architectures: expected one of"):
        outliers.convert(tmp_path / "m", tmp_path / "out", Outliers())
