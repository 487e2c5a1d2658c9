"""lm-evaluation-harness on converted models, with a task that needs no network."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

import tiny
from command import answer_of, run, run_process
from tessella.integrations import hf
from tessella.models.convert import convert
from tessella.quant.recipe import PRESETS

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="needs lm_eval: tessella[eval]")

TASK = """
task: toy
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def scored(model, tokenizer, question: str, choice: str) -> float:
    """Log-likelihood of a choice behind a question, computed here."""
    q = tokenizer(question, add_special_tokens=False)["input_ids"]
    c = tokenizer(" " + choice, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([q + c])).logits[0].float().log_softmax(-1)
    return sum(float(logits[len(q) + i - 1, t]) for i, t in enumerate(c))


@needs_harness
def test_a_local_task_on_a_converted_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny.save(tmp_path / "m", "llama")
    convert(tmp_path / "m", tmp_path / "q", PRESETS["w4a8"])
    model, tokenizer = hf.load(str(tmp_path / "q"))
    choices = ["w3", "w40", "w77"]
    questions = [f"w{i} w{3 * i} w{i + 7}" for i in range(12)]
    best = [
        max(range(3), key=lambda n, q=q: scored(model, tokenizer, q, choices[n])) for q in questions
    ]
    answers = [b if i % 3 else (b + 1) % 3 for i, b in enumerate(best)]  # 4 of 12 are wrong
    rows = [{"question": q, "choices": choices, "answer": a} for q, a in zip(questions, answers)]
    data = tmp_path / "toy.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/toy.yaml").write_text(TASK.format(data=data))
    command = ("tasks", tmp_path / "q", "toy", "--folder", tmp_path / "tasks", "--json")
    found = answer_of(run_process(*command, HF_DATASETS_CACHE=str(tmp_path / "cache")))
    assert found["tasks"]["toy"]["acc"] == pytest.approx(8 / 12)


@needs_harness
def test_an_unknown_task_is_refused(tmp_path):
    tiny.save(tmp_path / "m", "llama")
    result = run("tasks", tmp_path / "m", "no_such_task_at_all")
    assert result.exit_code == 1 and "no task 'no_such_task_at_all'" in result.stderr


@pytest.mark.skipif(HAS_HARNESS, reason="lm_eval is installed")
def test_without_the_harness_the_extra_is_named(tmp_path):
    tiny.save(tmp_path / "m", "llama")
    result = run("tasks", tmp_path / "m", "arc_easy")
    assert result.exit_code == 1 and "tessella[eval]" in result.stderr
