"""QoQ: every fold exact in fp64, error feedback against a slow reference, recipes refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny
from tessella.formats import BLOCK_K, SCHEMES
from tessella.layout import unpack_nibbles
from tessella.models.linear import W4AxLinear
from tessella.quant import gptq, grid, rtn
from tessella.quant.calibrate import SITES, Stats, collect
from tessella.quant.error import output_error
from tessella.quant.layer import Heads, Layer, Target
from tessella.quant.qoq import Reorder, Rotate, SmoothAttention, SmoothOutput
from tessella.quant.recipe import PRESETS, Gptq, Recipe, RecipeError, Rtn, load
from tessella.quant.rotation import Rotation
from tessella.ref.w4ax_gemm import w4_dequant

STEPS = {
    "rotate": (Rotate(),),
    "values": (Rotate(seed=3, values=True),),
    "attention": (SmoothAttention(),),
    "output": (SmoothOutput(sites=("down", "o"), alpha=0.4, search=False),),
    "search": (SmoothOutput(sites=("down", "o")),),
    "reorder": (Reorder(sites=tuple(SITES)),),
    "all": (
        Rotate(values=True),
        SmoothAttention(),
        SmoothOutput(sites=("o", "down")),
        Reorder(sites=("o", "down", "mlp")),
    ),
}


class Norm(nn.Module):
    """RMS norm in the dtype of its input; transformers' computes in fp32."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def exact_model(arch: str) -> nn.Module:
    """A tiny model in fp64 throughout."""
    model = tiny.model(arch).double()
    for name, module in list(model.named_modules()):
        if name.endswith("norm"):
            model.set_submodule(name, Norm(module))
    return model


def apply(model: nn.Module, steps, batches) -> list[Layer]:
    """Apply steps to a model in memory, as the converter does to a checkpoint."""
    heads = Heads(tiny.HEADS, tiny.KV_HEADS, 64, hasattr(model.model.layers[0].self_attn, "q_norm"))
    changed = []
    for stats in list(collect(model, batches, wants={"hessian"}))[:-1]:
        module = model.model.layers[stats.index]
        tensors = {name: t.detach().clone() for name, t in module.state_dict().items()}
        layer = Layer(stats.index, heads, Target(), tensors, stats.sites, stats.key_radius)
        for step in steps:
            step.change(layer)
        changed.append(layer)
    with torch.no_grad():
        for layer in changed:
            for name, t in layer.tensors.items():
                site = next((s for s in SITES if name in layer.columns(s)), None)
                perm = layer.acts[site].perm if site else None
                t = t if perm is None else t[:, perm.argsort()]
                model.model.layers[layer.index].get_parameter(name).copy_(t)
        gain = model.model.norm.weight.clone()
        for step in steps:
            for role, module in (
                ("embedding", model.model.embed_tokens),
                ("head", model.lm_head),
                ("norm", model.model.norm),
            ):
                module.weight.copy_(step.change_outer(role, module.weight.clone(), gain))
    return changed


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(0, tiny.VOCAB, (2, 40), generator=g)]


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
@torch.no_grad()
def test_folds_are_exact(arch, steps, batches):
    model = exact_model(arch)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    expected = model(input_ids=batches[0], use_cache=False).logits
    changed = apply(model, steps, batches)
    got = model(input_ids=batches[0], use_cache=False).logits
    assert ((got - expected).norm() / expected.norm()).item() < 1e-12
    assert any(not torch.equal(t, before[name]) for name, t in model.state_dict().items()) or (
        all(layer.acts[s].perm is not None for layer in changed for s in ("attn", "mlp"))
    )


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@torch.no_grad()
def test_statistics_follow_the_weights(arch, batches):
    """What steps make of the statistics is what a new pass over the changed model finds."""
    model = exact_model(arch)
    changed = apply(model, STEPS["all"], batches)
    for layer, fresh in zip(changed, collect(model, batches, wants={"hessian"}), strict=False):
        for site, s in layer.stats.items():
            f = fresh.sites[site]
            if (perm := layer.acts[site].perm) is not None:
                f.permute(perm)
            for name in ("mean", "moment", "rows", "hessian"):
                torch.testing.assert_close(getattr(s, name), getattr(f, name), msg=f"{site} {name}")
        torch.testing.assert_close(layer.key_radius, fresh.key_radius.float())


