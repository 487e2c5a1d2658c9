"""Healing: it distils and fine-tunes, resumes, and refuses what it cannot do."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import tiny
from command import answer_of, refused, run
from tessella.integrations import hf
from tessella.integrations.examples import IGNORED, collate, read_examples
from tessella.integrations.heal import Distiller, HealOptions, forward_kl, heal
from tessella.integrations.text import TextError
from tessella.models.to_mla import Options, to_mla

CTX = 24
SMALL = {"steps": 12, "batch": 4, "lr": 2e-3, "sft_steps": 8, "sft_lr": 2e-3, "save_every": 4}


def windows(n: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randint(5, tiny.VOCAB, (n, CTX), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    """(teacher, student)."""
    root = tmp_path_factory.mktemp("models")
    tiny.save(root / "teacher", "llama")
    to_mla(root / "teacher", root / "student", Options(48, 32, 8), windows(), windows(4, 2))
    return str(root / "teacher"), str(root / "student")


@pytest.fixture
def instructions(tmp_path) -> Path:
    path = tmp_path / "sft.jsonl"
    rows = [
        {"prompt": "w1 w2", "completion": "w3 w4 w5"},
        {"messages": [{"role": "user", "content": "w7"}, {"role": "x", "content": "w8 w9"}]},
        {"text": "w3 w4 w5 w6"},
    ]
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    return path


def divergence(a: str, b: str) -> float:
    with torch.inference_mode():
        p, q = (hf.load(m, dtype=torch.float32)[0](input_ids=windows(8, 9)).logits for m in (a, b))
    return forward_kl(p, q).item()


def test_forward_kl():
    p, q = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    expected = (0.5 * torch.tensor([2.0, 2 / 3]).log().sum() + torch.tensor(2.0).log()) / 2
    assert forward_kl(p.clamp_min(1e-30).log(), q.log()) == pytest.approx(expected.item())
    assert forward_kl(q.log() + 3, q.log()) == pytest.approx(0, abs=1e-6)


def test_distillation_comes_closer_on_other_text(models, tmp_path, instructions):
    teacher, student = models
    options = HealOptions(**SMALL | {"steps": 40, "lr": 3e-4, "batch": 8})
    how = {"teacher": teacher, "windows": windows(64), "examples": None, "options": options}
    report = heal(student, tmp_path / "out", **how)
    assert report.loss < report.loss_first
    assert divergence(teacher, str(tmp_path / "out")) < 0.95 * divergence(teacher, student)
    model, _ = hf.load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.config.conversion["healed"]["steps"] == 40
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"loss.json", "LICENSE"} <= files
    assert ("loss.png" in files) == (importlib.util.find_spec("matplotlib") is not None)
    assert not (tmp_path / "out.partial").exists()
    again = HealOptions(**SMALL | {"steps": 2, "sft_steps": 3})
    examples = read_examples(instructions, tiny.tokenizer(), CTX)
    how = {"teacher": teacher, "windows": windows(), "examples": examples, "options": again}
    heal(str(tmp_path / "out"), tmp_path / "again", **how)
    healed = json.loads((tmp_path / "again" / "config.json").read_text())["conversion"]["healed"]
    assert (healed["steps"], healed["sft_steps"]) == (42, 3)


def test_interrupted_runs_resume_to_the_same_weights(models, tmp_path, instructions):
    teacher, student = models
    examples = read_examples(instructions, tiny.tokenizer(), CTX)
    how = {"teacher": teacher, "windows": windows(), "examples": examples}
    how["options"] = HealOptions(**SMALL)
    heal(student, tmp_path / "whole", **how)
    for stage, at in (("distil", 6), ("sft", 5)):

        def stop(p, stage=stage, at=at):
            if (p.stage, p.step) == (stage, at):
                raise KeyboardInterrupt

        out = tmp_path / stage
        with pytest.raises(KeyboardInterrupt):
            heal(student, out, **how, progress=stop)
        assert not out.exists()
        heal(student, out, **how, resume=True)
        a, b = (hf.load(p)[0].state_dict() for p in (out, tmp_path / "whole"))
        assert all(torch.equal(a[n], b[n]) for n in b)
    with pytest.raises(KeyboardInterrupt):
        heal(student, tmp_path / "x", **how, progress=stop)
    how["options"] = HealOptions(**SMALL | {"lr": 1e-3})
    with pytest.raises(ValueError, match="another options"):
        heal(student, tmp_path / "x", **how, resume=True)


def test_on_policy_steps_learn_from_the_students_text(models, tmp_path, monkeypatch):
    seen = []
    sample = Distiller._continue

    def watched(self, model, prompts, length):
        ids = sample(self, model, prompts, length)
        assert ids.shape == (4, CTX) and torch.equal(ids[:, : CTX // 2], prompts)
        seen.append(ids)
        return ids

    monkeypatch.setattr(Distiller, "_continue", watched)
    options = HealOptions(**SMALL | {"steps": 6, "on_policy": 0.5})
    how = {"teacher": models[0], "windows": windows(), "examples": None, "options": options}
    heal(models[1], tmp_path / "out", **how)
    assert 0 < len(seen) < 6


def test_examples(instructions, tmp_path):
    tokenizer = tiny.tokenizer()
    examples = read_examples(instructions, tokenizer, 8)
    ids = [5 + i for i in range(90)]
    assert examples[0]["input_ids"] == [0, ids[1], ids[2], ids[3], ids[4], ids[5], 1]
    assert examples[0]["labels"] == [IGNORED] * 3 + [ids[3], ids[4], ids[5], 1]
    assert examples[1]["labels"][-3:] == [ids[8], ids[9], 1]
    assert examples[2]["labels"] == [IGNORED, *ids[3:7], 1]
    batch = collate(tiny.model("llama").config)(examples)
    assert batch["labels"].shape == batch["attention_mask"].shape == (3, 7)
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    for line, message in (
        ('{"prompt": "w1"}', r':1: expected strings "prompt" and "completion".*keys \[.prompt'),
        ("[]", r":1: .*got list"),
        ("{", ":1: not JSON"),
        (json.dumps({"prompt": "w1 " * 9, "completion": "w2"}), "shorter than 8 tokens, got 10"),
    ):
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(TextError, match=message):
            read_examples(tmp_path / "bad.jsonl", tokenizer, 8)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\0".join(" ".join(f"w{i - 5}" for i in row) for row in windows().tolist()))
    return path


def test_command(models, text, instructions, tmp_path):
    teacher, student = models
    train = ("--steps", 4, "--batch", 4, "--ctx", 16, "--sft-steps", 3)
    args = ("heal", student, tmp_path / "out", "--teacher", teacher, "--text", text)
    answer = answer_of(run(*args, "--sft", instructions, *train, "--json"))
    assert answer["steps"] == 4 and answer["sft_steps"] == 3 and answer["loss"] > 0
    shown = run(*args[:2], tmp_path / "b", "--steps", 0, "--sft", instructions, "--sft-steps", 2)
    assert shown.exit_code == 0 and "fine-tuned over 2 steps" in shown.stdout
    refused(run(*args, *train), "new or an empty folder")
    args = ("heal", student, tmp_path / "x")
    refused(run(*args), "--teacher and --text")
    refused(run(*args, "--steps", 0), "nothing to do")
    refused(run(*args, "--teacher", teacher, "--text", text, "--device", "npu"), "torch_npu")
    refused(run(*args, "--steps", 0, "--sft", text), ".jsonl")
    assert not (tmp_path / "x").exists()


def test_other_vocabularies_and_no_accelerate(models, text, tmp_path, monkeypatch):
    tiny.save(tmp_path / "other", "llama", vocab_size=128)
    args = ("heal", models[1], tmp_path / "x", "--text", text, "--ctx", 16, "--teacher")
    refused(run(*args, tmp_path / "other"), "vocabulary of 96 tokens", "got 128")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    refused(run(*args, models[0]), "pip install 'tessella[heal]'")
