"""What makes models, on a GPU beside the CPU: calibration, recipes, latents, healing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from tessella.integrations import calibrate
from tessella.integrations.heal import HealOptions, heal
from tessella.models.apply import Calibration
from tessella.models.convert import convert
from tessella.models.to_mla import Options, to_mla
from tessella.quant.calibrate import collect
from tessella.quant.recipe import PRESETS
from test_recipes import EVERYTHING, distance

pytestmark = pytest.mark.gpu
DEVICES = ("cpu", "cuda")
RECIPES = {"everything": EVERYTHING, **{n: r for n, r in PRESETS.items() if r.needs}}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def source(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    tiny.save(path, request.param)
    return path


def ids(rows: int, columns: int = 64, seed: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(5, tiny.VOCAB, (rows, columns), generator=g)


def stream(source: Path, device: str) -> calibrate.CheckpointStream:
    return calibrate.CheckpointStream(str(source), device)


def test_statistics_are_the_cpu_s(source):
    batches = [ids(2), ids(1, 33)]
    wants = frozenset({"hessian"})
    cpu, gpu = (list(collect(stream(source, d), batches, wants=wants)) for d in DEVICES)
    for a, b in zip(cpu, gpu, strict=True):
        assert a.sites.keys() == b.sites.keys()
        for site, stats in b.to("cpu").sites.items():
            expected = a.sites[site].tensors()
            assert stats.tensors().keys() == expected.keys()
            for name, t in stats.tensors().items():
                error = (t.double() - expected[name].double()).norm()
                assert error <= 2e-3 * expected[name].double().norm(), (a.index, site, name)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_as_good_as_on_the_cpu(name, source, tmp_path):
    """The same codes but where rounding decides: errors of the logits within a tenth."""
    errors = []
    for i, device in enumerate(DEVICES):
        given = Calibration(stream(source, device), [ids(6)], None)
        out = tmp_path / str(i)
        report = convert(source, out, RECIPES[name], device=device, calibration=given)
        assert len(report.layers) >= 7 * tiny.LAYERS
        errors.append(distance(source, out))
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


@pytest.mark.parametrize("fold", ["bands", "adaptive", 4])
def test_latents_are_the_cpu_s(fold, llama, tmp_path):
    options = Options(96, 32, fold, hadamard=True)
    made = [
        to_mla(llama, tmp_path / str(i), options, ids(8, 32), ids(4, 32, 4), device=d)
        for i, d in enumerate(DEVICES)
    ]
    assert made[1].kl == pytest.approx(made[0].kl, rel=0.02)


def test_healing_comes_closer(llama, tmp_path):
    options = Options(64, 32, 4)
    to_mla(llama, tmp_path / "mla", options, ids(8, 32), ids(4, 32, 4), device=DEVICES[1])
    report = heal(
        str(tmp_path / "mla"),
        tmp_path / "out",
        teacher=str(llama),
        windows=ids(64, 24),
        examples=None,
        options=HealOptions(steps=40, batch=8, lr=3e-4, save_every=20),
        device=DEVICES[1],
    )
    assert report.loss < report.loss_first
