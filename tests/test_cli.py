"""The command line: answers, JSON, exit codes and what errors look like."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import tessella
from command import answer_of, environment, one_object, refused, run, run_on_terminal, run_process
from tessella.cli import app
from tessella.cli.demo import MODEL
from tessella.ops._register import SCHEMAS
from tessella.quant.recipe import PRESETS

COMMANDS = (
    "demo",
    "info",
    "quantize",
    "outliers",
    "to-mla",
    "heal",
    "generate",
    "eval",
    "tasks",
    "tune",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "pylm-6m-w4a8"
    result = run("quantize", MODEL, out, "--quiet")
    assert result.exit_code == 0, result.stderr
    return out


@pytest.fixture
def broken(converted, tmp_path) -> Path:
    """A copy of the converted model for a test to damage."""
    return Path(shutil.copytree(converted, tmp_path / "broken"))


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the bundled model for a test to damage."""
    return Path(shutil.copytree(MODEL, tmp_path / "source"))


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\0".join(f"def f{i}(x):\n    return x + {i}\n" * 6 for i in range(4)))
    return path


def edit_config(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# ---------------------------------------------------------------- help and usage


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout and f"tessella {command}" in result.stdout
    assert "--json" in result.stdout and "--debug" in result.stdout


def test_help_lists_exactly_the_commands_there_are():
    assert sorted(c.name for c in app.registered_commands) == sorted(COMMANDS)


@pytest.mark.parametrize("args", [["--help"], ["eval", "--help"], ["--version"], ["eval"]])
@pytest.mark.parametrize("start", ["script", "module"])
def test_help_and_usage_errors_do_not_wait_for_torch(args, start):
    argv0 = {"script": "/usr/bin/tessella", "module": "-m"}[start]
    code = (
        f"import sys; sys.argv = {[argv0, *args]!r}; sys.orig_argv = ['python', '-m', 'tessella']\n"
        "from tessella.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == (2 if args == ["eval"] else 0), done.stderr


def test_version():
    done = run_process("--version")
    assert (done.returncode, done.stdout) == (0, f"tessella {tessella.__version__}\n")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["nonsense"],
        ["quantize", "only-model"],
        ["quantize", "m", "o", "--device", "tpu"],
        ["eval", "m"],
        ["eval", "m", "--text", "t.txt", "--ctx", "1"],
        ["eval", "m", "--text", "t.txt", "--limit-tokens", "0"],
        ["generate", "m"],
        ["generate", "m", "--prompt", "x", "--max-new-tokens", "0"],
        ["generate", "m", "--prompt", "x", "--temperature", "-1"],
        ["generate", "m", "--prompt", "x", "--top-p", "2"],
        ["generate", "m", "--prompt", "x", "--dtype", "int8"],
        ["info", "--nonsense"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(args):
    result = run(*args)
    assert result.exit_code == 2
    assert "Traceback" not in result.stdout + result.stderr


# ---------------------------------------------------------------- info


def test_info_as_json():
    facts = answer_of(run_process("info", "--json"))
    assert {"torch", "tessella", "cpu_isa", "cuda", "kernels", "optional"} <= facts.keys()
    assert facts["tessella"]["version"] == tessella.__version__
    assert facts["torch"]["version"] == torch.__version__
    assert facts["ops"].keys() == SCHEMAS.keys()


def test_info_says_which_ops_are_compiled():
    facts = answer_of(run("info", "--json"))
    compiled = tessella._native.HAS_OPS
    assert {"CPU" in keys for keys in facts["ops"].values()} == {compiled}
    assert (facts["tessella"]["kernels_missing_because"] is None) == compiled


def test_info_without_compiled_code():
    done = run_process("info", "--json", TESSELLA_DISABLE_NATIVE="1")
    facts = answer_of(done)
    assert facts["tessella"]["kernels_missing_because"] == "TESSELLA_DISABLE_NATIVE is set"
    assert facts["cpu_isa"] is None and facts["kernels"] == {}
    assert not any(facts["ops"].values())
    assert "warning: tessella: no compiled kernels" in done.stderr


def test_info_for_people():
    result = run("info")
    assert result.exit_code == 0
    for word in (tessella.__version__, torch.__version__, "op w4ax_gemm", "vllm"):
        assert word in result.stdout


# ---------------------------------------------------------------- quantize


def test_quantize_as_json(tmp_path):
    answer = answer_of(run_process("quantize", MODEL, tmp_path / "out", "--json"))
    assert {"layers", "bytes_in", "bytes_out", "seconds", "peak_rss"} <= answer.keys()
    assert len(answer["layers"]) == 42
    assert {"name", "shape", "scheme", "rel_error", "bytes"} <= answer["layers"][0].keys()
    assert answer["recipe"] == PRESETS["w4a8"].to_dict()
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert 0 < sum(f.stat().st_size for f in shards) - answer["bytes_out"] < 1e5


def test_quantize_for_people(tmp_path):
    result = run("quantize", MODEL, tmp_path / "out")
    assert result.exit_code == 0
    assert "model.layers.5.mlp.down_proj" in result.stdout and "twolevel" in result.stdout
    result = run("quantize", MODEL, tmp_path / "quiet", "--quiet")
    assert "42 linears" in result.stdout and "down_proj" not in result.stdout


def test_dry_run_writes_nothing(tmp_path):
    answer = answer_of(run("quantize", MODEL, tmp_path / "out", "--dry-run", "--json"))
    assert len(answer["layers"]) == 42 and answer["layers"][0]["rel_error"] is None
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_from_a_file_and_the_head(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text(PRESETS["w4a8-g128"].to_toml().replace("w4a8-g128", "mine"))
    out = tmp_path / "out"
    answer = answer_of(run("quantize", MODEL, out, "--recipe", file, "--lm-head", "--json"))
    assert answer["recipe"]["name"] == "mine" and answer["recipe"]["weights"]["lm_head"]
    assert {layer["scheme"] for layer in answer["layers"]} == {"g128"}
    assert "lm_head" in [layer["name"] for layer in answer["layers"]]


@pytest.mark.parametrize("recipe", ["w4a99", "none.toml"])
def test_an_unknown_recipe_is_refused(tmp_path, recipe):
    result = run_process("quantize", MODEL, tmp_path / "out", "--recipe", recipe)
    refused(result, recipe)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_architecture_is_refused(source, tmp_path):
    edit_config(source, architectures=["MambaForCausalLM"], model_type="mamba")
    refused(run("quantize", source, tmp_path / "out"), "config.json", "Mamba", "LlamaForCausalLM")
    assert not (tmp_path / "out").exists()


def test_a_missing_model_and_a_taken_folder_are_refused(tmp_path, converted):
    refused(run("quantize", tmp_path / "no-such-model", tmp_path / "out"), "no-such-model")
    refused(run("quantize", MODEL, converted), str(converted))


def test_a_weight_that_is_not_finite_is_refused(source, tmp_path):
    from safetensors.torch import load_file

    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    refused(
        run("quantize", source, tmp_path / "out"),
        "model.safetensors",
        "model.layers.3.mlp.up_proj.weight",
    )
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path):
    result = run_process("quantize", MODEL, tmp_path / "out", "--recipe", "w4a99", "--debug")
    assert result.returncode == 1 and result.stdout == ""
    assert "Traceback (most recent call last)" in result.stderr
    assert "RecipeError" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused(tmp_path):
    refused(run("quantize", MODEL, tmp_path / "out", "--device", "cuda"), "--device cuda")


def test_an_interrupt_leaves_no_output_and_can_be_resumed(tmp_path):
    model, out, partial = (tmp_path / n for n in ("model", "out", "out.partial"))
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=64,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    process = subprocess.Popen(
        [sys.executable, "-m", "tessella", "quantize", model, out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # a shell that starts the tests in the background has interrupts ignored, and so would we
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and len(list(partial.glob("*.safetensors"))) < 1:
            assert time.monotonic() < deadline, "no shard was written"
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1, stderr
    assert stdout == "" and "interrupted" in stderr and "Traceback" not in stderr
    assert not out.exists()
    assert len(list(partial.glob("*.safetensors"))) < 65

    answer = answer_of(run("quantize", model, out, "--resume", "--json"))
    assert len(answer["layers"]) == 64 * 7
    assert (out / "config.json").exists() and not partial.exists()


# ---------------------------------------------------------------- generate


def test_generate_as_json(converted):
    answer = answer_of(
        run_process("generate", converted, "--prompt", "def f(x):", "--max-new-tokens", 6, "--json")
    )
    assert {"text", "tokens", "tok_s"} <= answer.keys()
    assert 1 <= answer["tokens"] <= 6 and isinstance(answer["text"], str)
    assert answer["prefill_tok_s"] > 0


def test_generate_streams_the_text_alone_on_stdout(converted):
    args = ["generate", converted, "--prompt", "def f(x):", "--max-new-tokens", "12"]
    streamed, answer = run_process(*args), answer_of(run(*args, "--json"))
    assert streamed.stdout == answer["text"] + "\n"
    assert "tok/s" in streamed.stderr


def test_a_reader_that_stops_early_is_not_an_error_to_report(converted):
    args = ["generate", converted, "--prompt", "import os\n", "--max-new-tokens", "64"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tessella", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read().decode() == ""
    assert process.wait(60) == 1


def test_the_prompt_can_come_from_stdin(converted):
    args = ["--max-new-tokens", "8", "--json"]
    piped = run_process("generate", converted, "--prompt", "-", *args, stdin="def f(ä):\n")
    given = run("generate", converted, "--prompt", "def f(ä):\n", *args)
    assert answer_of(piped)["text"] == answer_of(given)["text"]
    refused(run_process("generate", converted, "--prompt", "-", stdin=b"\xff"), "not UTF-8")


def test_sampling_depends_on_the_seed_only(converted):
    def text(seed):
        args = ["--prompt", "import", "--max-new-tokens", 16, "--temperature", 1.5, "--json"]
        return answer_of(run("generate", converted, *args, "--seed", seed))["text"]

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_generate_takes_an_unconverted_checkpoint():
    result = run("generate", MODEL, "--prompt", "import", "--max-new-tokens", 3, "--json")
    assert 1 <= answer_of(result)["tokens"] <= 3


def test_requests_that_do_not_fit_are_refused(converted):
    refused(run("generate", converted, "--prompt", ""), "at least one token")
    refused(run("generate", converted, "--prompt", "x", "--chat"), "chat template")
    too_many = ["--prompt", "x", "--max-new-tokens", "5000"]
    refused(run("generate", converted, *too_many), "4096 positions")


def test_a_chat_template_is_applied(broken):
    file = broken / "tokenizer_config.json"
    template = "{% for m in messages %}# {{ m['content'] }}\n{% endfor %}"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    args = ["generate", broken, "--max-new-tokens", 8, "--json"]
    chat = answer_of(run(*args, "--chat", "--prompt", "sort a list"))
    plain = answer_of(run(*args, "--prompt", "# sort a list\n"))
    assert chat["text"] == plain["text"]


def test_a_newer_format_is_refused(broken):
    config = json.loads((broken / "config.json").read_text())["quantization_config"]
    edit_config(broken, quantization_config={**config, "format_version": 99})
    refused(run("generate", broken, "--prompt", "x"), "config.json", "format_version", "99")


def test_a_missing_shard_is_refused(broken, text):
    shard = sorted(broken.glob("*.safetensors"))[2]
    shard.unlink()
    refused(run("generate", broken, "--prompt", "x"), shard.name)
    refused(run("eval", broken, "--text", text), shard.name)


def test_a_truncated_shard_is_refused(broken):
    shard = sorted(broken.glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 100)
    refused(run("generate", broken, "--prompt", "x"), shard.name)


def test_a_folder_without_a_model_is_refused(tmp_path):
    refused(run_process("generate", tmp_path, "--prompt", "x"), str(tmp_path))


# ---------------------------------------------------------------- eval


def test_eval_as_json(converted, text):
    answer = answer_of(
        run_process("eval", converted, "--text", text, "--ctx", 64, "--ref", MODEL, "--json")
    )
    assert {"ppl", "ppl_stderr", "tokens", "kl", "top1"} <= answer.keys()
    assert 0 < answer["kl"] < 0.2 and 0.7 < answer["top1"] <= 1
    assert answer["documents"] == 4
    alone = answer_of(run("eval", MODEL, "--text", text, "--ctx", 64, "--json"))
    assert answer["ppl_ref"] == pytest.approx(alone["ppl"], rel=1e-4)
    assert alone["kl"] is None and alone["top1"] is None


def test_a_single_window_has_null_for_its_standard_error(text):
    args = ["--ctx", 64, "--limit-tokens", 9, "--json"]
    answer = answer_of(run("eval", MODEL, "--text", text, *args))
    assert answer["tokens"] == 9 and answer["ppl_stderr"] is None


def test_eval_for_people(text):
    result = run("eval", MODEL, "--text", text, "--ref", MODEL, "--limit-tokens", 50)
    assert result.exit_code == 0
    for word in ("perplexity", "50 in", "KL(reference || model)", "0.00000", "100.00%"):
        assert word in result.stdout


def test_unusable_text_is_refused(tmp_path):
    refused(run_process("eval", MODEL, "--text", tmp_path / "no.txt"), "no.txt")
    (tmp_path / "text.csv").write_text("x")
    refused(run("eval", MODEL, "--text", tmp_path / "text.csv"), "text.csv", ".jsonl")


def test_a_context_beyond_the_model_is_refused(text):
    refused(run("eval", MODEL, "--text", text, "--ctx", 8192), "4096 positions", "8192")


def test_a_reference_with_another_tokenizer_is_refused(source, text):
    file = source / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    file.write_text(json.dumps(tokenizer))
    refused(run("eval", MODEL, "--text", text, "--ref", source), "--ref", "tokenizer")


# ---------------------------------------------------------------- a terminal


def test_progress_is_shown_on_a_terminal_and_json_stays_alone(tmp_path, text):
    code, stdout, shown = run_on_terminal("quantize", MODEL, tmp_path / "out", "--json")
    assert code == 0, shown
    assert len(one_object(stdout)["layers"]) == 42
    assert "linears" in shown and "42" in shown
    code, stdout, shown = run_on_terminal("eval", MODEL, "--text", text, "--json")
    assert code == 0, shown
    assert one_object(stdout)["tokens"] > 0 and "evaluating" in shown
    code, stdout, shown = run_on_terminal("quantize", MODEL, tmp_path / "out")
    assert (code, stdout) == (1, "") and "error:" in shown and "Traceback" not in shown


# ---------------------------------------------------------------- errors nobody expected


def test_an_unexpected_error_is_one_screen_too(monkeypatch, text):
    from tessella.integrations import evaluate

    def fail(*_, **__):
        print("chatter of a library")
        raise ZeroDivisionError("\n".join(["many lines"] * 100))

    monkeypatch.setattr(evaluate, "perplexity", fail)
    result = run("eval", MODEL, "--text", text, "--json")
    refused(result, "ZeroDivisionError: many lines", "--debug")
    assert "chatter" in result.stderr