def test_a_gain_of_zero_folds(batches):
    model = exact_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[7] = 0
        expected = model(input_ids=batches[0], use_cache=False).logits
        apply(model, (Rotate(),), batches)
        got = model(input_ids=batches[0], use_cache=False).logits
    assert ((got - expected).norm() / expected.norm()).item() < 1e-12


def test_smoothing_does_what_it_is_for(batches):
    """Outliers of keys and of down_proj's inputs become smaller, kept pairs stay pairs."""
    model = exact_model("llama")
    with torch.no_grad():
        attention = model.model.layers[0].self_attn
        attention.k_proj.weight[5] *= 40
        attention.q_proj.weight[5] /= 40
        model.model.layers[0].mlp.up_proj.weight[9] *= 60
    before = next(iter(collect(model, batches)))
    layer = apply(model, (SmoothAttention(), SmoothOutput()), batches)[0]

    def spread(t):
        return (t.max() / t.median()).item()

    assert spread(layer.key_radius) < 0.5 * spread(before.key_radius)
    assert spread(layer.stats["down"].amax) < 0.5 * spread(before.sites["down"].amax)


@pytest.mark.parametrize("K", [1, 2, 6, 64, 96, 200, 640, 2048])
@pytest.mark.parametrize("seed", [None, 0])
def test_rotations_are_orthogonal_and_even(K, seed):
    Q = Rotation(K, seed)(torch.eye(K, dtype=torch.float64))
    torch.testing.assert_close(Q @ Q.T, torch.eye(K, dtype=torch.float64))
    power = K & -K
    assert Q.abs().max() <= (1 if power == K else 2**0.5) * K**-0.5 * (1 + 1e-12)
    x = torch.randn(3, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Rotation(K, seed)(x), x @ Q)


