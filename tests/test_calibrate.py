"""Calibration: statistics equal to a whole model's, one layer in memory, and their cache."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from tessella.integrations import calibrate
from tessella.models.errors import CheckpointError
from tessella.quant.calibrate import HEAD, ROWS, SITES, CalibrationError, Stats, collect

HESSIAN = frozenset({"hessian"})


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def arch(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(arch, tmp_path_factory):
    path = tmp_path_factory.mktemp(arch)
    tiny.save(path, arch, sharded=arch == "llama")
    return path


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(0, tiny.VOCAB, shape, generator=g) for shape in [(2, 70), (1, 33)]]


def whole(folder) -> torch.nn.Module:
    """The checkpoint in fp32, all of it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def seen(model, batches) -> dict:
    """Inputs of every linear [tokens, K] and outputs of what makes the keys, from whole passes."""
    found = {}

    def keep(name):
        def hook(_, args, out):
            found.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
            found.setdefault(f"{name}.out", []).append(out)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(keep(name)) if name.endswith(
            ("_proj", "k_norm", "head")
        ) else 0
    with torch.no_grad():
        for b in batches:
            model(input_ids=b, use_cache=False)
    return found


def test_statistics_are_those_of_the_whole_model(folder, batches):
    model = whole(folder)
    stats = list(collect(calibrate.CheckpointStream(folder), batches, wants=HESSIAN))
    found = seen(model, batches)
    assert [s.index for s in stats] == list(range(tiny.LAYERS + 1))
    for layer in stats[:-1]:
        assert layer.sites.keys() == SITES.keys()
        for site, linears in SITES.items():
            s = layer.sites[site]
            for linear in linears:
                x = torch.cat(found[f"model.layers.{layer.index}.{linear}"]).double()
                check(s, x)
        k_norm = f"model.layers.{layer.index}.self_attn.k_norm.out"
        k = found.get(k_norm) or found[f"model.layers.{layer.index}.self_attn.k_proj.out"]
        k = torch.cat([t.reshape(-1, tiny.KV_HEADS, 2, 32) for t in k])
        torch.testing.assert_close(layer.key_radius, k.norm(dim=2).amax(0))
    check(stats[-1].sites[HEAD], torch.cat(found["lm_head"]).double())


def check(s: Stats, x: torch.Tensor) -> None:
    assert s.tokens == len(x)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(s.amax.double(), x.abs().amax(0), **close)
    torch.testing.assert_close(s.mean.double(), x.mean(0), **close)
    torch.testing.assert_close(s.moment.double(), x.square().mean(0), **close)
    torch.testing.assert_close(s.hessian.double(), x.T @ x / len(x), **close)
    picks = [int(i * len(x) / min(len(x), ROWS)) for i in range(min(len(x), ROWS))]
    torch.testing.assert_close(s.rows.double(), x[picks], **close)


@pytest.mark.parametrize("wants", [frozenset(), HESSIAN])
def test_the_cache_gives_the_same_and_needs_no_layer(folder, batches, wants, tmp_path, monkeypatch):
    stream = calibrate.CheckpointStream(folder)
    first = list(collect(stream, batches, wants=wants, cache=tmp_path))
    again = list(collect(stream, batches, wants=wants))
    monkeypatch.setattr(stream, "layer", None)
    monkeypatch.setattr(stream, "embed", None)
    cached = list(collect(stream, batches, wants=wants, cache=tmp_path))
    for a, b, c in zip(first, again, cached, strict=True):
        for site in a.sites:
            tensors = a.sites[site].tensors()
            assert ("hessian" in tensors) == bool(wants)
            for other in (b, c):
                same = other.sites[site].tensors()
                assert tensors.keys() == same.keys()
                assert all(torch.equal(t, same[name]) for name, t in tensors.items())
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    other = [batches[0] + 1 - batches[0], *batches[1:]]
    list(collect(stream, other, wants=wants, cache=tmp_path))
    assert len(list(tmp_path.iterdir())) == 2, "other tokens, another key"


def test_one_layer_in_memory_and_layers_that_nobody_needs(folder, batches, monkeypatch):
    stream = calibrate.CheckpointStream(folder)
    make, alive = stream.layer, []

    def layer(i):
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        module = make(i)
        alive.append(weakref.ref(module))
        return module

    monkeypatch.setattr(stream, "layer", layer)
    whole = list(collect(stream, batches))
    part = list(collect(stream, batches, needed=lambda i: i == 1))
    assert [s.index for s in part] == [1]
    assert torch.equal(part[0].sites["down"].amax, whole[1].sites["down"].amax)
    assert len(alive) == 2 * tiny.LAYERS


def test_statistics_follow_the_inputs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=g, dtype=torch.float64)

    def stats(x):
        H = x.T @ x / len(x)
        return Stats(len(x), x.abs().amax(0), x.mean(0), x.square().mean(0), x.clone(), H)

    d = torch.rand(64, generator=g, dtype=torch.float64) - 0.5
    p = torch.randperm(64, generator=g)
    Q = torch.linalg.qr(torch.randn(64, 64, generator=g, dtype=torch.float64)).Q

    def turn(t):
        return t @ Q

    s = stats(x)
    for change, y in (
        (lambda: s.scale(d), x * d),
        (lambda: s.permute(p), (x * d)[:, p]),
        (lambda: s.rotate(turn), (x * d)[:, p] @ Q),
    ):
        change()
        for name, t in stats(y).tensors().items():
            torch.testing.assert_close(getattr(s, name), t, msg=name)


def test_sliding_windows_are_respected(tmp_path, batches):
    tiny.save(tmp_path, "mistral", sliding_window=8)
    found = seen(whole(tmp_path), batches)
    stats = list(collect(calibrate.CheckpointStream(tmp_path), batches, wants=HESSIAN))
    check(stats[1].sites["down"], torch.cat(found["model.layers.1.mlp.down_proj"]).double())


def test_windows_of_text():
    tok = tiny.tokenizer()
    documents = [" ".join([f"w{d}"] * n) for d, n in enumerate([100, 3, 40, 60])]
    windows = calibrate.token_batches(tok, documents, samples=4, ctx=41)
    ids = [tok(f"w{d}", add_special_tokens=False)["input_ids"][0] for d in (0, 2, 3, 0)]
    assert [w.tolist() for w in windows] == [[[0] + [i] * 40] for i in ids]
    assert len(calibrate.token_batches(tok, documents, samples=2, ctx=41)) == 2
    with pytest.raises(CalibrationError, match="no window of 16 tokens"):
        calibrate.token_batches(tok, ["w1 w2"])


def test_what_is_refused(folder, batches, tmp_path):
    stream = calibrate.CheckpointStream(folder)
    with pytest.raises(CalibrationError, match="expected tokens, got none"):
        next(collect(stream, []))
    with pytest.raises(CalibrationError, match=r"statistics of hessian, got \['kurtosis'\]"):
        next(collect(stream, batches, wants={"kurtosis"}))
    with pytest.raises(CheckpointError, match="no such folder"):
        calibrate.CheckpointStream(tmp_path / "nothing")


def test_activations_that_are_not_finite_are_named(batches):
    model = tiny.model("llama").float()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.inf
    with pytest.raises(CalibrationError, match=r"layer 1: expected finite .* mlp\.down_proj read"):
        list(collect(model, batches))
