"""FMPQ: which channels become INT8, exact permutations and rotations, and models that run them."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from tessella import _native
from tessella.models import outliers
from tessella.models.fuse import RMSNormQuant, fuse
from tessella.models.join import Joined
from tessella.models.linear import W4AxLinear
from tessella.quant import fmpq, rtn
from tessella.quant import layer as layers
from tessella.quant import recipe as recipes
from tessella.ref.w4ax_gemm import w4_dequant
from test_qoq import apply, exact_model

HOW = {"outlier": 8.0, "budget": 0.1, "most": 0.25, "granularity": "block"}


def inputs(K: int, outliers: list[int], factor: float = 40.0, S: int = 96) -> torch.Tensor:
    g = torch.Generator().manual_seed(K)
    x = torch.randn(S, K, generator=g)
    x[:, outliers] *= factor
    return x


def weights(K: int, outliers: list[int], factor: float = 40.0, N: int = 64) -> torch.Tensor:
    """Columns that make each channel matter as much as any other."""
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(K + 1))
    w[:, outliers] /= factor
    return w


def marked(x, w, **options) -> fmpq.Marks:
    return fmpq.mark(x, x.abs().amax(0), [w], **{**HOW, **options})


def test_outliers_are_grouped_in_the_first_block():
    chosen = [3, 130, 131, 400, 511]
    found = marked(inputs(512, chosen), weights(512, chosen))
    assert found.k8 == 128 and found.outliers == 5
    assert set(found.perm[:5].tolist()) == set(chosen)
    assert sorted(found.perm.tolist()) == list(range(512))
    assert found.error < 0.5 * found.error_int4


def test_without_outliers_nothing_moves():
    found = marked(inputs(512, []), weights(512, []), budget=0.2)
    assert (found.k8, found.perm, found.outliers) == (0, None, 0)
    assert found.error == found.error_int4 < 0.2


def test_the_share_of_int8_is_capped():
    many = list(range(0, 1024, 3))  # 342 outliers: three blocks, a quarter is two
    found = marked(inputs(1024, many), weights(1024, many))
    assert found.k8 == 256


@pytest.mark.parametrize("granularity", ("class", "block"))
def test_int8_blocks_and_error_follow_the_budget(granularity):
    chosen = list(range(0, 640, 5))  # 128 outliers of different sizes
    x = inputs(640, chosen, 1.0)
    x[:, chosen] *= torch.linspace(2, 60, len(chosen))
    w = torch.randn(32, 640, generator=torch.Generator().manual_seed(2)) / x.abs().amax(0)
    budgets = (1.0, 0.3, 0.2, 0.1, 0.05, 0.01)
    found = [marked(x, w, budget=b, most=1.0, granularity=granularity) for b in budgets]
    blocks, errors = [f.k8 for f in found], [f.error for f in found]
    assert blocks == sorted(blocks) and blocks[0] == 0 < blocks[-1]
    assert errors == sorted(errors, reverse=True)


def test_one_scale_a_token_is_refused():
    with pytest.raises(ValueError, match="granularity: expected 'class' or 'block', got 'token'"):
        marked(inputs(256, [1]), weights(256, [1]), granularity="token")


@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 3))
@settings(deadline=None, max_examples=25)
def test_rotations_and_permutations_are_exact_in_fp64(blocks, int8, seed):
    K, k8 = 128 * blocks, 128 * min(int8, blocks)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(7, K, generator=g, dtype=torch.float64)
    w = torch.randn(5, K, generator=g, dtype=torch.float64)
    perm = torch.randperm(K, generator=g)
    a, b = fmpq.rotate_blocks(x[:, perm], k8), fmpq.rotate_blocks(w[:, perm], k8)
    torch.testing.assert_close(a @ b.T, x @ w.T, rtol=0, atol=1e-12 * K)
    torch.testing.assert_close(fmpq.rotate_blocks(a, k8), x[:, perm], rtol=0, atol=1e-13)
    assert torch.equal(a[:, :k8], x[:, perm][:, :k8])
    assert torch.equal(fmpq.rotate_blocks(x, -1), x)


def test_a_rotation_is_taken_where_it_helps():
    spiky = inputs(256, []) ** 5
    w = weights(256, [])
    plain, turned = marked(spiky, w, most=0.0), marked(spiky, w, most=0.0, hadamard=True)
    assert turned.hadamard and turned.error < 0.85 * plain.error
    flat = torch.sign(inputs(256, []))
    assert not marked(flat, w, most=0.0, hadamard=True).hadamard
    assert not marked(spiky[:, :200], w[:, :200], most=0.0, hadamard=True).hadamard


@pytest.mark.parametrize("granularity, k8", [("block", 128), ("class", 128), ("token", 0)])
@pytest.mark.parametrize("K", (256, 200))
def test_dequantised_is_what_the_codes_stand_for(granularity, k8, K):
    x = inputs(K, [5], S=9)
    x[4] = 0
    got = fmpq.dequantised(x, k8, granularity)
    B, qmax = 2, torch.tensor([127.0 if 128 * b < k8 else 7.0 for b in range(2)])
    padded = torch.nn.functional.pad(x, (0, 256 - K)).view(9, B, 128)
    amax = padded.abs().amax(2)
    if granularity == "token":
        amax = amax.amax(1, keepdim=True).expand(9, B)
    step = (amax / qmax).unsqueeze(2)
    want = torch.where(step > 0, (padded / step.clamp_min(1e-30)).round() * step, 0.0)
    torch.testing.assert_close(got, want.view(9, 256), rtol=1e-5, atol=1e-6)


def test_share_of_int4_volume():
    assert fmpq.w4a4_share([]) == 0
    assert fmpq.w4a4_share([(10, 512, 128), (30, 512, 0)]) == (10 * 384 + 30 * 512) / (40 * 512)
    assert fmpq.w4a4_share([(10, 512, -1), (10, 200, 256)]) == 0


# ---------------------------------------------------------------- models


def mixed_model(arch: str, *, hadamard: bool = False, granularity: str = "block", **options):
    """A tiny model whose sites have INT8 blocks first, permuted: each site in its own way."""
    model = tiny.model(arch, **options).eval()
    g = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        a, m = layer.self_attn, layer.mlp
        sites = ((a, "qkv", 128), (a, "o", 0), (m, ("gate", "up"), 128), (m, ("down",), 128))
        for owner, parts, k8 in sites:
            K = getattr(owner, f"{parts[0]}_proj").in_features
            perm = torch.randperm(K, generator=g)
            turn = hadamard and K % 128 == 0
            for part in parts:
                linear = getattr(owner, f"{part}_proj")
                w = linear.weight.detach()[:, perm].float()
                w = rtn.quantize(fmpq.rotate_blocks(w, k8) if turn else w, "twolevel")
                how = {"k8": k8, "granularity": granularity, "perm": perm.int()}
                made = W4AxLinear(w, **how, hadamard=turn, bias=linear.bias)
                setattr(owner, f"{part}_proj", made)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12) % tiny.VOCAB).logits


@pytest.mark.parametrize("hadamard", (False, True))
def test_a_linear_permutes_rotates_and_quantises(hadamard):
    model = mixed_model("qwen2", hadamard=hadamard)
    linear = model.model.layers[0].self_attn.q_proj
    x = inputs(256, [9], S=5).bfloat16()
    perm = linear.perm.long()
    rows = x[:, perm]
    rows = fmpq.rotate_blocks(rows, 128) if hadamard else rows
    w = w4_dequant(linear.weight()).double()
    want = fmpq.dequantised(rows, 128, "block").double() @ w.T + linear.bias.double()
    got = linear(x).double()
    assert (got - want).norm() / want.norm() < 4e-3


@pytest.mark.skipif(not _native.HAS_OPS, reason="needs the compiled kernels")
@pytest.mark.parametrize("arch", ("llama", "qwen2"))
@pytest.mark.parametrize("granularity", ("block", "class"))
def test_fused_producers_honour_k8_and_permutation(arch, granularity):
    plain = mixed_model(arch, granularity=granularity, intermediate_size=256)
    fused = copy.deepcopy(plain)
    assert fuse(fused) == 3 * tiny.LAYERS
    layer = fused.model.layers[0]
    assert isinstance(layer.input_layernorm, RMSNormQuant)
    assert layer.self_attn.q_proj.order is layer.self_attn.v_proj.order is not None
    want, got = logits(plain), logits(fused)
    # a code may round the other way where the norm's sum does, and an INT4 step is large
    assert (got - want).norm() / want.norm() < 6e-2
    h = inputs(256, [9], S=6).bfloat16()[None]
    y = layer.input_layernorm(h)
    together = [getattr(layer.self_attn, f"{p}_proj")(y) for p in "qkv"]
    alone = [getattr(layer.self_attn, f"{p}_proj")(y.clone()) for p in "qkv"]
    for a, b in zip(together, alone):
        assert torch.equal(a, b)


@pytest.mark.skipif(not _native.HAS_OPS, reason="needs the compiled kernels")
def test_other_permutations_are_not_joined():
    model = mixed_model("llama", intermediate_size=256)
    layer = model.model.layers[0]
    k = layer.self_attn.k_proj
    k.perm = k.perm.flip(0).contiguous()
    before = logits(model)
    fuse(model)
    assert not isinstance(layer.input_layernorm, RMSNormQuant)
    assert isinstance(layer.post_attention_layernorm, RMSNormQuant)
    assert not Joined.fits([layer.self_attn.q_proj, k])
    assert (logits(model) - before).norm() / before.norm() < 6e-2


@pytest.mark.skipif(not _native.HAS_OPS, reason="needs the compiled kernels")
@pytest.mark.parametrize("change", ("deepcopy", "pickle", "load", "load another order"))
def test_fused_models_stay_right(change):
    model = mixed_model("llama", intermediate_size=256)
    fuse(model)
    want = logits(model)
    if change == "deepcopy":
        model = copy.deepcopy(model)
    elif change == "pickle":
        model = pickle.loads(pickle.dumps(model))
    else:
        other = mixed_model("llama", intermediate_size=256)
        fuse(other)
        state = model.state_dict()
        if change == "load another order":  # of one linear only, its columns with it
            name = "model.layers.0.self_attn.k_proj"
            k = model.get_submodule(name)
            w = w4_dequant(k.weight())[:, :256].float()
            turn = torch.arange(255, -1, -1)
            made = W4AxLinear(rtn.quantize(w[:, turn], "twolevel", "none"), k8=128)
            fields = {f"{name}.{f}": t for f, t in made.weight().tensors().items()}
            fields[f"{name}.perm"] = k.perm[turn].contiguous()
            state = {**state, **fields}
            want = None
        other.load_state_dict(state)
        model = other
    got = logits(model)
    if want is None:
        k = model.model.layers[0].self_attn.k_proj
        assert k.order is not model.model.layers[0].self_attn.q_proj.order
        y = inputs(256, [9], S=6).bfloat16()[None]
        normed = model.model.layers[0].input_layernorm(y)
        assert torch.equal(k(normed), k(normed.clone()))
    else:
        assert torch.equal(got, want)


@pytest.mark.skipif(not _native.HAS_OPS, reason="needs the compiled kernels")
def test_rotating_linears_share_one_rotation():
    model = mixed_model("llama", hadamard=True, intermediate_size=256)
    before = logits(model)
    fuse(model)
    layer = model.model.layers[0]
    assert not isinstance(layer.input_layernorm, RMSNormQuant)
    assert layer.self_attn.q_proj.order is layer.self_attn.k_proj.order
    assert torch.equal(logits(model), before)


def test_a_rotation_needs_whole_blocks():
    w = rtn.quantize(torch.randn(16, 200), "twolevel")
    with pytest.raises(ValueError, match="hadamard: expected in features in whole blocks of 128"):
        W4AxLinear(w, hadamard=True)


# ---------------------------------------------------------------- the step of recipes


class Undone(fmpq.Fmpq):
    """The step, with rotations taken back: what is left must compute the same."""

    def change(self, layer):
        layer.target = dataclasses.replace(layer.target, granularity="block")
        super().change(layer)
        for site, acts in layer.acts.items():
            if acts.hadamard:
                layers.turn_inputs(layer, site, lambda t, a=acts: fmpq.rotate_blocks(t, a.k8))


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
@torch.no_grad()
def test_the_step_is_exact_in_fp64(arch, monkeypatch):
    monkeypatch.setattr(fmpq, "GAIN", -10.0)  # takes every rotation
    model = exact_model(arch)
    state = outliers.inject(
        model.state_dict(),
        {"architectures": [type(model).__name__], "num_hidden_layers": tiny.LAYERS},
        outliers.Outliers(0.02, 50.0),
    )
    model.load_state_dict(state)
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(0, tiny.VOCAB, (2, 40), generator=g)
    expected = model(input_ids=ids, use_cache=False).logits
    changed = apply(model, (Undone(error=1e-3, most=0.5, hadamard=True),), [ids])
    got = model(input_ids=ids, use_cache=False).logits
    assert ((got - expected).norm() / expected.norm()).item() < 1e-12
    for layer in changed:
        assert layer.acts["attn"].k8 == layer.acts["mlp"].k8 == 128
        assert layer.acts["attn"].perm is not None and layer.acts["down"].perm is None
        assert layer.acts["attn"].hadamard and not layer.acts["down"].hadamard  # K is 200


def test_shrinking_moves_a_part_of_outliers_only():
    amax = torch.tensor([1.0, 2.0, 1.0, 16.0, 1.0])
    d = fmpq.shrink(amax, 8.0, 0.5)
    assert torch.equal(d, torch.tensor([1.0, 1.0, 1.0, 0.25, 1.0]))
    assert torch.equal(fmpq.shrink(torch.zeros(3), 8.0, 0.5), torch.ones(3))


@pytest.mark.parametrize(
    "recipe, message",
    [
        ({"granularity": "token"}, "needs one precision, but 'fmpq' mixes two; use 'class'"),
        ({"steps": (recipes.Rtn(), fmpq.Fmpq())}, "exactly one step that makes the codes"),
        ({"steps": (fmpq.Fmpq(), recipes.Rotate(), recipes.Rtn())}, "cannot follow 'fmpq'"),
    ],
)
def test_recipes_that_cannot_be_honoured_are_refused(recipe, message):
    how = {"granularity": "block", "steps": (fmpq.Fmpq(), recipes.Rtn())} | recipe
    with pytest.raises(recipes.RecipeError, match=message):
        recipes.Recipe("r", **how)


@pytest.mark.parametrize(
    "options", [{"outlier": 0.5}, {"error": 0}, {"most": 2}, {"smooth": -1}, {"hadamard": 1}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(recipes.RecipeError, match=f"steps.fmpq.{next(iter(options))}: expected"):
        fmpq.Fmpq(**options)
