"""Text files, windows, perplexity and generation, against values computed by hand."""

import json
import lzma
import math

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tessella.integrations import evaluate
from tessella.integrations.evaluate import EvaluationError, perplexity, split_windows
from tessella.integrations.generate import GenerationError, generate
from tessella.integrations.text import TextError, read_documents

VOCAB = 40
POSITIONS = 64


class Letters:
    """A tokenizer for a..z, one token a letter; what evaluate and generate need of one."""

    eos_token_id = pad_token_id = None
    chat_template = None

    def __init__(self, bos: int | None = 1):
        self.bos_token_id = bos

    def __call__(self, text, add_special_tokens=True, return_tensors=None, **_):
        ids = [ord(c) - ord("a") + 2 for c in text]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}

    def decode(self, ids, **_):
        return "".join(chr(int(i) - 2 + ord("a")) for i in ids)


def tiny_model(seed: int = 0, vocab: int = VOCAB, **config) -> LlamaForCausalLM:
    """A random model whose predictions are far from uniform."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            bos_token_id=None,
            eos_token_id=None,
            initializer_range=0.3,
            **config,
        )
    ).eval()
    model.generation_config = GenerationConfig()
    return model


# ---------------------------------------------------------------- text files

DOCUMENTS = ["def f():\r\n    return 1\n", "Grüße\u2028 \u4e16\u754c", "last"]


def write(path, text: str) -> str:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "wb") as f:
        f.write(text.encode())
    return str(path)


@pytest.mark.parametrize("ending", [".txt", ".txt.xz"])
def test_text_documents_are_separated_by_nul_and_kept_as_they_are(tmp_path, ending):
    path = write(tmp_path / f"a.b{ending}", "\0".join(["", *DOCUMENTS, ""]))
    assert read_documents(path) == DOCUMENTS


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.xz"])
@pytest.mark.parametrize("ascii", [True, False])
def test_json_lines(tmp_path, ending, ascii):
    lines = [json.dumps({"id": 3, "text": d}, ensure_ascii=ascii) for d in [*DOCUMENTS, ""]]
    path = write(tmp_path / f"a{ending}", "\n\n".join(lines) + "\n")
    assert read_documents(path) == DOCUMENTS


def test_a_text_without_nul_is_one_document_and_a_byte_order_mark_is_dropped(tmp_path):
    assert read_documents(write(tmp_path / "a.txt", "\ufeffone\ntwo\n")) == ["one\ntwo\n"]


BAD_FILES = {
    "nothing.txt": (b"", "holds no text"),
    "nul.txt": (b"\0\0", "holds no text"),
    "latin.txt": (b"caf\xe9!", "not UTF-8 text: .* at byte 3"),
    "plain.txt.xz": (b"not compressed", "damaged or truncated .xz"),
    "cut.txt.xz": (lzma.compress(b"abc" * 99)[:-9], "damaged or truncated .xz"),
    "a.csv": (b"text", "expected a name that ends in .txt, .jsonl, .txt.xz, .jsonl.xz"),
    "a.xz": (lzma.compress(b"text"), "expected a name that ends in"),
    "broken.jsonl": (b'{"text": "ok"}\n\n{"text": ', ":3: not JSON: .* at column"),
    "nokey.jsonl": (b'{"content": "a"}', r":1: expected an object .* got keys \['content'\]"),
    "number.jsonl": (b'{"text": 1}', ':1: expected an object with a string "text"'),
    "list.jsonl": (b"[1]", ':1: expected an object with a string "text", got list'),
    "half.jsonl": (b'{"text": "\\ud800"}', ":1: text is not Unicode"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_text_is_refused_naming_the_file(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message) as e:
        read_documents(tmp_path / name)
    assert name in str(e.value)


def test_missing_text_and_folders_are_refused(tmp_path):
    with pytest.raises(TextError, match=r"none\.txt: No such file"):
        read_documents(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(TextError, match=r"folder\.txt: Is a directory"):
        read_documents(tmp_path / "folder.txt")


# ---------------------------------------------------------------- windows


def pairs(windows):
    return [(w.inputs.tolist(), w.targets.tolist(), w.document) for w in windows]


def test_with_bos_every_token_of_a_ragged_document_is_predicted_once():
    docs = [[10, 11, 12, 13, 14], [], [20], [30, 31, 32]]
    assert pairs(split_windows(docs, ctx=3, bos=1)) == [
        ([1, 10, 11], [10, 11, 12], 0),
        ([1, 13], [13, 14], 0),
        ([1], [20], 2),
        ([1, 30, 31], [30, 31, 32], 3),
    ]


def test_without_bos_the_first_token_of_a_window_is_not_predicted():
    docs = [[10, 11, 12, 13, 14], [20], [30, 31, 32, 33]]
    assert pairs(split_windows(docs, ctx=3, bos=None)) == [
        ([10, 11], [11, 12], 0),
        ([13], [14], 0),
        ([30, 31], [31, 32], 2),
    ]


@pytest.mark.parametrize("limit", range(1, 11))
@pytest.mark.parametrize("bos", [None, 1])
def test_a_limit_takes_a_prefix_of_the_predictions(limit, bos):
    docs = [[10, 11, 12, 13, 14], [], [20, 21, 22, 23, 24, 25]]
    flat = [t for w in split_windows(docs, 4, bos) for t in w.targets.tolist()]
    limited = [t for w in split_windows(docs, 4, bos, limit) for t in w.targets.tolist()]
    assert limited == flat[:limit]


def test_documents_past_the_limit_are_not_tokenised():
    def docs():
        yield [10, 11]
        raise AssertionError("read on")

    assert len(split_windows(docs(), ctx=4, bos=1, limit_tokens=2)) == 1


# ---------------------------------------------------------------- perplexity


def nll_by_hand(model, windows) -> list[float]:
    """fp64 negative log-likelihoods, one token at a time."""
    losses = []
    for inputs, targets in windows:
        for i, target in enumerate(targets):
            with torch.no_grad():
                logits = model(torch.tensor([inputs[: i + 1]])).logits[0, -1].double()
            losses.append(float(logits.logsumexp(0) - logits[target]))
    return losses


DOCS = ["abcdefghij", "", "zyx", "k", "mnopqrs"]


@pytest.mark.parametrize("bos", [None, 1])
def test_perplexity_is_that_computed_by_hand(bos):
    model, tokenizer = tiny_model(), Letters(bos)
    windows = split_windows((tokenizer(d)["input_ids"] for d in DOCS), 4, bos)
    losses = [nll_by_hand(model, [(w.inputs.tolist(), w.targets.tolist())]) for w in windows]
    flat = [x for window in losses for x in window]
    mean = sum(flat) / len(flat)

    result = perplexity(model, tokenizer, DOCS, ctx=4)

    assert result.ppl == pytest.approx(math.exp(mean), rel=1e-5)
    assert result.tokens == len(flat) == (21 if bos else 14)
    assert (result.windows, result.documents) == (len(windows), 4 if bos else 3)
    W, N = len(windows), len(flat)
    spread = sum((sum(x) - mean * len(x)) ** 2 for x in losses)
    expected = math.exp(mean) * math.sqrt(W / (W - 1) * spread) / N
    assert result.ppl_stderr == pytest.approx(expected, rel=1e-4)
    assert result.kl is result.top1 is result.ppl_ref is result.ppl_ratio is None


def test_the_bos_of_the_model_configuration_serves_when_the_tokenizer_has_none():
    model = tiny_model()
    with_bos = perplexity(model, Letters(1), DOCS, ctx=4)
    model.config.bos_token_id = 1
    assert perplexity(model, Letters(None), DOCS, ctx=4) == with_bos


def test_a_model_is_at_no_distance_from_itself():
    model = tiny_model()
    result = perplexity(model, Letters(), DOCS, ctx=4, reference=model)
    assert (result.kl, result.top1, result.ppl_ratio) == (0.0, 1.0, 1.0)
    assert result.ppl_ref == result.ppl and result.ppl_ref_stderr == result.ppl_stderr
    assert result.ppl_ratio_stderr == 0.0


def test_distance_to_a_reference_is_that_computed_by_hand():
    model, reference, tokenizer = tiny_model(0), tiny_model(1), Letters()
    kl, agree = [], []
    for w in split_windows((tokenizer(d)["input_ids"] for d in DOCS), 4, 1):
        with torch.no_grad():
            logp = model(w.inputs[None]).logits[0].double().log_softmax(-1)
            logq = reference(w.inputs[None]).logits[0].double().log_softmax(-1)
        kl += (logq.exp() * (logq - logp)).sum(-1).tolist()
        agree += (logp.argmax(-1) == logq.argmax(-1)).tolist()

    result = perplexity(model, tokenizer, DOCS, ctx=4, reference=reference)

    assert result.kl == pytest.approx(sum(kl) / len(kl), rel=1e-5)
    assert result.top1 == pytest.approx(sum(agree) / len(agree))
    alone = perplexity(reference, tokenizer, DOCS, ctx=4)
    assert (result.ppl_ref, result.ppl_ref_stderr) == (alone.ppl, alone.ppl_stderr)
    assert result.ppl == perplexity(model, tokenizer, DOCS, ctx=4).ppl
    assert result.ppl_ratio == pytest.approx(result.ppl / result.ppl_ref)


def test_results_do_not_depend_on_the_size_of_the_logit_chunks(monkeypatch):
    model, reference = tiny_model(0), tiny_model(1)
    whole = perplexity(model, Letters(), DOCS, ctx=8, reference=reference)
    rows = []
    log_probs = evaluate._Scorer.log_probs

    def counted(self, states):
        rows.append(len(states))
        return log_probs(self, states)

    monkeypatch.setattr(evaluate, "LOGIT_ELEMENTS", 3 * VOCAB)
    monkeypatch.setattr(evaluate._Scorer, "log_probs", counted)
    pieces = perplexity(model, Letters(), DOCS, ctx=8, reference=reference)
    assert max(rows) == 3 and sum(rows) == 2 * pieces.tokens
    for field in ("ppl", "ppl_stderr", "kl", "top1", "ppl_ref", "ppl_ratio"):
        assert getattr(pieces, field) == pytest.approx(getattr(whole, field), rel=1e-6)


class Capped(LlamaForCausalLM):
    """Logits that are not those of the output embedding alone."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * torch.tanh(out.logits / 2)
        return out


