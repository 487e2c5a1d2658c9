"""The runner: the text of plain greedy decoding, in fewer steps, whatever shares a step."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import tiny
from tessella import ops
from tessella.integrations.draft import Tree, draft
from tessella.integrations.runner import Runner, RunnerError
from tessella.kv.cache import CacheFullError
from tessella.testing.force import force, runnable


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama").float()


def prompts(rng, *lengths: int) -> list[list[int]]:
    return [torch.randint(5, 90, (n,), generator=rng).tolist() for n in lengths]


def repeating(rng, n: int) -> list[int]:
    """A text in which looking up the last tokens pays."""
    (unit,) = prompts(rng, 11)
    return (unit * n)[:n]


def one_body():
    """Attention over coded pages by one kernel, however many rows there are."""
    bodies = [name for name in runnable("kv4") if name.endswith(".tile")]
    return force(bodies[0]) if bodies else nullcontext()


def greedy(model, prompt: list[int], n: int) -> list[int]:
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=n, do_sample=False, eos_token_id=None
        )
    return out[0, len(prompt) :].tolist()


def test_one_ragged_batch_is_many_generations(model, rng):
    texts = prompts(rng, 50, 3, 1, 90, 17)
    runner = Runner(model, codec="fp32", tokens=800, budget=40, page_size=16)
    requests = [runner.submit(p, 12) for p in texts]
    stats = runner.run()
    assert [r.tokens for r in requests] == [greedy(model, p, 12) for p in texts]
    assert stats.mixed > 0  # prefill chunks beside decoding rows
    table = runner.cache.main.table
    assert not table.sequences and table.available == len(table.pool.holders)


@pytest.mark.parametrize("codec", ["fp32", "fp8", "int8", "kv4", "kv4-hadamard"])
@pytest.mark.parametrize("drafts", [1, 7, 40])
def test_speculation_changes_the_steps_and_not_the_text(model, codec: str, drafts: int, rng):
    texts = [repeating(rng, 60), *prompts(rng, 33, 9), repeating(rng, 25)]
    done = []
    for speculate in (0, drafts):
        options = {"tokens": 1200, "budget": 64, "page_size": 16}
        runner = Runner(model, codec=codec, speculate=speculate, **options)
        requests = [runner.submit(p, 30) for p in texts]
        with one_body():  # trees have more rows, for which another one would round otherwise
            done.append((runner.run(), [r.tokens for r in requests]))
    (plain, want), (fast, got) = done
    assert got == want
    assert fast.steps < plain.steps
    if codec == "fp32":
        assert want == [greedy(model, p, 30) for p in texts]


def test_a_step_is_one_call_of_attention_in_each_layer(model, rng, monkeypatch):
    """Prefill chunks, single tokens and trees stand in the same batch."""
    calls = []
    attend = ops.kv4_attn

    def counted(q, cache, batch, **how):
        calls.append(batch)
        return attend(q, cache, batch, **how)

    monkeypatch.setattr(ops, "kv4_attn", counted)
    runner = Runner(model, codec="kv4", tokens=1200, budget=32, speculate=8, page_size=16)
    for p in (repeating(rng, 30), *prompts(rng, 5, 90, 90)):
        runner.submit(p, 20)
    stats = runner.run()
    assert len(calls) == stats.steps * tiny.LAYERS
    kinds = [set() if b.mask is None else set(b.mask.tolist()) for b in calls]
    lengths = [b.cu_q.diff().tolist() for b in calls]
    assert any({1, 3} <= k and 1 in n and max(n) > 9 for k, n in zip(kinds, lengths, strict=True))


def test_a_prompt_starts_after_what_the_cache_knows(model, rng):
    (text,) = prompts(rng, 60)
    runner = Runner(model, codec="fp32", tokens=600, page_size=16)
    first = runner.submit(text, 4)
    runner.run()
    again, longer = runner.submit(text, 4), runner.submit([*text[:41], 7, 8], 4)
    stats = runner.run()
    assert stats.reused == 59 + 41
    assert again.tokens == first.tokens
    assert longer.tokens == greedy(model, longer.prompt, 4)


def test_requests_wait_when_the_cache_is_full(model, rng):
    texts = prompts(rng, 40, 40, 40)
    runner = Runner(model, codec="fp32", tokens=128, page_size=16)
    requests = [runner.submit(p, 20) for p in texts]
    runner.run()
    assert [r.tokens for r in requests] == [greedy(model, p, 20) for p in texts]
    runner = Runner(model, codec="fp32", tokens=32, page_size=16)
    runner.submit(texts[0], 20)
    with pytest.raises(CacheFullError, match="full"):
        runner.run()


def test_a_request_ends_at_an_end_token(model, rng):
    text = repeating(rng, 40)
    tokens = greedy(model, text, 20)
    end = tokens[5]
    for speculate in (0, 8):
        seen = []
        runner = Runner(model, codec="fp32", tokens=200, speculate=speculate, eos=frozenset([end]))
        request = runner.submit(text, 20, seen.append)
        runner.run()
        assert request.tokens == seen == tokens[: tokens.index(end) + 1]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"budget": 0}, "budget >= 1"),
        ({"speculate": 256}, "speculate in 0..255, got 512 and 256"),
        ({"speculate": -1}, "speculate in 0..255"),
        ({"speculate": 4, "codec": "kv4-kivi"}, "each token by itself, .* got kv4-kivi"),
        ({"speculate": 4, "codec": "kv4-deco"}, "each token by itself, .* got kv4-deco"),
    ],
)
def test_runners_that_cannot_be(model, options, words: str):
    with pytest.raises(RunnerError, match=words):
        Runner(model, **{"codec": "kv4", **options})


@pytest.mark.parametrize("prompt, n", [([], 3), ([1], 0), ([1] * 100, 29)])
def test_requests_that_are_refused(model, prompt, n):
    with pytest.raises(RunnerError, match="expected"):
        Runner(model, codec="kv4", tokens=64).submit(prompt, n)


def test_drafts_follow_what_the_text_repeats():
    tree = draft([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], 10)
    assert tree.tokens[0] == 2
    chains = set()
    for leaf in range(len(tree)):
        chain, node = [], leaf
        while node:
            chain.insert(0, tree.tokens[node])
            node = tree.parents[node]
        chains.add(tuple(chain))
    assert {(4, 9, 1, 2), (3, 9, 1, 2, 4)} <= chains  # the latest place first, then the other
    assert len(draft([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], 3)) == 4
    assert len(draft([5], 8)) == 1 and len(draft([1, 2, 3], 8)) == 1


def test_a_tree_sees_its_ancestors():
    tree = Tree([0])
    tree.add([1, 2, 3], 9)
    tree.add([1, 4], 9)
    tree.add([5], 9)
    assert tree.tokens == [0, 1, 2, 3, 4, 5] and tree.parents == [-1, 0, 1, 2, 1, 0]
    assert tree.depths() == [0, 1, 2, 3, 2, 1]
    assert tree.seen()[4].tolist() == [True, True, False, False, True, False]
    assert tree.accept([1, 4, 9, 9, 7, 9]) == ([0, 1, 4], 7)
    assert tree.accept([8, 4, 9, 9, 7, 9]) == ([0], 8)
