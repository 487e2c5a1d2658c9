"""Converted checkpoints through transformers: loading, generating, saving, refusing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import tiny
from tessella.formats import W4Weight
from tessella.integrations import hf
from tessella.models.checkpoint import Checkpoint
from tessella.models.convert import convert
from tessella.models.errors import CheckpointError
from tessella.models.linear import W4AxLinear
from tessella.quant.recipe import PRESETS, Recipe
from tessella.ref.w4ax_gemm import w4_dequant

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
CASES = {
    "llama": (("llama", False), PRESETS["w4a8"]),
    "llama-tied": (("llama", True), PRESETS["w4a8-g128"]),
    "mistral": (("mistral", False), PRESETS["w4a8-b128"]),
    "qwen2": (("qwen2", False), PRESETS["w4a8"]),
    "qwen2-tied-head": (("qwen2", True), Recipe("head", scheme="g32", lm_head=True)),
    "qwen3": (("qwen3", False), PRESETS["w4a8-channel"]),
    "qwen3-head": (("qwen3", False), Recipe("head", lm_head=True)),
    "qwen3-mixed": (("qwen3", False), Recipe("mixed", granularity="class", k8=0.5)),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder of the source, or of the conversion, of each case; made when first asked for."""
    root = tmp_path_factory.mktemp("hf")

    def get(case: str, part: str = "out") -> Path:
        folder = root / case
        if not folder.exists():
            (arch, tied), recipe = CASES[case]
            tiny.save(folder / "model", arch, tied=tied)
            convert(folder / "model", folder / "out", recipe)
        return folder / part

    return get


@pytest.fixture
def llama(checkpoints, tmp_path) -> Path:
    """A converted Llama to damage."""
    return Path(shutil.copytree(checkpoints("llama"), tmp_path / "llama"))


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def quantised(model) -> dict[str, W4AxLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, W4AxLinear)}


def assert_exact(model, folder: Path) -> None:
    """Every stored tensor of every 4-bit linear is in the model, bit for bit."""
    ckpt, state = Checkpoint.open(folder), model.state_dict()
    for name, linear in quantised(model).items():
        for field in W4Weight.spec(linear.scheme, linear.out_features, linear.in_features):
            t = ckpt.read(f"{name}.{field}")
            loaded = state[f"{name}.{field}"]
            assert loaded.dtype == t.dtype and torch.equal(loaded, t), f"{name}.{field}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_loaded_weights_are_exact(checkpoints, case, dtype):
    folder = checkpoints(case)
    model = load(folder, dtype=dtype)
    head = CASES[case][1].lm_head
    assert len(quantised(model)) == 7 * tiny.LAYERS + head
    assert isinstance(model.lm_head, W4AxLinear) == head
    assert_exact(model, folder)
    for name, linear in quantised(model).items():
        assert linear.bias is None or linear.bias.dtype == dtype
        assert linear.training is False, name
    assert model.model.norm.weight.dtype == dtype
    tied = CASES[case][0][1] and not head
    assert tied == (model.lm_head is not None and "tied" in case and not head)
    if tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight


