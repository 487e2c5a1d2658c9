"""The converter: what it writes, what it refuses, and that it survives being killed."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from tessella.formats import SCHEMES, W4Weight
from tessella.models import hub, partial
from tessella.models.checkpoint import Checkpoint
from tessella.models.convert import convert
from tessella.models.errors import ConversionError
from tessella.quant.recipe import PRESETS, Recipe
from tessella.ref.w4ax_gemm import w4_dequant
from tiny import contents

W4A8 = PRESETS["w4a8"]
SHARDS = tiny.LAYERS + 2
LINEARS = 7 * tiny.LAYERS


@pytest.fixture(scope="module")
def converted(llama, tmp_path_factory) -> Path:
    """An uninterrupted conversion of `llama`."""
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(llama, out, W4A8)
    return out


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    ckpt = Checkpoint.open(folder)
    return {name: ckpt.read(name) for name in ckpt.tensors}


# What is written


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_architecture(arch, tied, tmp_path):
    tiny.save(tmp_path / "model", arch, tied=tied)
    source = stored(tmp_path / "model")
    report = convert(tmp_path / "model", tmp_path / "out", W4A8)
    result = stored(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    assert len(layers) == len(report.layers) == LINEARS
    for record in report.layers:
        N, K = record.shape
        spec = W4Weight.spec("twolevel", N, K)
        fields = {f: result.pop(f"{record.name}.{f}") for f in spec}
        w = source.pop(f"{record.name}.weight").double()
        assert tuple(w.shape) == (N, K)
        d = w4_dequant(W4Weight.from_tensors(fields, "twolevel", K))[:, :K]
        assert record.rel_error == pytest.approx(((d - w).norm() / w.norm()).item(), rel=1e-6)
        assert 0.08 < record.rel_error < 0.105
        assert record.bytes == sum(t.nbytes for t in fields.values())
    assert result.keys() == source.keys(), "everything else is copied"
    assert all(torch.equal(result[name], t) for name, t in source.items())
    assert ("lm_head.weight" in result) != tied
    original = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["quantization_config"]
    assert config == original


def test_layout_of_the_result(converted, llama):
    names = sorted(p.name for p in converted.iterdir())
    shards = [f"model-{i:05d}-of-{SHARDS:05d}.safetensors" for i in range(1, SHARDS + 1)]
    carried = ["LICENSE", "chat_template.jinja", "generation_config.json"]
    carried += ["tokenizer.json", "tokenizer_config.json"]
    assert names == sorted([*shards, *carried, "config.json", "model.safetensors.index.json"])
    for name in carried:
        assert (converted / name).read_bytes() == (llama / name).read_bytes()
    weight_map = json.loads((converted / "model.safetensors.index.json").read_text())["weight_map"]
    for i in range(tiny.LAYERS):
        owners = {f for n, f in weight_map.items() if n.startswith(f"model.layers.{i}.")}
        assert owners == {shards[i + 1]}, "one shard per layer"
    modes = {p.stat().st_mode for p in converted.iterdir()}
    assert len(modes) == 1, "shards are as readable as the other files"
    assert not list(converted.parent.glob("*.partial"))


def test_sharded_sources_give_the_same_bytes(converted, tmp_path):
    tiny.save(tmp_path / "model", "llama", sharded=True)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    convert(tmp_path / "model", tmp_path / "out", W4A8)
    assert contents(tmp_path / "out") == contents(converted)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_quantised_head_is_untied(tied, tmp_path):
    tiny.save(tmp_path / "model", "llama", tied=tied)
    report = convert(tmp_path / "model", tmp_path / "out", Recipe("head", lm_head=True))
    assert report.layers[-1].name == "lm_head"
    result, source = stored(tmp_path / "out"), stored(tmp_path / "model")
    assert "lm_head.codes" in result and "lm_head.weight" not in result
    assert torch.equal(result["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    head = W4Weight.from_tensors(
        {f: result[f"lm_head.{f}"] for f in W4Weight.spec("twolevel", 1, 1)}, "twolevel", 256
    )
    origin = source["model.embed_tokens.weight" if tied else "lm_head.weight"].double()
    assert (w4_dequant(head) - origin).norm() / origin.norm() < 0.1


def test_skipped_linears_keep_their_precision(llama, tmp_path):
    recipe = Recipe("x", scheme="g64", skip=("*.down_proj", "model.layers.0.*"))
    report = convert(llama, tmp_path / "out", recipe)
    assert len(report.layers) == (tiny.LAYERS - 1) * 6
    result, source = stored(tmp_path / "out"), stored(llama)
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        assert torch.equal(result[name], source[name])


def test_dry_run_tells_sizes_and_writes_nothing(llama, converted, tmp_path):
    report = convert(llama, tmp_path / "out", W4A8, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert report.bytes_in == Checkpoint.open(llama).nbytes
    assert report.bytes_out == Checkpoint.open(converted).nbytes
    assert len(report.layers) == LINEARS and all(r.rel_error is None for r in report.layers)


def test_report_and_progress(llama, tmp_path):
    seen = []
    report = convert(llama, tmp_path / "out", W4A8, progress=seen.append)
    assert [p.done for p in seen] == list(range(1, LINEARS + 1))
    assert {p.total for p in seen} == {LINEARS}
    assert [p.name for p in seen] == [r.name for r in report.layers]
    assert sorted(p.bytes_done for p in seen) == [p.bytes_done for p in seen]
    assert 0 < seen[-1].bytes_done <= report.bytes_in
    d = json.loads(report.to_json())
    assert {"layers", "bytes_in", "bytes_out", "seconds", "peak_rss"} <= d.keys()
    assert d["bytes_out"] < d["bytes_in"] and d["seconds"] > 0 and d["peak_rss"] > 1 << 20


def test_memory_is_bounded_by_a_layer(llama, tmp_path, monkeypatch):
    """While a layer is read, nothing of another one is held."""
    alive: list[tuple[str, weakref.ref]] = []
    read = Checkpoint.read

    def watch(self, name):
        layer = ".".join(name.split(".")[:3]) if ".layers." in name else "no layer"
        held = {other for other, ref in alive if ref() is not None} - {layer}
        assert not held, f"{held} still in memory while {name} is read"
        t = read(self, name)
        alive.append((layer, weakref.ref(t)))
        return t

    monkeypatch.setattr(Checkpoint, "read", watch)
    convert(llama, tmp_path / "out", W4A8)
    assert len(alive) == len(Checkpoint.open(llama).tensors)


# Refusals


def refuse(model, out, message, recipe=W4A8, **options):
    """The conversion fails with `message`; neither the target nor finished shards appear."""
    before = contents(out) if out.is_dir() else None
    for dry_run in (False, True) if not options.pop("only_wet", False) else (False,):
        with pytest.raises(ConversionError, match=message):
            convert(model, out, recipe, dry_run=dry_run, **options)
        assert (contents(out) if out.is_dir() else None) == before


def edit(file: Path, **changes) -> None:
    d = json.loads(file.read_text())
    d.update(changes)
    file.write_text(json.dumps({k: v for k, v in d.items() if v is not None}))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"architectures": ["BloomForCausalLM"]},
            r"config.json: architectures: expected one of LlamaForCausalLM, .*got 'BloomForC",
        ),
        ({"architectures": None}, r"architectures: expected one of .* got None"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"full precision, got 'gptq'"),
        ({"num_hidden_layers": None}, r"num_hidden_layers: expected a number, got None"),
        ({"num_hidden_layers": 3}, r"expected a tensor 'model.layers.2.self_attn.q_proj.weight'"),
        ({"attention_bias": True}, r"expected a tensor 'model.layers.0.self_attn.q_proj.bias'"),
    ],
)
def test_models_that_are_not_supported(copy, tmp_path, changes, message):
    edit(copy / "config.json", **changes)
    refuse(copy, tmp_path / "out", message)


def change(model: Path, name: str, value) -> None:
    """Replace a tensor of a single-file checkpoint; None drops it."""
    tensors = load_file(model / "model.safetensors")
    tensors[name] = value(tensors[name]) if callable(value) else value
    tensors = {k: t for k, t in tensors.items() if t is not None}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def poison(value):
    def put(t):
        t[5, 17] = value
        return t

    return put


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(copy, tmp_path, value):
    name = "model.layers.1.mlp.down_proj.weight"
    change(copy, name, poison(value))
    message = rf"model.safetensors: tensor '{name}': .*got {value} at row 5, column 17"
    refuse(copy, tmp_path / "out", message, only_wet=True)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("lm_head.weight", None, r"expected a tensor 'lm_head.weight'"),
        ("model.norm.weight", None, r"expected a tensor 'model.norm.weight'"),
        (
            "model.layers.0.mlp.up_proj.weight",
            torch.ones(4, 4, dtype=torch.int32),
            r"tensor 'model.layers.0.mlp.up_proj.weight': expected a matrix of .* got I32 \(4, 4\)",
        ),
        ("model.layers.0.mlp.up_proj.weight", torch.ones(4), r"got F32 \(4,\)"),
    ],
)
def test_tensors_that_do_not_fit(copy, tmp_path, name, value, message):
    change(copy, name, value)
    refuse(copy, tmp_path / "out", message)


def test_truncated_and_missing_shards(tmp_path):
    tiny.save(tmp_path / "model", "llama", sharded=True)
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[2]
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    refuse(tmp_path / "model", tmp_path / "out", rf"{shard.name}: truncated: tensor 'model")
    shard.unlink()
    refuse(tmp_path / "model", tmp_path / "out", rf"{shard.name}: missing shard: .* tensor '")


def test_targets_that_are_taken(llama, converted, tmp_path):
    refuse(llama, llama, r"expected a new or an empty folder, found files in it")
    refuse(llama, converted, r"expected a new or an empty folder, found files in it")
    file = tmp_path / "file"
    file.write_text("x")
    refuse(llama, file, r"file: expected a new or an empty folder, found a file")
    foreign = tmp_path / "out.partial"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    for resume in (False, True):
        with pytest.raises(ConversionError, match=r"out.partial: expected an empty .*thesis.tex"):
            convert(llama, tmp_path / "out", W4A8, resume=resume)
    assert (foreign / "thesis.tex").exists()


def test_an_empty_folder_is_a_fine_target(llama, converted, tmp_path):
    (tmp_path / "deep" / "out").mkdir(parents=True)
    convert(llama, tmp_path / "deep" / "out", W4A8)
    assert contents(tmp_path / "deep" / "out") == contents(converted)


def test_a_disk_that_is_too_small(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 1, 8))
    with pytest.raises(ConversionError, match=r"expected \d+ bytes of free disk space.*got 8"):
        convert(llama, tmp_path / "out", W4A8)


@pytest.mark.parametrize("device", ["cuda:99", "tpu9"])
def test_a_device_that_is_not_there(llama, tmp_path, device):
    refuse(llama, tmp_path / "out", rf"device: .* got '{device}'", device=device)


@pytest.mark.parametrize(
    "skip, message",
    [
        (("*.dwon_proj",), r"skip: '\*.dwon_proj' matches no linear of the model"),
        (("*",), r"skip: leaves nothing to quantise"),
    ],
)
def test_recipes_that_do_not_fit_the_model(llama, tmp_path, skip, message):
    refuse(llama, tmp_path / "out", message, recipe=Recipe("typo", skip=skip))


# Where models come from


@pytest.mark.parametrize("model", ["no/such/folder", "./gone", "gone"])
def test_no_such_model(model, tmp_path):
    refuse(model, tmp_path / "out", r"no such folder, and not a hub id")


def test_hub_ids_are_downloaded(llama, tmp_path, monkeypatch):
    calls = []

    def snapshot_download(name, allow_patterns):
        calls.append((name, allow_patterns))
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    report = convert("someone/model-1.5B", tmp_path / "out", W4A8, dry_run=True)
    assert len(report.layers) == LINEARS
    assert calls == [("someone/model-1.5B", list(hub.NEEDED))]
    assert "*.bin" not in calls[0][1] and "model*.safetensors" in calls[0][1]


def test_hub_errors_are_told(tmp_path, monkeypatch):
    def snapshot_download(*_, **__):
        raise OSError("404 Client Error: not found\nlong text")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    refuse(
        "some/model", tmp_path / "out", r"some/model: .*from the hub: 404 Client Error: not found$"
    )


# The documentation


def documented(language: str) -> list[str]:
    text = (Path(__file__).parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_documented_reader_reads(llama, tmp_path, scheme):
    convert(llama, tmp_path / "out", Recipe("x", scheme=scheme))
    scope = {"torch": torch}
    exec(documented("python")[0], scope)
    for name, K in (("model.layers.1.mlp.down_proj", 200), ("model.layers.0.mlp.up_proj", 256)):
        tensors = stored(tmp_path / "out")
        w = scope["dequantise"](tensors, name, scheme, K)
        fields = {f: tensors[f"{name}.{f}"] for f in W4Weight.spec(scheme, 1, K)}
        assert torch.equal(w, w4_dequant(W4Weight.from_tensors(fields, scheme, K))[:, :K])


def test_the_documented_config_and_recipe(converted):
    d = json.loads(documented("json")[0])
    config = json.loads((converted / "config.json").read_text())["quantization_config"]
    assert {k: v for k, v in config.items() if k != "layers"} | {"layers": d["layers"]} == d
    assert d["layers"].items() <= config["layers"].items()
    assert Recipe.from_toml(documented("toml")[0]) == W4A8


def test_the_documented_recipes():
    text = (Path(__file__).parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(w4[\w-]+)` \| `(\w+)` \| INT([48])", text, re.M)
    assert rows == [(r.name, r.scheme, "8" if r.k8 else "4") for r in PRESETS.values()]
