"""Round to nearest and recipes: every code in range, errors bounded, clipping never worse."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessella.formats import SCHEMES, W4Weight
from tessella.layout import unpack_nibbles
from tessella.quant import grid, rtn
from tessella.quant import recipe as recipes
from tessella.quant.recipe import PRESETS, Recipe, RecipeError, Rtn
from tessella.ref.w4ax_gemm import w4_dequant


def steps(w: W4Weight) -> torch.Tensor:
    """Distance of neighbouring values, fp64 [N, Kp]."""
    values = [w4_dequant(with_code(w, code)) for code in (0, 1)]
    return values[1] - values[0]


def with_code(w: W4Weight, code: int) -> W4Weight:
    """The same scales with every code set to `code`."""
    return dataclasses.replace(w, codes=torch.full_like(w.codes, code * 17))


def check_ranges(w: W4Weight) -> None:
    """Codes, zero codes, level-1 steps and bytes lie where formats.py says."""
    q = unpack_nibbles(w.codes)
    assert (q[:, w.K :] == 0).all(), "padding channels have code 0"
    if w.scheme != "twolevel":
        assert (w.zeros <= 15).all()
        return
    s1 = w.group_scales
    assert (s1 >= 1).all() and (s1 <= 16).all()
    top = 15 * s1.int() + w.zeros.int()
    assert (top <= 255).all(), "no code of a group may exceed a byte"


WEIGHTS = st.tuples(
    st.integers(0, 2**31),
    st.sampled_from([1, 3, 65]),
    st.sampled_from([1, 32, 40, 127, 128, 129, 200, 384]),
    st.sampled_from(["normal", "heavy", "positive", "negative", "constant", "sparse", "outlier"]),
    st.sampled_from([1e-29, 1e-6, 1.0, 1e2]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)


def draw(seed, N, K, kind, scale, dtype) -> torch.Tensor:
    """A weight [N, K] of one of the kinds that upset quantisers."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=g)
    if kind == "heavy":
        w = w**3
    elif kind in ("positive", "negative"):
        w = (w.abs() + 5) * (1 if kind == "positive" else -1)
    elif kind == "constant":
        w = w[:, :1].expand(N, K)
    elif kind == "sparse":
        w = w * (torch.rand(N, K, generator=g) < 0.05)
    elif kind == "outlier":
        w[:, K // 2] *= 100
    return (w * scale).to(dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
@given(args=WEIGHTS)
@settings(max_examples=60, deadline=None)
def test_unclipped_errors_are_at_most_half_a_step(scheme, args):
    w_NK = draw(*args)
    w = rtn.quantize(w_NK, scheme, "none")
    check_ranges(w)
    x, d, s = w_NK.double(), w4_dequant(w)[:, : w.K], steps(w)[:, : w.K]
    lo, hi = (w4_dequant(with_code(w, code))[:, : w.K] for code in (0, 15))
    inside = (x >= lo) & (x <= hi)
    if scheme == "channel":
        inside[:] = True  # an fp32 step leaves nothing outside but the rounding of the zero code
    error = (d - x).abs()
    assert (error <= s / 2 + 1e-6 * (s + x.abs()) + rtn.TINY)[inside].all()


@pytest.mark.parametrize("scheme", SCHEMES)
@given(args=WEIGHTS)
@settings(max_examples=60, deadline=None)
def test_clipping_is_never_worse_than_the_full_range(scheme, args):
    w_NK = draw(*args)
    clipped = rtn.quantize(w_NK, scheme)
    check_ranges(clipped)
    full = rtn.relative_error(w_NK, rtn.quantize(w_NK, scheme, "none"))
    assert rtn.relative_error(w_NK, clipped) <= full * (1 + 1e-5) + 1e-7


@pytest.mark.parametrize("form", grid.FORMS)
@pytest.mark.parametrize("ratio", [rtn.RATIOS[0], rtn.RATIOS[5], rtn.RATIOS[-1]])
def test_every_twolevel_range_fits_a_byte(ratio, form):
    """All pairs lo <= hi within the protective range, in half units: no byte exceeds 255."""
    P = rtn.PROTECTIVE_RANGE
    ends = torch.arange(-2 * P, 2 * P + 1) / 2
    lo, hi = torch.meshgrid(ends, ends, indexing="ij")
    keep = lo <= hi
    lo, hi = (t[keep].view(1, -1, 1) for t in (lo, hi))
    g = grid.grid(lo, hi, ratio, "twolevel", form)
    top = g.zero + 15 * g.step
    assert g.zero.min() >= 0 and g.step.min() >= 1 and g.step.max() <= rtn.MAX_S1
    assert top.max() <= 255
    if form == "prescale":
        assert (g.offset % g.step == 0).all() and (g.offset <= 0).all(), "code z stands for zero"
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    if ratio == 1:
        q = g.position(torch.cat([lo, hi], 2)).round_().clamp_(0, 15)
        error = q * g.step + g.offset - torch.cat([lo, hi], 2)
        # rounding s1 down costs at most 15/2 at the top of the range, rounding a costs half;
        # a zero at a multiple of the step moves by up to half a step
        assert error.abs().max() <= (8 if form != "prescale" else 16)


@pytest.mark.parametrize("P, top", [(rtn.PROTECTIVE_RANGE, 254), (120, 256), (127, 262)])
def test_the_protective_range_is_the_largest_safe_one(P, top):
    """Largest byte of any group within +-P, if nothing held it back: 119 fits, 120 does not."""
    ends = torch.arange(-2 * P, 2 * P + 1) / 2
    lo, hi = torch.meshgrid(ends, ends, indexing="ij")
    byte = 15 * ((hi - lo) / 15).round() + lo.round() + 128
    assert byte[lo <= hi].max() == top


# Relative error of 4096 x 4096 Gaussians: the research's single-level asymmetric g128 has 0.1005
# and its two-level form 0.1017, per channel 0.1400; all before clipping.
@pytest.mark.parametrize(
    "scheme, full, clipped",
    [("channel", 0.140, 0.1086), ("g128", 0.1005, 0.0951), ("twolevel", 0.1005, 0.0927)],
)
def test_accuracy_on_gaussians(scheme, full, clipped, rng):
    w = torch.randn(256, 4096, generator=rng)
    assert rtn.relative_error(w, rtn.quantize(w, scheme, "none")) == pytest.approx(full, rel=0.02)
    assert rtn.relative_error(w, rtn.quantize(w, scheme)) == pytest.approx(clipped, rel=0.02)


def test_smaller_groups_are_more_accurate(rng):
    w = torch.randn(64, 1024, generator=rng)
    errors = [rtn.relative_error(w, rtn.quantize(w, s)) for s in ("g32", "g64", "g128", "channel")]
    assert errors == sorted(errors)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_and_tiny_rows_stand_for_zero(scheme):
    w = torch.zeros(4, 200)
    w[1], w[2, 7], w[3] = 2.0**-120, 1.0, -(2.0**-130)
    q = rtn.quantize(w, scheme)
    d = w4_dequant(q)[:, :200]
    assert (d[[0, 1, 3]] == 0).all() and torch.isfinite(d).all()
    assert d[2, 7] == pytest.approx(1.0, rel=2e-2) and (d[2] != 0).sum() == 1
    assert (q.codes[[0, 1, 3]] == 0).all() or scheme == "twolevel"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [3.0, -3.0, 1e-3])
def test_constant_rows_are_nearly_exact(scheme, value):
    w = torch.full((2, 256), value)
    d = w4_dequant(rtn.quantize(w, scheme))
    assert torch.allclose(d, w.double(), rtol=6e-4)


@pytest.mark.parametrize("scheme", ["g32", "g64", "g128"])
def test_a_group_below_fp16_becomes_zeros(scheme):
    w = torch.full((1, 128), 1e-9)
    q = rtn.quantize(w, scheme)
    assert (q.group_scales == 0).all() and (w4_dequant(q) == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_results_do_not_depend_on_the_chunk(scheme, monkeypatch, rng):
    w = torch.randn(37, 200, generator=rng)
    whole = rtn.quantize(w, scheme)
    monkeypatch.setattr(grid, "CHUNK", 5 * 256)
    parts = rtn.quantize(w, scheme)
    for field, t in whole.tensors().items():
        assert torch.equal(t, parts.tensors()[field]), field


def test_results_do_not_depend_on_the_threads(threads, rng):
    w = torch.randn(1200, 300, generator=rng)
    threads(1)
    serial, error = rtn.quantize(w, "twolevel"), rtn.relative_error(w, rtn.quantize(w, "g32"))
    threads(3)
    parallel = rtn.quantize(w, "twolevel")
    assert all(torch.equal(t, parallel.tensors()[f]) for f, t in serial.tensors().items())
    assert rtn.relative_error(w, rtn.quantize(w, "g32")) == error
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), seen) == (3, [3]), "torch's setting is put back"
    w[1100, 7] = torch.nan
    w[900, 3] = torch.inf
    with pytest.raises(ValueError, match="row 900, column 3"):
        rtn.quantize(w, "twolevel")


