"""Bands of frequencies and balanced keys: exact where they claim to be, and never a loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessella.mla import attention as forms
from tessella.mla.bands import BandSearch
from tessella.mla.rotate import pair_moments, rotation
from tessella.mla.shape import Heads, MLAError, bands_of, folds_of
from test_to_mla import HEADS, HIDDEN, angles, gathered, layer, same, turned

T = 40
BANDS = [(1, 1, 2, 4), (3, 5), (8,), (2, 2, 1, 3)]


def text(windows: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(8)
    return torch.randn(windows, T, HIDDEN, dtype=torch.float64, generator=g)


def pairs(gqa: forms.GQA, heads: Heads = HEADS) -> torch.Tensor:
    return pair_moments(gathered(gqa)[: heads.width, : heads.width], heads)


def search(gqa: forms.GQA, collapse: int = 1, x: torch.Tensor | None = None) -> BandSearch:
    x = text() if x is None else x
    turns = tuple(t.float() for t in angles(T, gqa.heads.D))
    return BandSearch(gqa.to(torch.float32), x.float(), turns, pairs(gqa, gqa.heads), collapse)


@pytest.mark.parametrize("bands", BANDS)
def test_rotations_by_bands_are_orthogonal(bands):
    q = turned(layer(), 1, bands)
    assert same(q @ q.T, torch.eye(HEADS.width, dtype=torch.float64))


def test_bands_of_one_width_are_a_fold():
    for fold in (1, 2, 4, 8):
        assert torch.equal(turned(layer(), 1, (fold,) * (8 // fold)), turned(layer(), 1, fold))


@pytest.mark.parametrize("bands", [(4, 5), (8, 0), (-1, 9), ()])
def test_bands_must_fill_a_head(bands):
    with pytest.raises(MLAError, match="bands of multiples of the collapse 1 that add up to 8"):
        turned(layer(), 1, bands)


def test_the_fastest_component_gets_the_fastest_angle():
    """Where every frequency of a band has one strong key head, nothing but the others is lost."""
    heads = Heads(4, 2, 16)
    gqa = layer(heads, bias=False)
    strong = torch.zeros(2, 2, 8, dtype=torch.float64)  # J, channel of the pair, frequency
    strong[0, :, ::2], strong[1, :, 1::2] = 1.0, 1.0
    # later frequencies are stronger, so that by strength alone they would come first
    strong *= torch.arange(1, 9)
    gqa = replace(gqa, k=gqa.k * strong.flatten()[:, None])
    alone = torch.eye(16, dtype=torch.float64).view(2, 8, 2, 8) * pairs(gqa, heads)
    for fold in (1, 2, 8):
        q = rotation(alone, heads, 1, fold)
        got = forms.partial_rope(gqa, q, 16).run(text(), angles(T))
        assert same(got, gqa.run(text(), angles(T)))


@pytest.mark.parametrize("bias", [False, True])
def test_balanced_attention_is_the_same(bias):
    gqa = layer(bias=bias)
    scale = torch.rand(HEADS.J, HEADS.D // 2, dtype=torch.float64) + 0.1
    other = forms.balanced(gqa, scale)
    assert not same(other.k, gqa.k, 0.1)
    assert same(other.run(text(), angles(T)), gqa.run(text(), angles(T)))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("collapse, fold", [(1, 2), (1, (1, 3, 4)), (2, (4, 2, 2)), (4, 8)])
def test_loss_is_that_of_the_attention_with_partial_rope(collapse, fold, window):
    gqa = replace(layer(bias=False), window=window)
    found = search(gqa, collapse)
    rope = HEADS.D // collapse
    q = rotation(pairs(gqa), HEADS, collapse, fold)
    exact, partial = (
        a.to(torch.float32).run(text().float(), tuple(t.float() for t in angles(T)))
        for a in (gqa, forms.partial_rope(gqa, q, rope))
    )
    windows, at = found.at
    error = (partial - exact)[windows[:, None], at].square().sum()
    assert found.loss(fold) == pytest.approx(
        float(error / exact[windows[:, None], at].square().sum()), rel=1e-3
    )


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**20), collapse=st.sampled_from([1, 2, 4]), heads=st.sampled_from([1, 3])
)
def test_bands_are_no_worse_than_any_fold(seed, collapse, heads):
    shape = Heads(6, heads, 16)
    g = torch.Generator().manual_seed(seed)
    gqa = layer(shape, bias=False)
    gqa = replace(gqa, k=gqa.k * torch.rand(shape.width, 1, generator=g, dtype=torch.float64))
    found = search(gqa, collapse)
    folds = folds_of(shape, collapse)
    bands = found.run(folds)
    assert sum(bands) == 8 and all(n % collapse == 0 for n in bands)
    assert found.loss(bands) <= min(found.loss(f) for f in folds) * (1 + 1e-5)
    for fold in folds:
        assert found.loss(fold) == pytest.approx(found.loss(bands_of(shape, fold)))


def test_nothing_to_attend_to():
    """Keys and values of zeros: any bands do, and nothing is divided by zero."""
    gqa = layer(bias=False)
    gqa = replace(gqa, k=0 * gqa.k, v=0 * gqa.v)
    assert sum(search(gqa).run([1, 2])) == 8
