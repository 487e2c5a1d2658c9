"""Fused norms and MLPs: the model computes the same with fewer passes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import tiny
from tessella import _native
from tessella.models.fuse import GatedMLP, RMSNormQuant, fuse
from tessella.models.linear import W4AxLinear
from tessella.quant import recipe as recipes

pytestmark = pytest.mark.skipif(not _native.HAS_OPS, reason="needs the compiled kernels")


def converted(arch: str, recipe: str = "w4a8", skip: str = "", **options) -> torch.nn.Module:
    """A tiny model whose linears are 4-bit, but for those whose name contains `skip`."""
    model = tiny.model(arch, **options).eval()
    for name, module in list(model.named_modules()):
        keep = "lm_head" in name or (skip and skip in name)
        if isinstance(module, torch.nn.Linear) and not keep:
            model.set_submodule(name, W4AxLinear.from_linear(module, recipes.load(recipe)))
    return model


def calls(model: torch.nn.Module, ids: torch.Tensor, mode=torch.no_grad) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU]) as prof, mode():
        model(ids)
    names = [e.name for e in prof.events()]
    ops = ("act_quant", "rms_norm_quant", "silu_mul_quant", "w4ax_gemm")
    return {op: names.count(f"tessella::{op}") for op in ops}


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
@pytest.mark.parametrize("recipe", ("w4a8", "w4a8-b128"))
def test_fused_models_compute_the_same(arch, recipe):
    plain = converted(arch, recipe)
    fused = copy.deepcopy(plain)
    assert fuse(fused) == 3 * tiny.LAYERS
    ids = torch.arange(24).view(2, 12) % tiny.VOCAB
    with torch.no_grad():
        want, got = plain(ids).logits, fused(ids).logits
    # a code may round the other way where the norm's sum does
    assert float(((got - want).norm() / want.norm()).detach()) < 2e-2
    assert fused.state_dict().keys() == plain.state_dict().keys()
    for name, t in plain.state_dict().items():
        assert torch.equal(fused.state_dict()[name], t), name


def test_calls_a_layer():
    ids = torch.arange(8).view(1, 8)
    plain = converted("llama")
    before = calls(plain, ids)
    fuse(plain)
    after = calls(plain, ids)
    assert calls(plain, ids, torch.inference_mode) == after
    n = tiny.LAYERS
    assert before["w4ax_gemm"] == after["w4ax_gemm"] == 7 * n
    assert before["act_quant"] == 4 * n  # q, k and v share; so do gate and up
    assert after == {
        "act_quant": n,
        "rms_norm_quant": 2 * n,
        "silu_mul_quant": n,
        "w4ax_gemm": 7 * n,
    }


def test_only_what_fits_is_fused():
    assert fuse(converted("llama", skip="k_proj")) == 2 * tiny.LAYERS
    assert fuse(converted("llama", skip="down_proj")) == 2 * tiny.LAYERS
    assert fuse(converted("llama", skip="up_proj")) == tiny.LAYERS
    assert fuse(tiny.model("llama")) == 0
    assert fuse(converted("llama", hidden_act="gelu")) == 2 * tiny.LAYERS
    mixed = converted("llama")
    mixed.model.layers[0].self_attn.q_proj.granularity = "block"
    assert fuse(mixed) == 3 * tiny.LAYERS - 1
    twice = converted("qwen3")
    fuse(twice)
    assert fuse(twice) == 0


def test_a_tensor_changed_in_place_is_quantised_again():
    linear = converted("llama").model.layers[0].self_attn.q_proj
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    first = linear(x)
    assert torch.equal(linear(x), first)
    x.mul_(2)
    assert torch.equal(linear(x), linear(x.clone())) and not torch.equal(linear(x), first)
    with torch.inference_mode():
        y = x * 1.0
        before = linear(y)
        y.mul_(2)
        assert not torch.equal(linear(y), before)


@pytest.mark.parametrize("kind", (RMSNormQuant, GatedMLP))
def test_without_a_kernel_the_modules_compute_plainly(kind, monkeypatch):
    from tessella.models import fuse as module

    model = converted("llama")
    fuse(model)
    part = next(m for m in model.modules() if isinstance(m, kind))
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    want = part(x)
    monkeypatch.setattr(module, "_compiled", lambda op, device: False)
    got = part(x.clone())
    assert float(((got - want).norm() / want.norm()).detach()) < 2e-2


def test_compiles():
    model = converted("llama")
    fuse(model)
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        layer = torch.compile(model.model.layers[0].mlp, backend="aot_eager", fullgraph=True)
        x = torch.randn(1, 8, 256, generator=torch.Generator().manual_seed(4)).bfloat16()
        assert torch.equal(layer(x), model.model.layers[0].mlp(x.clone()))
        again = model(ids, use_cache=False).logits
    assert torch.equal(again, want)