def test_parameters_leave_no_graph():
    w = torch.nn.Parameter(torch.ones(4, 128))
    assert not any(t.requires_grad for t in rtn.quantize(w, "channel").tensors().values())


def test_strided_weights(rng):
    w = torch.randn(256, 96, generator=rng).T
    assert torch.equal(rtn.quantize(w, "g32").codes, rtn.quantize(w.contiguous(), "g32").codes)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_that_are_not_finite_are_named(scheme, bad, monkeypatch):
    monkeypatch.setattr(grid, "CHUNK", 2 * 128)
    w = torch.ones(9, 100)
    w[7, 42] = bad
    with pytest.raises(ValueError, match=rf"finite.*got {bad} at row 7, column 42"):
        rtn.quantize(w, scheme)


def test_weights_too_large_for_fp16_scales_are_named():
    w = torch.ones(3, 128)
    w[1, 5] = 6e5
    with pytest.raises(ValueError, match=r"below 4\.91e\+05 .*g128.*row 1, column 5"):
        rtn.quantize(w, "g128")
    assert torch.isfinite(w4_dequant(rtn.quantize(w, "twolevel"))).all()


@pytest.mark.parametrize(
    "w, scheme, clip, message",
    [
        (torch.ones(2, 2), "g7", "mse", r"scheme: expected one of channel, g32.*got 'g7'"),
        (torch.ones(2, 2), "g32", "best", r"clip: expected one of mse, none, output, got 'best'"),
        (torch.ones(2), "g32", "mse", r"w: expected a floating-point matrix .*\(2,\)"),
        (torch.ones(2, 2).int(), "g32", "mse", r"got torch.int32 \(2, 2\)"),
        (torch.ones(0, 2), "g32", "mse", r"got torch.float32 \(0, 2\)"),
        (torch.ones(2, 0), "g32", "mse", r"got torch.float32 \(2, 0\)"),
    ],
)
def test_bad_arguments(w, scheme, clip, message):
    with pytest.raises(ValueError, match=message):
        rtn.quantize(w, scheme, clip)