def test_a_function_between_head_and_logits_is_noticed():
    plain = tiny_model()
    capped = Capped(plain.config).eval()
    capped.load_state_dict(plain.state_dict())
    losses = nll_by_hand(capped, [([1, 2, 3], [2, 3, 4])])
    result = perplexity(capped, Letters(), ["abc"], ctx=4)
    assert result.ppl == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert result.ppl != pytest.approx(perplexity(plain, Letters(), ["abc"], ctx=4).ppl, rel=1e-3)


def test_tokens_that_the_reference_rules_out_do_not_spoil_the_divergence():
    model, reference = tiny_model(0), tiny_model(0)
    reference.set_output_embeddings(torch.nn.Linear(32, VOCAB))
    with torch.no_grad():
        reference.get_output_embeddings().weight.copy_(model.get_output_embeddings().weight)
        reference.get_output_embeddings().bias.zero_()[-1] = -torch.inf
    result = perplexity(model, Letters(), DOCS, ctx=4, reference=reference)
    assert 0 < result.kl < 1


def test_progress_counts_tokens_up_to_the_total():
    calls = []
    perplexity(tiny_model(), Letters(), DOCS, ctx=4, progress=lambda *a: calls.append(a))
    assert calls[-1] == (21, 21) and sorted(calls) == calls
    assert {total for _, total in calls} == {21}


