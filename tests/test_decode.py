"""Decoding beside the linears: folded attention, and the cache that grows in place."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
)

from tessella.integrations import attention, cache, generate
from tessella.integrations.cache import GrowingLayer, growing_cache
from tessella.models.convert import convert
from tessella.quant.recipe import PRESETS

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=50,
    max_position_embeddings=1024,
)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval().requires_grad_(False)


def exact(q, k, v, mask, scale):
    """The definition, in fp64, one query head at a time."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            j = h // (q.shape[1] // k.shape[1])
            s = q[b, h].double() @ k[b, j].double().T * scale
            if mask is not None:
                m = mask[b, 0]
                s = s.masked_fill(~m, -torch.inf) if m.dtype == torch.bool else s + m.double()
            out[b, h] = torch.softmax(s, -1) @ v[b, j].double()
    return out.transpose(1, 2)


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("masked", ["", "bool", "additive"])
@pytest.mark.parametrize("B, H, J, T", [(1, 4, 1, 1), (2, 6, 2, 37), (3, 4, 4, 5)])
def test_folded_attention(dtype, most, masked, B, H, J, T, rng, monkeypatch):
    q = torch.randn(B, H, 1, 16, generator=rng).to(dtype)
    k, v = torch.randn(2, B, J, T, 16, generator=rng).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(B, 1, 1, T, generator=rng) < 0.7
        mask[..., 0] = True
        if masked == "additive":
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    for fast in (True, False):
        monkeypatch.setattr(attention, "_fast_bf16", lambda fast=fast: fast)
        with torch.no_grad():
            module = torch.nn.Module()
            module.num_key_value_groups, module.is_causal = H // J, True
            y, weights = attention.attention(module, q, k, v, mask, scaling=0.3)
        want = exact(q, k, v, mask, 0.3)
        assert weights is None and y.dtype == dtype and y.shape == (B, 1, H, 16)
        assert float((y.double() - want).norm() / want.norm()) < most


def test_only_decoding_steps_fold(model, monkeypatch):
    folded, attend = [], attention._attend
    monkeypatch.setattr(attention, "_attend", lambda q, *a: folded.append(q.shape) or attend(q, *a))
    assert attention.use(model) and not attention.use(model)
    ids = torch.randint(0, 50, (2, 6))
    past = DynamicCache(config=CONFIG)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=past)
        assert folded == []
        model(input_ids=ids[:, :1], past_key_values=past)
    assert folded == [(2, 2, 2, 16)] * 2
    model(input_ids=ids[:, :1])
    assert len(folded) == 2  # a gradient might be wanted


def test_another_choice_of_attention_is_kept(model):
    model.set_attn_implementation("eager")
    assert not attention.use(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("padded", [False, True])
def test_generation_is_the_same(model, padded):
    ids = torch.randint(1, 50, (2, 9))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(ids, attention_mask=mask, **settings)
    attention.use(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), want)
    past = growing_cache(CONFIG)
    got = model.generate(ids, attention_mask=mask, past_key_values=past, **settings)
    assert torch.equal(got, want)


def test_beams_reorder_the_cache(model):
    ids = torch.randint(1, 50, (1, 5))
    settings = {"max_new_tokens": 12, "num_beams": 3, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(ids, do_sample=False, **settings)
    got = model.generate(ids, do_sample=False, past_key_values=growing_cache(CONFIG), **settings)
    assert torch.equal(got, want)


def step(layer, other, S, rng):
    """Append the same tokens to two layers and compare what they hold."""
    k, v = torch.randn(2, *layer_shape(layer), S, 8, generator=rng)
    for got, want in zip(layer.update(k, v), other.update(k, v)):
        assert torch.equal(got, want)


def layer_shape(layer):
    return tuple(layer.keys.shape[:2]) if layer.is_initialized else (2, 3)


def test_the_cache_holds_what_transformers_would(rng, monkeypatch):
    from transformers.cache_utils import DynamicLayer

    monkeypatch.setattr(cache, "LEAST_ROOM", 4)
    ours, theirs = GrowingLayer(), DynamicLayer()
    for S in (5, 1, 1, 1, 9, 1):
        step(ours, theirs, S, rng)
    for change in (
        lambda layer: layer.crop(-7),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([3, 0])),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
        lambda layer: layer.reset(),
    ):
        for layer in (ours, theirs):
            change(layer)
        assert ours.get_seq_length() == theirs.get_seq_length()
        for S in (1, 1, 6):
            step(ours, theirs, S, rng)


def test_a_copy_is_independent(rng):
    ours = GrowingLayer()
    k, v = torch.randn(2, 1, 2, 3, 8, generator=rng)
    ours.update(k, v)
    other = copy.deepcopy(ours)
    ours.update(k[:, :, :1], v[:, :, :1])
    other.update(k[:, :, 1:2], v[:, :, 1:2])
    assert torch.equal(ours.keys[:, :, 3], k[:, :, 0])
    assert torch.equal(other.keys[:, :, 3], k[:, :, 1])


def test_a_step_copies_no_old_tokens(rng):
    layer = GrowingLayer()
    k, v = torch.randn(2, 1, 2, 3, 8, generator=rng)
    layer.update(k, v)
    before = layer.keys.data_ptr()
    for _ in range(100):
        layer.update(k[:, :, :1], v[:, :, :1])
    assert layer.keys.data_ptr() == before and layer.get_seq_length() == 103


def test_gradients_go_through(rng):
    layer = GrowingLayer()
    k, v = torch.randn(2, 1, 2, 3, 8, generator=rng)
    k.requires_grad_()
    layer.update(k, v)
    keys, _ = layer.update(k, v)
    keys.sum().backward()
    assert torch.equal(k.grad, torch.full_like(k, 2.0))


def test_sliding_layers_stay_as_they_are():
    config = MistralConfig(num_hidden_layers=2, sliding_window=16)
    assert not any(isinstance(x, GrowingLayer) for x in growing_cache(config).layers)
    assert all(isinstance(x, GrowingLayer) for x in growing_cache(CONFIG).layers)


@pytest.mark.parametrize("asked", [None, "eager"])
def test_a_converted_checkpoint_folds_unless_told_otherwise(asked, model, tmp_path):
    model.save_pretrained(tmp_path / "original")
    convert(tmp_path / "original", tmp_path / "converted", PRESETS["w4a8"])
    chosen = {"attn_implementation": asked} if asked else {}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", **chosen)
    assert loaded.config._attn_implementation == (asked or attention.NAME)
    grows = generate._cache(loaded)
    assert (grows is None) == bool(asked)
    ids = torch.randint(1, 50, (1, 7))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = loaded.generate(ids, **settings)
    assert torch.equal(loaded.generate(ids, past_key_values=grows, **settings), want)
