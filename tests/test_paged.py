"""The paged cache under transformers: the same text as with its own cache, or close to it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.cache_utils import DynamicCache

import tiny
from tessella.integrations import attention
from tessella.integrations.generate import generate
from tessella.integrations.paged import PagedCache, paged_cache
from tessella.integrations.published import published_cache
from tessella.quant.kv import PUBLISHED, CodecError

OPTIONS = {"mistral": {"sliding_window": 20}}


def model(arch: str = "llama"):
    m = tiny.model(arch, **OPTIONS.get(arch, {})).float()
    attention.use(m)
    return m


def ids(rng, *shape: int) -> torch.Tensor:
    return torch.randint(5, 90, shape, generator=rng)


def write(m, x, **options) -> torch.Tensor:
    with torch.inference_mode():
        return m.generate(x, do_sample=False, eos_token_id=None, **options)


def logits(m, x, cache=None) -> torch.Tensor:
    with torch.inference_mode():
        return m(x, past_key_values=cache, use_cache=cache is not None).logits


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_uncoded_pages_give_the_same_text(arch: str, rng):
    m, x = model(arch), ids(rng, 2, 24)
    cache = paged_cache(m, "fp32", page_size=16)
    out = write(m, x, max_new_tokens=40, past_key_values=cache)
    assert torch.equal(out, write(m, x, max_new_tokens=40))
    assert cache.get_seq_length() == 63


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
@pytest.mark.parametrize("codec", ["fp8", "int8", "kv4", "kv4-kivi", "kv4-hadamard"])
def test_coded_pages_stay_close(arch: str, codec: str, rng):
    m, x = model(arch), ids(rng, 2, 100)
    want, got = logits(m, x), logits(m, x, paged_cache(m, codec))
    error = float((got - want).norm() / want.norm())
    assert 1e-6 < error < (0.06 if codec == "int8" else 0.35)


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_neither_stored_nor_seen(left: bool, rng):
    m, x = model(), ids(rng, 3, 20)
    mask = torch.ones_like(x)
    pads = torch.arange(20) < 7 if left else torch.arange(20) >= 13
    mask[0, pads] = 0
    cache = paged_cache(m, "fp32", page_size=16)
    with torch.inference_mode():
        got = m(x, attention_mask=mask, past_key_values=cache).logits
        want = m(x, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(got[mask.bool()], want[mask.bool()], atol=1e-4)
    assert [cache.pages.length(h) for h in cache.handles] == [13, 20, 20]
    if left:
        out = write(
            m, x, attention_mask=mask, max_new_tokens=12, past_key_values=paged_cache(m, "fp32")
        )
        assert torch.equal(out, write(m, x, attention_mask=mask, max_new_tokens=12))


def test_prefill_in_chunks(rng):
    m, x = model("mistral"), ids(rng, 1, 50)
    cache = paged_cache(m, "fp32", page_size=16)
    parts = [logits(m, x[:, a:b], cache) for a, b in ((0, 3), (3, 4), (4, 37), (37, 50))]
    assert torch.allclose(torch.cat(parts, 1), logits(m, x), atol=1e-4)


def test_beams_share_pages(rng):
    m, x = model(), ids(rng, 2, 20)
    cache = paged_cache(m, "fp32", page_size=16)
    out = write(m, x, num_beams=3, max_new_tokens=20, past_key_values=cache)
    assert torch.equal(out, write(m, x, num_beams=3, max_new_tokens=20))
    pool = cache.pages.main.table.pool
    cache.reset()
    assert pool.free == len(pool.holders) and cache.get_seq_length() == 0


def test_crop_takes_tokens_back(rng):
    m, x = model(), ids(rng, 2, 40)
    cache = paged_cache(m, "fp32", page_size=16)
    logits(m, x, cache)
    cache.crop(-15)
    assert cache.get_seq_length() == 25
    assert torch.allclose(logits(m, x[:, 25:], cache), logits(m, x)[:, 25:], atol=1e-4)
    for n in (3, -41):
        with pytest.raises(ValueError, match=f"crop: expected 0 down to -40 tokens, got {n}"):
            cache.crop(n)


def test_a_paged_and_a_plain_cache_take_turns(rng):
    m, x = model(), ids(rng, 1, 30)
    want = logits(m, x)
    logits(m, x, paged_cache(m, "kv4"))
    assert torch.equal(logits(m, x, DynamicCache(config=m.config)), want)
    assert torch.equal(logits(m, x), want)


def test_a_converted_checkpoint_brings_its_codec(rng):
    m = model()
    tokenizer = tiny.tokenizer()
    plain = generate(m, tokenizer, "w1 w2 w3", max_new_tokens=8, stop_at_eos=False)
    paged = generate(m, tokenizer, "w1 w2 w3", max_new_tokens=8, stop_at_eos=False, kv="fp32")
    assert plain.token_ids == paged.token_ids

    m.config.quantization_config = SimpleNamespace(cache={"codec": "kv4-g32", "version": 1})
    assert paged_cache(m).codec.name == "kv4-g32"
    assert paged_cache(m, "int8").codec.name == "int8"


def test_what_is_refused(rng):
    m, x = model(), ids(rng, 2, 10)
    with pytest.raises(CodecError, match="got 'kv7'"):
        paged_cache(m, "kv7")
    cache = paged_cache(m, "kv4")
    logits(m, x, cache)
    with pytest.raises(ValueError, match="expected a batch of 2, got 1"):
        logits(m, x[:1], cache)
    with pytest.raises(ValueError, match=r"expected a padding mask \[B, tokens\]"):
        square = torch.ones(2, 1, 10, 10, dtype=torch.bool)
        m(x, attention_mask=square, past_key_values=paged_cache(m, "kv4"))
    with pytest.raises(CodecError, match="multiple of 48, got D=64"):
        logits(m, x, paged_cache(m, "kv4-g48"))
    eager = tiny.model("llama", attn_implementation="eager")
    with pytest.raises(ValueError, match="got 'eager'"):
        paged_cache(eager, "kv4")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_methods_are_simulated(name: str, rng):
    m, x = model(), ids(rng, 1, 120)
    want = logits(m, x)
    errors = [
        float((logits(m, x, published_cache(m, f"paper:{name}:{bits}")) - want).norm())
        for bits in (8, 4)
    ]
    # 120 tokens all lie in KIVI's residual
    assert errors[0] < errors[1] if name != "kivi" else max(errors) < 1e-3


@pytest.mark.parametrize("name", ["paper:rtn", "paper:nobody:4", "paper:kivi:9", "kv4"])
def test_published_names_that_are_refused(name: str):
    with pytest.raises(CodecError, match="expected paper:METHOD:BITS"):
        published_cache(model(), name)


def test_a_published_cache_takes_one_piece_only(rng):
    m, x = model(), ids(rng, 1, 10)
    cache = published_cache(m, "paper:qserve:4")
    logits(m, x, cache)
    with pytest.raises(ValueError, match="one piece of text"):
        logits(m, x, cache)


def test_layers_tell_transformers_what_they_hold():
    cache = PagedCache(3, "kv4")
    assert len(cache) == 3 and cache.get_seq_length() == 0 and cache.get_max_length() == -1
    assert cache.bytes_per_token is None