def test_one_window_has_no_standard_error():
    assert math.isnan(perplexity(tiny_model(), Letters(), ["abc"], ctx=8).ppl_stderr)


def test_two_runs_agree_exactly():
    model = tiny_model()
    assert perplexity(model, Letters(), DOCS, ctx=4) == perplexity(model, Letters(), DOCS, ctx=4)


@pytest.mark.parametrize(
    ("bos", "docs"), [(1, []), (1, ["", ""]), (None, ["a", "b"])], ids=["none", "empty", "single"]
)
def test_nothing_to_predict_is_refused(bos, docs):
    with pytest.raises(EvaluationError, match="no token to predict"):
        perplexity(tiny_model(), Letters(bos), docs, ctx=4)


@pytest.mark.parametrize("ctx", [-1, 0, 1, POSITIONS + 1])
def test_a_context_out_of_range_is_refused(ctx):
    with pytest.raises(EvaluationError, match=f"at least 2 up to .*{POSITIONS} .*got {ctx}"):
        perplexity(tiny_model(), Letters(), DOCS, ctx=ctx)


def test_a_model_without_numbers_is_refused():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(EvaluationError, match="log-likelihood of document 0 is nan"):
        perplexity(model, Letters(), DOCS, ctx=4)


def test_vocabularies_of_different_sizes_are_refused():
    with pytest.raises(EvaluationError, match=f"has {VOCAB + 8} tokens .* expected {VOCAB}"):
        perplexity(tiny_model(), Letters(), DOCS, ctx=4, reference=tiny_model(vocab=VOCAB + 8))