def logits(model) -> torch.Tensor:
    ids = torch.randint(5, tiny.VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("case", CASES)
def test_logits(checkpoints, case):
    """Only the rounding of activations lies between the model and one of dequantised weights."""
    model = load(checkpoints(case), dtype=torch.float32)
    dense = load(checkpoints(case, "model"), dtype=torch.float32)
    if CASES[case][1].lm_head:  # the head no longer shares the embedding's weight
        dense.lm_head.weight = torch.nn.Parameter(dense.lm_head.weight.detach().clone())
    for name, linear in quantised(model).items():
        weight = w4_dequant(linear.weight(), torch.float32)[:, : linear.in_features]
        dense.get_submodule(name).weight.data.copy_(weight)
    y, y_ref = logits(model), logits(dense)
    assert (y - y_ref).norm() / y_ref.norm() < (0.3 if "mixed" in case else 0.03)


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
def test_generation_batched_and_left_padded(checkpoints, case):
    model = load(checkpoints(case), dtype=torch.float32)
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    prompts = ["w1 w2 w3 w4 w5 w6", "w7", "w8 w9 w10"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert (batch["input_ids"][1, :-1] == tokenizer.pad_token_id).all(), "padded on the left"
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(**batch, **options, output_logits=True)
    assert out.sequences.shape == (3, 12)
    for i, prompt in enumerate(prompts):
        alone = model.generate(
            **tokenizer(prompt, return_tensors="pt"), **options, output_logits=True
        )
        y, y_alone = out.logits[0][i], alone.logits[0][0]
        assert (y - y_alone).norm() / y_alone.norm() < 0.05
    assert all(isinstance(text, str) for text in tokenizer.batch_decode(out.sequences))


def test_chat_template_is_kept(checkpoints):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints("llama"))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False)
    assert text == "user : w1 "


def ops_outside_ours(prof) -> list[str]:
    """Names of the ops in a trace that no tessella op called."""

    def ours(event) -> bool:
        while event is not None:
            if event.name.startswith("tessella::"):
                return True
            event = event.cpu_parent
        return False

    return [e.name for e in prof.events() if e.name.startswith("tessella::") or not ours(e)]


@pytest.mark.parametrize("case, dense", [("llama", 1), ("qwen2", 1), ("qwen3-head", 0)])
def test_every_linear_runs_our_ops(checkpoints, case, dense):
    model = load(checkpoints(case), dtype=torch.bfloat16)
    ids = torch.arange(5, 13)[None]
    model.generate(ids, max_new_tokens=2, do_sample=False, min_new_tokens=2)
    forwards = 3
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        model.generate(ids, max_new_tokens=forwards, do_sample=False, min_new_tokens=forwards)
    names = ops_outside_ours(prof)
    products = {id(m._joined or m) for m in quantised(model).values()}  # q, k and v are one
    assert len(products) == len(quantised(model)) - 2 * tiny.LAYERS
    # what they multiply is quantised by the norms and the gates; o_proj and a head do it themselves
    layers, head = tiny.LAYERS, 1 - dense
    alone = layers + head
    assert names.count("tessella::w4ax_gemm") == (len(products) - alone) * forwards
    assert names.count("tessella::w4ax_linear") == alone * forwards
    assert names.count("tessella::rms_norm_quant") == 2 * layers * forwards
    assert names.count("tessella::silu_mul_quant") == layers * forwards
    assert names.count("tessella::act_quant") == 0
    assert names.count("aten::linear") == dense * forwards, "the head only"
    for gemm in ("aten::addmm", "aten::mm"):
        assert names.count(gemm) <= dense * forwards, gemm


def test_the_trace_sees_dense_linears(checkpoints):
    """The count above can fail: the original model runs every linear through aten."""
    model = load(checkpoints("llama", "model"), dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU]) as prof, torch.no_grad():
        model(torch.arange(5, 13)[None])
    names = ops_outside_ours(prof)
    assert names.count("aten::linear") == 7 * tiny.LAYERS + 1
    assert "tessella::w4ax_gemm" not in names


def test_no_full_precision_weight_is_made(checkpoints, monkeypatch):
    """While transformers loads, the 4-bit linears hold nothing but stored tensors."""
    seen = {}
    finish = hf._Staged.finish

    def watch(self, stored, name):
        seen[name] = sum(t.nbytes for t in self.buffers()) + sum(
            t.nbytes for t in self.parameters()
        )
        assert not any(t.is_meta for t in self.buffers())
        return finish(self, stored, name)

    monkeypatch.setattr(hf._Staged, "finish", watch)
    folder = checkpoints("qwen2")
    model = load(folder, dtype=torch.bfloat16)
    tensors = Checkpoint.open(folder).tensors
    assert seen.keys() == quantised(model).keys()
    for name, nbytes in seen.items():
        assert nbytes == sum(i.nbytes for n, i in tensors.items() if n.startswith(f"{name}."))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_loader_that_casts_scales_does_no_harm(checkpoints, monkeypatch, dtype):
    """transformers may cast every floating-point buffer to the model's dtype while loading."""
    finish = hf._Staged.finish

    def cast_first(self, stored, name):
        scales = [f for f in self.spec if f.endswith("scales")]
        for field in scales:
            self._buffers[field] = self._buffers[field].to(dtype)
        return finish(self, stored, name)

    monkeypatch.setattr(hf._Staged, "finish", cast_first)
    for case in ("qwen3", "llama-tied"):  # fp32 and fp16 scales
        assert_exact(load(checkpoints(case), dtype=dtype), checkpoints(case))


