"""Fused norms and MLPs: the model computes the same with fewer passes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import tiny
from tessella import _native
from tessella.models.fuse import GatedMLP, RMSNormQuant, RowsLinear, fuse
from tessella.models.join import Joined
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
    ops = ("act_quant", "rms_norm_quant", "silu_mul_quant", "w4ax_gemm", "w4ax_linear")
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
    assert before["w4ax_gemm"] == 7 * n
    assert before["act_quant"] == 4 * n  # q, k and v share; so do gate and up
    assert after == {
        "act_quant": 0,
        "rms_norm_quant": 2 * n,
        "silu_mul_quant": n,
        "w4ax_gemm": 4 * n,  # q, k, v are one; 200 features of the gate fill no panel of 64
        "w4ax_linear": n,  # the output projection
    }
    wide = converted("llama", intermediate_size=192)
    fuse(wide)
    assert calls(wide, ids)["w4ax_gemm"] == 3 * n


def joined_model(arch: str = "qwen2") -> torch.nn.Module:
    """A fused model with biases whose q, k, v and gate, up are joined and have run once."""
    model = converted(arch, intermediate_size=192)
    fuse(model)
    with torch.no_grad():
        model(torch.arange(8).view(1, 8))
    return model


def test_joined_linears_are_those_on_their_own():
    model = joined_model()
    x = torch.randn(1, 7, 256, generator=torch.Generator().manual_seed(5)).bfloat16()
    layer = model.model.layers[0]
    for norm, linears in (
        (layer.input_layernorm, [getattr(layer.self_attn, f"{p}_proj") for p in "qkv"]),
        (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
    ):
        x_normed = norm(x)
        together = [linear(x_normed) for linear in linears]
        alone = [linear(norm(x).clone()) for linear in linears]  # a clone has no blocks with it
        for linear, a, b in zip(linears, together, alone):
            assert torch.equal(a, b)
            a.zero_()  # a caller owns what it got
            assert torch.equal(linear(x_normed), b)
        memory = {linear.blob.untyped_storage().data_ptr() for linear in linears}
        assert len(memory) == 1


@pytest.mark.parametrize("change", ("load", "deepcopy", "pickle", "move"))
def test_joined_linears_stay_right(change):
    model = joined_model()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        want = model(ids).logits
        if change == "load":
            other = joined_model()
            q = other.model.layers[0].self_attn.q_proj
            q.blob.copy_(torch.zeros_like(q.blob))
            assert not torch.equal(other(ids).logits, want)
            other.load_state_dict(model.state_dict())
            model = other
        elif change == "deepcopy":
            model = copy.deepcopy(model)
        elif change == "pickle":
            model = pickle.loads(pickle.dumps(model))
        else:  # there and back, through a device without kernels
            q = model.model.layers[0].self_attn.q_proj
            blob = q.blob.clone()
            q.forward(model.model.layers[0].input_layernorm(torch.randn(1, 1, 256).bfloat16()))
            q._joined.forget()
            q.blob = blob
        assert torch.equal(model(ids).logits, want)


def test_a_dense_head_takes_any_strides():
    model = converted("llama", tied=True)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        want = model(ids).logits[:, -1:]
        fuse(model)
        assert type(model.lm_head) is RowsLinear
        assert model.lm_head.weight is model.model.embed_tokens.weight
        got = model(ids, logits_to_keep=1).logits
    assert got.shape == want.shape
    assert float((got - want).norm() / want.norm()) < 2e-2


def test_linears_that_differ_are_not_joined():
    attention = converted("llama").model.layers[0].self_attn
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert Joined.fits(linears)
    attention.k_proj.bias = torch.zeros(128).bfloat16()
    assert not Joined.fits(linears)
    mlp = converted("llama").model.layers[0].mlp
    assert not Joined.fits([mlp.gate_proj, mlp.up_proj])  # 200 features: no whole panels
    assert Joined.fits([linears[0], mlp.gate_proj])  # the last one may have a rest


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
    monkeypatch.setattr(module, "compiled", lambda op, device: False)
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