# ---------------------------------------------------------------- generation


def greedy_by_hand(model, ids: list[int], n: int) -> list[int]:
    """Without a cache, one forward pass a token."""
    new = []
    for _ in range(n):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


def test_greedy_generation_and_its_accounts():
    model, pieces = tiny_model(), []
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.3, top_k=3)
    result = generate(model, Letters(), "abc", max_new_tokens=9, on_text=pieces.append)
    assert result.token_ids == greedy_by_hand(model, [2, 3, 4], 9)
    assert "".join(pieces) == result.text == Letters().decode(result.token_ids)
    assert (result.prompt_tokens, result.tokens) == (3, 9)
    assert result.prefill_tok_s == 3 / result.prefill_seconds > 0
    assert result.tok_s == 8 / result.decode_seconds > 0


def test_one_new_token_has_no_decode_speed():
    assert generate(tiny_model(), Letters(), "abc", max_new_tokens=1).tok_s is None


def test_generation_stops_at_the_end_token_unless_told_not_to():
    model = tiny_model()
    stop = greedy_by_hand(model, [2, 3, 4], 3)[-1]
    model.generation_config = GenerationConfig(eos_token_id=[stop], pad_token_id=0)
    short = generate(model, Letters(), "abc", max_new_tokens=9)
    assert short.token_ids[-1] == stop and short.tokens <= 3
    assert generate(model, Letters(), "abc", max_new_tokens=9, stop_at_eos=False).tokens == 9


def test_sampling_follows_its_seed_and_leaves_the_global_generator_alone():
    model = tiny_model()

    def sample(seed, **kw):
        return generate(model, Letters(), "abc", max_new_tokens=20, seed=seed, **kw).token_ids

    state = torch.get_rng_state()
    assert sample(1, temperature=2.0) == sample(1, temperature=2.0)
    assert len({tuple(sample(seed, temperature=2.0)) for seed in range(5)}) > 1
    assert sample(3, temperature=2.0, top_p=1e-6) == sample(0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected >= 1, got 0"),
        ({"temperature": -1.0}, "temperature: expected >= 0, got -1"),
        ({"temperature": math.nan}, "temperature: expected >= 0, got nan"),
        ({"top_p": 0.0}, "top_p: expected within"),
        ({"top_p": 1.5}, "top_p: expected within"),
        ({"chat": True}, "no chat template"),
        ({"prompt": ""}, "prompt: expected at least one token"),
        ({"max_new_tokens": POSITIONS}, f"prompt of 3 tokens and {POSITIONS} new ones"),
    ],
)
def test_impossible_generation_is_refused(arguments, message):
    with pytest.raises(GenerationError, match=message):
        generate(tiny_model(), Letters(), **{"prompt": "abc", **arguments})
