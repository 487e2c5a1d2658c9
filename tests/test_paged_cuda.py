"""A converted model on a GPU with a paged cache: the tokens of the CPU, eager and under graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tessella
from tessella.integrations.hf import load
from tessella.integrations.runner import Runner
from tessella.models.convert import convert
from tessella.quant import recipe as recipes

pytestmark = pytest.mark.gpu
MODEL = Path(tessella.__file__).parent / "data/pylm-6m"
PROMPTS = ("def main(", "import os\nimport sys\n", "class Node:\n    def __init__(self", "for i in")
SURE = 0.5
"""Between the two best logits: see test_generate_cuda.py."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    convert(MODEL, out, recipes.load("w4a8"))
    model, tokenizer = load(str(out), "cpu", torch.bfloat16)
    return model, load(str(out), "cuda", torch.bfloat16)[0], tokenizer


def run(model, tokenizer, codec, graphs=True, speculate=0, new=40):
    runner = Runner(model, codec=codec, tokens=4096, page_size=16, speculate=speculate)
    if not graphs:
        runner.graphs = None
    requests = [runner.submit(tokenizer(p).input_ids, new) for p in PROMPTS]
    runner.run()
    return [r.tokens for r in requests], runner


def assert_same_where_sure(model, tokenizer, got, want):
    """Tokens are equal up to the first one that was a close decision on the CPU."""
    compared = 0
    for prompt, a, b in zip(PROMPTS, got, want, strict=True):
        ids = tokenizer(prompt).input_ids
        with torch.no_grad():
            best = model(torch.tensor([ids + b])).logits[0, len(ids) - 1 : -1].float().topk(2)[0]
        doubts = (best[:, 0] - best[:, 1] <= SURE).nonzero()
        same = int(doubts[0]) if len(doubts) else len(b)
        assert a[:same] == b[:same]
        compared += same
    assert compared > len(PROMPTS)


@pytest.mark.parametrize("codec", ["bf16", "int8", "kv4", "kv4-hadamard"])
def test_the_runner_gives_the_tokens_of_the_cpu(models, codec):
    model, on_gpu, tokenizer = models
    want, _ = run(model, tokenizer, codec)
    eager, _ = run(on_gpu, tokenizer, codec, graphs=False)
    replayed, runner = run(on_gpu, tokenizer, codec)
    assert runner.graphs is not None and runner.graphs.replays > 30
    assert replayed == eager
    if codec in ("bf16", "int8"):  # the CPU's 4-bit kernel also rounds queries, to 8 bits
        assert_same_where_sure(model, tokenizer, eager, want)


def test_drafts_change_nothing(models):
    model, on_gpu, tokenizer = models
    want, _ = run(on_gpu, tokenizer, "kv4", graphs=False)
    got, _ = run(on_gpu, tokenizer, "kv4", speculate=4)
    assert_same_where_sure(model, tokenizer, got, want)