@pytest.mark.parametrize("case", CASES)
def test_save_pretrained_round_trips(checkpoints, case, tmp_path):
    model = load(checkpoints(case), dtype=torch.float32)
    model.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    again = load(tmp_path / "again", dtype=torch.float32)
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    for name, t in again.state_dict().items():
        assert torch.equal(t, state[name]), name
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    original = json.loads((checkpoints(case) / "config.json").read_text())
    assert config["quantization_config"] == original["quantization_config"]


def test_a_bare_backbone(checkpoints):
    model = AutoModel.from_pretrained(checkpoints("qwen3-head"), dtype=torch.bfloat16)
    assert len(quantised(model)) == 7 * tiny.LAYERS
    full = load(checkpoints("qwen3-head"), dtype=torch.bfloat16)
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, full.model(ids).last_hidden_state)


def test_a_device_map(checkpoints, tmp_path):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    model = load(checkpoints("llama"), dtype=torch.bfloat16, device_map={"": "cpu"})
    assert_exact(model, checkpoints("llama"))
    meta = load(checkpoints("llama"), dtype=torch.bfloat16, device_map="meta")
    assert all(linear.blob.is_meta for linear in quantised(meta).values())
    assert meta(torch.ones(1, 3, dtype=torch.long, device="meta")).logits.is_meta
    with pytest.raises(CheckpointError, match=r"codes' was left on the disk"):
        load(
            checkpoints("llama"),
            device_map={"model": "disk", "lm_head": "cpu"},
            offload_folder=tmp_path,
            offload_buffers=True,
        )


def test_casting_a_loaded_model(checkpoints):
    model = load(checkpoints("qwen2"), dtype=torch.bfloat16)
    model.to(torch.float32)
    assert_exact(model, checkpoints("qwen2"))
    with torch.no_grad():
        assert model(torch.arange(5, 13)[None]).logits.dtype == torch.float32


@pytest.mark.gpu
def test_on_a_gpu(checkpoints):
    model, _ = hf.load(str(checkpoints("qwen2")), device="cuda", dtype=torch.bfloat16)
    cpu, _ = hf.load(str(checkpoints("qwen2")), dtype=torch.bfloat16)
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        y, y_cpu = model(ids.cuda()).logits.cpu().float(), cpu(ids).logits.float()
    assert (y - y_cpu).norm() / y_cpu.norm() < 0.05
    assert_exact(model.cpu(), checkpoints("qwen2"))


# Import and registration

IMPORTS = {
    "tessella first": """
import sys, tessella
assert not any(name.split(".")[0] == "transformers" for name in sys.modules), "imported eagerly"
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers
""",
    "transformers first": """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as quantizers
assert "tessella" not in quantizers
import tessella
""",
}


@pytest.mark.parametrize("order", IMPORTS)
def test_import_registers(order):
    code = IMPORTS[order] + 'assert "tessella" in quantizers\nprint("registered")'
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "registered", result.stderr


def test_registering_twice_is_fine():
    hf.register()
    hf.register()


# Refusals


def edit(folder: Path, **changes) -> None:
    file = folder / "config.json"
    d = json.loads(file.read_text())
    d["quantization_config"].update(changes)
    file.write_text(json.dumps(d))