# Recipes


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_toml(name):
    recipe = recipes.load(name)
    assert recipe == PRESETS[name] and recipe.name == name
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert hash(recipe)


def test_the_default_preset_is_what_the_kernels_favour():
    r = PRESETS["w4a8"]
    assert (r.scheme, SCHEMES[r.scheme], r.granularity, r.k8) == ("twolevel", 128, "token", 1.0)
    assert r.k8_of(4096) == -1 and not r.lm_head and r.steps == (Rtn("mse"),)
    assert PRESETS["w4a4"].k8_of(4096) == 0


def test_mixed_precision_takes_whole_blocks():
    r = Recipe("mixed", granularity="block", k8=0.25)
    assert [r.k8_of(K) for K in (128, 200, 512, 4096)] == [128, 128, 128, 1024]


def test_a_recipe_from_a_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'name = "mine"\n[weights]\nscheme = "g64"\nskip = ["*.down_proj"]\nlm_head = true\n'
        '[activations]\ngranularity = "block"\nk8 = 0.5\n[[steps]]\nuse = "rtn"\nclip = "none"\n'
    )
    r = recipes.load(file)
    assert r == Recipe("mine", "g64", "block", 0.5, True, ("*.down_proj",), (Rtn("none"),))
    assert r.skips("model.layers.3.mlp.down_proj") and not r.skips("model.layers.3.mlp.up_proj")


def test_a_minimal_recipe_has_the_defaults():
    assert Recipe.from_toml('name = "w4a8"') == PRESETS["w4a8"]


@pytest.mark.parametrize(
    "toml, message",
    [
        ("", r"name: expected a non-empty string"),
        ("name = 3", r"name: expected a non-empty string, got 3"),
        (
            'name = "x"\nsize = 1',
            r"expected fields name, weights, activations, cache, steps, got 'size'",
        ),
        ('name = "x"\nweights = 1', r"weights: expected a table, got 1"),
        ('name = "x"\n[weights]\nbits = 3', r"weights: expected fields scheme, .*got 'bits'"),
        ('name = "x"\n[weights]\nscheme = "g7"', r"scheme: expected one of channel, .*'g7'"),
        ('name = "x"\n[weights]\nlm_head = 1', r"lm_head: expected true or false, got 1"),
        ('name = "x"\n[weights]\nskip = "*"', r"skip: expected a list of name patterns"),
        ('name = "x"\n[activations]\ngranularity = "row"', r"expected one of token, class, block"),
        ('name = "x"\n[activations]\nk8 = 2', r"k8: expected 0..1, got 2"),
        ('name = "x"\n[activations]\nk8 = "all"', r"k8: expected a number, got 'all'"),
        ('name = "x"\n[activations]\nk8 = 0.5', r"'token' has one scale per token"),
        ('name = "x"\nsteps = []', r"steps: expected exactly one step"),
        (
            'name = "x"\n[[steps]]\nuse = "gptk"',
            r"steps.use: expected one of .*gptq, got 'gptk'",
        ),
        ('name = "x"\n[[steps]]\nclip = "mse"', r"steps.use: expected one of .*rtn, .*got None"),
        ('name = "x"\n[[steps]]\nuse = "rtn"\nbits = 4', r"expected fields use, clip, got 'bits'"),
        (
            'name = "x"\n[[steps]]\nuse = "rtn"\nclip = "x"',
            r"one of mse, none, output, got",
        ),
        ('name = "x"\n[[steps]]\nuse = "rtn"\n[[steps]]\nuse = "rtn"', r"exactly one step"),
        ("name = ", r"not valid TOML"),
    ],
)
def test_bad_recipes_are_refused(toml, message, tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text(toml)
    with pytest.raises(RecipeError, match=message) as e:
        recipes.load(file)
    assert str(file) in str(e.value)


def test_unknown_recipes_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"one of w4a8, w4a8-g128, .*w4axkv4 or a TOML file, got"):
        recipes.load("w4a7")
    with pytest.raises(RecipeError, match=r"cannot read .*nothing\.toml"):
        recipes.load(tmp_path / "nothing.toml")