def inputs(K: int, tokens: int = 400) -> torch.Tensor:
    """Correlated inputs [tokens, K] with a few large channels."""
    g = torch.Generator().manual_seed(K)
    x = torch.randn(tokens, K, generator=g) @ torch.randn(K, K, generator=g).mul(K**-0.5)
    x += torch.randn(tokens, 1, generator=g)
    x[:, :: max(1, K // 5)] *= 5
    return x


def stats_of(x: torch.Tensor) -> Stats:
    H = x.T @ x / len(x)
    return Stats(len(x), x.abs().amax(0), x.mean(0), x.square().mean(0), x, H)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("K", [40, 128, 200, 384])
def test_error_feedback_beats_rounding(scheme, K):
    x = inputs(K)
    w = torch.randn(48, K, generator=torch.Generator().manual_seed(1))
    s = stats_of(x)
    plain = output_error(w, rtn.quantize(w, scheme), x)
    clipped = output_error(w, rtn.quantize(w, scheme, "output", s.hessian), x)
    for act_order in (False, True):
        q = gptq.quantize(w, scheme, s.hessian, act_order=act_order)
        assert (unpack_nibbles(q.codes)[:, K:] == 0).all()
        assert output_error(w, q, x) < 0.85 * plain
        assert output_error(w, q, x) < clipped
    assert clipped < plain * 1.02


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_correlation_there_is_nothing_to_feed_back(scheme):
    w = torch.randn(9, 200, generator=torch.Generator().manual_seed(2))
    expected = rtn.quantize(w, scheme)
    for act_order in (False, True):
        got = gptq.quantize(w, scheme, torch.eye(200), clip="mse", act_order=act_order)
        assert all(torch.equal(t, got.tensors()[f]) for f, t in expected.tensors().items())


@pytest.mark.parametrize("act_order", [False, True])
def test_error_feedback_against_a_slow_reference(act_order):
    """Optimal brain surgery channel by channel, inverting what is left of the Hessian each time."""
    K, damping = 128, 0.01
    H = stats_of(inputs(K)).hessian.double()
    w = torch.randn(6, K, generator=torch.Generator().manual_seed(4))
    got = gptq.quantize(w, "channel", H.float(), clip="none", act_order=act_order)
    static = rtn.quantize(w, "channel", "none")
    step, zero = static.channel_scales.double(), static.zeros.double()
    H = H + damping * H.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    order = H.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(K)
    left, u, codes = order.tolist(), w.double(), torch.zeros(6, K)
    while left:
        inverse = torch.linalg.inv(H[left][:, left])
        k = left[0]
        codes[:, k] = (u[:, k] / step + zero).round().clamp(0, 15)
        e = (u[:, k] - (codes[:, k] - zero) * step) / inverse[0, 0]
        u[:, left] -= e[:, None] * inverse[0]
        left = left[1:]
    same = (unpack_nibbles(got.codes) == codes).double().mean()
    assert same > 0.995, "fp32 may round a tie the other way"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_output_clipping_minimises_what_it_says(scheme):
    K = 256
    H = stats_of(inputs(K)).hessian
    w = torch.randn(16, K, generator=torch.Generator().manual_seed(1)) ** 3

    def error(clip):
        e = w4_dequant(rtn.quantize(w, scheme, clip, H)).float() - w
        B = min(grid.group_size(scheme, K), BLOCK_K)
        return sum(
            ((e[:, i : i + B] @ H[i : i + B, i : i + B]) * e[:, i : i + B]).sum()
            for i in range(0, K, B)
        )

    assert error("output") <= min(error("mse"), error("none")) * (1 + 1e-4)


@pytest.mark.parametrize("form", grid.FORMS)
def test_forms_of_progressive_groups(form):
    x = inputs(256)
    w = torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
    q = gptq.quantize(w, "twolevel", stats_of(x).hessian, form=form)
    top = 15 * q.group_scales.int() + q.zeros.int()
    assert (top <= 255).all() and (q.group_scales >= 1).all()
    if form == "prescale":
        assert ((128 - q.zeros.int()) % q.group_scales.int() == 0).all()
    assert output_error(w, q, x) < 0.9 * output_error(w, rtn.quantize(w, "twolevel"), x)


def test_bad_hessians_are_refused():
    w = torch.randn(4, 128)
    with pytest.raises(ValueError, match=r"hessian: expected \(128, 128\) .* got \(64, 64\)"):
        gptq.quantize(w, "twolevel", torch.eye(64))
    with pytest.raises(ValueError, match="not positive definite"):
        gptq.quantize(w, "twolevel", torch.eye(128) - 3 * torch.ones(128, 128))
    with pytest.raises(ValueError, match="hessian: expected finite values"):
        gptq.quantize(w, "twolevel", torch.full((128, 128), torch.nan))
    with pytest.raises(ValueError, match="'output' needs the Hessian"):
        rtn.quantize(w, "twolevel", "output")
    dead = gptq.quantize(w, "twolevel", torch.zeros(128, 128))
    assert torch.equal(dead.codes, rtn.quantize(w, "twolevel", "none").codes)


@pytest.mark.parametrize(
    "recipe, message",
    [
        ({"steps": (Rtn(), Gptq())}, "exactly one step that makes the codes .rtn, gptq."),
        ({"steps": (Rotate(),)}, "exactly one step that makes the codes"),
        ({"steps": (Reorder(), Rotate(), Rtn())}, "'rotate' cannot follow 'reorder'"),
        ({"steps": (SmoothOutput(), Rotate(), Gptq())}, "expected the order rotate, smooth_output"),
        ({"steps": (Rotate(), Rotate(), Rtn())}, "each step once, got 'rotate' twice"),
        ({"steps": (Gptq(form="prescale"),), "scheme": "g128"}, "expected weights.scheme 'twolev"),
    ],
)
def test_impossible_recipes(recipe, message):
    with pytest.raises(RecipeError, match=message):
        Recipe("x", **recipe)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Gptq(damping=0), "steps.gptq.damping: expected a number in 1e-06..1, got 0"),
        (lambda: Gptq(act_order=1), "steps.gptq.act_order: expected true or false, got 1"),
        (lambda: Gptq(form="ceil"), "expected one of direct, postscale, prescale, got 'ceil'"),
        (lambda: Rotate(seed=-1), "steps.rotate.seed: expected a whole number, got -1"),
        (lambda: SmoothAttention("x"), "expected a number in 0..1, got 'x'"),
        (lambda: SmoothOutput(sites=("attn",)), "expected a list of sites from down, o, got"),
        (lambda: Reorder(sites="down"), "expected a list of sites from attn, o, mlp, down, got"),
        (lambda: load("w4a16"), "'w4a16': no kernel .* use 'w4a8' or 'w4a8-qoq'"),
        (lambda: load("w8a8"), "'w8a8': no format stores 8-bit weights; use 'w4a8'"),
    ],
)
def test_impossible_options(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def test_one_linear_cannot_have_steps_of_a_layer():
    with pytest.raises(ValueError, match=r"'w4a8-qoq'.*change whole layers"):
        W4AxLinear.from_linear(nn.Linear(128, 8), PRESETS["w4a8-qoq"])