def refuse(folder: Path, message: str) -> None:
    """Both ways of loading refuse, naming what the message says."""
    for how in (load, lambda f: hf.load(str(f))):
        with pytest.raises(CheckpointError, match=message):
            how(folder)


def test_a_newer_format_version(llama):
    edit(llama, format_version=2, tessella_version="9.0", more={"unknown": 1})
    refuse(llama, r"llama/config.json: .*format_version: expected at most 1, got 2: .*9\.0")


def test_layers_that_the_model_does_not_have(llama):
    layers = {"model.layers.7.mlp.up_proj": {"scheme": "twolevel"}}
    edit(llama, layers=layers)
    refuse(llama, r"'model.layers.7.mlp.up_proj': LlamaForCausalLM has no such linear")


def shard_of(folder: Path, name: str) -> Path:
    return Checkpoint.open(folder).tensors[name].file


def change(folder: Path, name: str, value) -> Path:
    """Replace a tensor in its shard (None: drop it, from the index too)."""
    file = shard_of(folder, name)
    tensors = load_file(file)
    if value is None:
        del tensors[name]
        index = folder / "model.safetensors.index.json"
        d = json.loads(index.read_text())
        del d["weight_map"][name]
        index.write_text(json.dumps(d))
    else:
        tensors[name] = value(tensors[name])
    save_file(tensors, file, {"format": "pt"})
    return file


@pytest.mark.parametrize("field", ["codes", "zeros", "channel_scales"])
def test_a_missing_tensor(llama, field):
    name = f"model.layers.1.mlp.up_proj.{field}"
    change(llama, name, None)
    refuse(llama, rf"llama: expected a tensor '{name}'")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("channel_scales", torch.Tensor.half, r"expected F32 \(200,\), got F16 \(200,\)"),
        ("codes", lambda t: t[:, 1:].contiguous(), r"expected U8 \(200, 128\), got U8 \(200, 127"),
    ],
)
def test_a_tensor_of_another_kind(llama, field, value, message):
    name = f"model.layers.1.mlp.up_proj.{field}"
    file = change(llama, name, value)
    refuse(llama, rf"{file.name}: tensor '{name}': {message}")


def test_a_truncated_shard(llama):
    file = shard_of(llama, "model.layers.0.mlp.up_proj.codes")
    file.write_bytes(file.read_bytes()[:-9])
    refuse(llama, rf"{file.name}: truncated: tensor 'model.layers.0")


def test_a_missing_shard(llama):
    file = shard_of(llama, "model.layers.0.mlp.up_proj.codes")
    file.unlink()
    refuse(llama, rf"{file.name}: missing shard: .* expects tensor 'model.layers.0")


def test_full_precision_models_load_too(checkpoints):
    model, tokenizer = hf.load(str(checkpoints("llama", "model")))
    assert model.dtype == torch.bfloat16 and tokenizer.padding_side == "left"
    assert not quantised(model)


def test_a_missing_tensor_of_a_full_precision_model(checkpoints, tmp_path):
    model = Path(shutil.copytree(checkpoints("llama", "model"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"expected a tensor 'model.norm.weight'"):
        hf.load(str(model))


@pytest.mark.parametrize("path", ["/no/such/folder", "gone"])
def test_no_such_checkpoint(path):
    with pytest.raises(CheckpointError, match=rf"{path}: no such folder"):
        hf.load(path)


def test_an_unknown_model_type(checkpoints, tmp_path):
    model = Path(shutil.copytree(checkpoints("llama", "model"), tmp_path / "model"))
    (model / "config.json").write_text('{"model_type": "bloomberg"}')
    with pytest.raises(CheckpointError, match=r"transformers cannot load it: .*bloomberg"):
        hf.load(str(model))


def test_full_precision_weights_are_not_quantised_on_the_fly(checkpoints):
    with pytest.raises(ValueError, match=r"expected a converted checkpoint"):
        load(checkpoints("llama", "model"), quantization_config=hf.TessellaConfig())
