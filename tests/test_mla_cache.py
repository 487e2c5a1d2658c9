"""Models with latent attention over paged latents: forward, generate, runner, commands."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from command import answer_of, refused, run
from tessella import _native
from tessella.integrations import hf
from tessella.integrations.paged import paged_cache
from tessella.integrations.runner import Runner
from tessella.kv import step
from tessella.kv.cache import CacheShape, PagedKVCache
from tessella.models import absorb
from tessella.models.absorb import CodedHeads, DenseHeads, absorbed
from tessella.models.linear import W4AxLinear
from tessella.quant import kv
from tessella.quant.fmpq import rotate_blocks
from tessella.quant.recipe import PRESETS
from tessella.ref import mla as ref
from tessella.ref.w4ax_gemm import w4_dequant
from tessella.testing.metrics import relative_diff


def model(**options):
    config = AutoConfig.for_model(
        "tessella_mla",
        **{
            "vocab_size": tiny.VOCAB,
            "hidden_size": 256,
            "intermediate_size": 200,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "kv_lora_rank": 128,
            "layer_kv_lora_ranks": [64, 128],
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 24,
            "v_head_dim": 40,
            "max_position_embeddings": 256,
            "initializer_range": 0.06,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        }
        | options,
    )
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def lm():
    return model().float()


@pytest.fixture(params=[1, 10**9], ids=["expanded", "absorbed"])
def form(request, monkeypatch):
    """Both forms of attention, whatever the number of tokens."""
    monkeypatch.setattr(step, "EXPAND_TOKENS", request.param)


def pieces(lm, ids, sizes, cache, mask=None):
    """Logits of a text that comes in pieces."""
    out, at = [], 0
    with torch.inference_mode():
        for n in sizes:
            now = None if mask is None else mask[:, : at + n]
            out.append(lm(ids[:, at : at + n], past_key_values=cache, attention_mask=now).logits)
            at += n
    return torch.cat(out, 1)


def whole(lm, ids, mask=None):
    with torch.inference_mode():
        return lm(ids, use_cache=False, attention_mask=mask).logits


SIZES = (37, 1, 1, 20, 5)


@pytest.mark.parametrize(
    "codec, limit", [("mla-fp32", 1e-6), ("mla-int8", 0.02), ("mla-int4", 0.2)]
)
def test_pieces_through_the_cache_are_the_whole_text(lm, form, codec, limit, rng):
    ids = torch.randint(5, 90, (2, sum(SIZES)), generator=rng)
    cache = paged_cache(lm, codec, page_size=16)
    got, want = pieces(lm, ids, SIZES, cache), whole(lm, ids)
    assert float((got - want).norm() / want.norm()) < limit
    assert cache.bytes_per_token == sum(
        cache.codec.pages.page_bytes(16, L, 32) / 16 for L in (64, 128)
    )
    cache.reset()
    assert torch.equal(pieces(lm, ids, SIZES, cache), got)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(lm, form, side, rng):
    ids = torch.randint(5, 90, (2, 30), generator=rng)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, slice(0, 11) if side == "left" else slice(19, 30)] = 0
    real = mask.bool()
    got = pieces(lm, ids, (30,), paged_cache(lm, "mla-fp32", page_size=16), mask)
    assert float((got - whole(lm, ids, mask))[real].abs().max()) < 1e-4


def test_a_sliding_window(form, rng):
    lm = model(sliding_window=9, layer_types=["sliding_attention", "full_attention"]).float()
    ids = torch.randint(5, 90, (1, sum(SIZES)), generator=rng)
    got = pieces(lm, ids, SIZES, paged_cache(lm, "mla-fp32", page_size=16))
    assert float((got - whole(lm, ids)).abs().max()) < 1e-4


def test_both_forms_see_what_is_stored(lm, monkeypatch, rng):
    """Coded to 4 bits, keys and values that are made again attend as the latents do."""
    ids = torch.randint(5, 90, (1, 60), generator=rng)
    results = []
    for threshold in (1, 10**9):
        monkeypatch.setattr(step, "EXPAND_TOKENS", threshold)
        results.append(pieces(lm, ids, (60,), paged_cache(lm, "mla-int4")))
    assert relative_diff(*results) < 1e-4  # INT8 products against fp32 ones
    assert relative_diff(results[0], whole(lm, ids)) > 1e-4


def greedy(lm, prompt, n):
    with torch.inference_mode():
        out = lm.generate(
            torch.tensor([prompt]), max_new_tokens=n, do_sample=False, eos_token_id=None
        )
    return out[0, len(prompt) :].tolist()


def test_the_runner_mixes_requests(lm, rng):
    texts = [torch.randint(5, 90, (n,), generator=rng).tolist() for n in (50, 3, 1, 90, 17)]
    runner = Runner(lm, codec="mla-fp32", tokens=800, budget=40, page_size=16)
    requests = [runner.submit(p, 12) for p in texts]
    stats = runner.run()
    assert [r.tokens for r in requests] == [greedy(lm, p, 12) for p in texts]
    assert stats.mixed > 0


def test_speculation_and_shared_prefixes(lm, rng):
    unit = torch.randint(5, 90, (11,), generator=rng).tolist()
    prompt = (unit * 9)[:90]
    runner = Runner(lm, codec="mla-fp32", tokens=800, page_size=16, speculate=7)
    first, second = runner.submit(prompt, 20), None
    runner.run()
    second = runner.submit(prompt, 20)
    stats = runner.run()
    assert first.tokens == second.tokens == greedy(lm, prompt, 20)
    assert stats.reused >= 80 and first.steps < 21


def test_generate_of_transformers_with_beams(lm, rng):
    ids = torch.randint(5, 90, (2, 20), generator=rng)
    how = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    with torch.inference_mode():
        want = lm.generate(ids, **how)
        got = lm.generate(ids, past_key_values=paged_cache(lm, "mla-fp32", page_size=16), **how)
    assert torch.equal(got, want)


@pytest.mark.parametrize("scheme", ["w4a8", "w4a8-g128", "w4a8-b128", "w4a4"])
def test_four_bit_models_absorb_by_grouped_products(scheme, rng):
    """In whole panels: two a layer, near the expanded form, which multiplies the same weights."""
    lm = model(qk_nope_head_dim=64, v_head_dim=128).bfloat16()
    for layer in lm.model.layers:
        attention = layer.self_attn
        attention.kv_b_proj = W4AxLinear.from_linear(attention.kv_b_proj, PRESETS[scheme])
    ids = torch.randint(5, 90, (1, sum(SIZES)), generator=rng)
    with torch.profiler.profile() as profile:
        got = pieces(lm, ids, SIZES, paged_cache(lm, "mla-bf16"))
    calls = [e.name for e in profile.events()].count("tessella::w4ax_grouped")
    assert calls == (2 * 2 * len(SIZES) if _native.HAS_OPS else 0)
    assert relative_diff(got, whole(lm, ids)) < (1e-2 if scheme == "w4a4" else 1e-3)


def test_four_bit_linears_absorb_the_weight_that_they_multiply(rng):
    lm = model().bfloat16()
    for layer in lm.model.layers:
        attention = layer.self_attn
        attention.kv_b_proj = W4AxLinear.from_linear(attention.kv_b_proj, PRESETS["w4a8"])
    ids = torch.randint(5, 90, (1, 40), generator=rng)
    cache = paged_cache(lm, "mla-bf16")
    got, want = pieces(lm, ids, (40,), cache), whole(lm, ids)
    assert relative_diff(got, want) < 1e-3
    attention = lm.model.layers[0].self_attn
    heads = absorbed(attention, torch.bfloat16)  # 24 key rows a head are no whole panels
    assert isinstance(heads, DenseHeads) and absorbed(attention, torch.bfloat16) is heads
    assert absorb._MEMO not in dict(attention.named_buffers()) | dict(attention.named_parameters())
    assert heads.keys.shape == (5, 24, 64) and heads.values.shape == (5, 40, 64)
    attention.kv_b_proj.load_state_dict(lm.model.layers[0].self_attn.kv_b_proj.state_dict())
    assert absorbed(attention, torch.bfloat16) is not heads  # its codes may be others


class Heads(torch.nn.Module):
    """What an attention shows of itself to `absorbed`."""

    def __init__(self, heads, D, linear):
        super().__init__()
        self.num_heads, self.qk_nope_head_dim, self.kv_b_proj = heads, D, linear


@pytest.mark.parametrize("hadamard", [False, True])
def test_a_permuted_or_rotated_four_bit_weight_is_put_back(hadamard, rng):
    perm, weight = torch.randperm(256, generator=rng), torch.randn(48, 256, generator=rng)
    w = rotate_blocks(weight[:, perm], 128) if hadamard else weight[:, perm]
    linear = W4AxLinear(
        PRESETS["w4a8"].quantize(w), perm=perm.int(), k8=128, granularity="class", hadamard=hadamard
    )
    heads = absorbed(Heads(2, 16, linear), torch.float32)
    up = torch.cat((heads.keys, heads.values), 1).flatten(0, 1)
    assert float((up - weight).norm() / weight.norm()) < 0.15


@pytest.mark.parametrize("T", [0, 1, 3, 17])
@pytest.mark.parametrize("D", [64, 128])
def test_absorbed_products(T, D, rng):
    """In full precision; and with a 4-bit weight, against its real values."""
    H, E, L = 3, 64, 128
    q, o = (torch.randn(T, H, n, generator=rng) for n in (D, L))
    linear = torch.nn.Linear(L, H * (D + E), bias=False).requires_grad_(False)

    def want(weight):
        w_HNL = weight.view(H, D + E, L)
        return ref.absorb_query(q, w_HNL[:, :D]), ref.absorb_value(o, w_HNL[:, D:])

    heads = absorbed(Heads(H, D, linear), torch.float32)
    for got, exact in zip((heads.queries(q), heads.outputs(o)), want(linear.weight)):
        assert relative_diff(got, exact) < 1e-12
    perm = torch.randperm(L, generator=rng)
    coded = W4AxLinear(PRESETS["w4a8"].quantize(linear.weight[:, perm]), perm=perm.int())
    heads = absorbed(Heads(H, D, coded), torch.float32)
    real = torch.empty(H * (D + E), L)
    real[:, perm] = w4_dequant(coded.weight(), torch.float32)
    assert isinstance(heads, CodedHeads if _native.HAS_OPS else DenseHeads)
    for got, exact in zip((heads.queries(q), heads.outputs(o)), want(real)):
        assert got.shape == exact.shape and relative_diff(got, exact) < 3e-4


def test_what_does_not_fit_is_refused(lm):
    with pytest.raises(kv.CodecError, match="mla-int4: expected a model with latent attention"):
        paged_cache(tiny.model("llama"), "mla-int4")
    with pytest.raises(kv.CodecError, match=r"expected mla-int4, mla-int8.*got 'mla-int5'"):
        paged_cache(lm, "mla-int5")
    odd = model(kv_lora_rank=96, layer_kv_lora_ranks=None)
    with pytest.raises(ValueError, match=r"multiple of 64 in 64\.\.512, got 96"):
        pieces(odd, torch.tensor([[5, 6]]), (2,), paged_cache(odd, "mla-int4"))
    shape = CacheShape(1, 1, 0, torch.float32, "cpu", ((64, 32),))
    with pytest.raises(kv.CodecError, match=r"expected one of latents.*got 'kv4'"):
        PagedKVCache(shape, "kv4", pages=1)
    pages = PagedKVCache(shape, "mla-int4", pages=1)
    now = pages.step([pages.open()], [2])
    with pytest.raises(ValueError, match=r"k: expected torch.float32 \(2, 64\)"):
        now.attend(0, torch.zeros(2, 3, 96), torch.zeros(2, 32), torch.zeros(2, 32), scale=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mla") / "model"
    model().bfloat16().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def test_generate_and_eval_through_latents(folder, tmp_path):
    lm, _ = hf.load(str(folder), dtype=torch.float32)
    assert isinstance(lm, type(model()))
    prompt = ("generate", folder, "--prompt", "w1 w2 w3 w4", "--max-new-tokens", "9", "--json")
    for codec in ("mla-bf16", "mla-int8", "mla-int4"):
        assert answer_of(run(*prompt, "--kv", codec))["tokens"] > 0
    refused(run(*prompt, "--kv", "mla-int3"), "expected mla-int4")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * 7 % 90}" for i in range(300)))
    args = ("eval", folder, "--text", text, "--ref", folder, "--ctx", "100", "--json")
    caches = [x for name in ("none", "mla-fp32", "mla-int8", "mla-int4") for x in ("--kv", name)]
    answers = answer_of(run(*args, *caches))["caches"]
    none, fp32, int8, int4 = answers
    assert none["kl"] == 0 and fp32["kl"] < int8["kl"] + 1e-6 and int8["kl"] < int4["kl"]
    assert int4["cache_bytes_per_token"] == (64 + 128) / 2 + 2 * (64 + 2)
    assert json.dumps(answers)


def test_four_bit_checkpoints_generate_through_latents(folder, tmp_path):
    out = tmp_path / "w4a8"
    answer_of(run("quantize", folder, out, "--recipe", "w4a8", "--json"))
    prompt = ("generate", out, "--prompt", "w1 w2 w3 w4", "--max-new-tokens", "9", "--json")
    answer = answer_of(run(*prompt, "--kv", "mla-int4"))
    assert answer["tokens"] > 0
    fast = answer_of(run(*prompt, "--kv", "mla-int4", "--speculate", "4"))
    assert fast["tokens"] == answer["tokens"]
