"""Codecs of the cache: names, factors, what they do to errors, and the papers' own versions."""

from __future__ import annotations

import pytest
import torch

from tessella.formats_kv import KVFactors
from tessella.quant import kv
from tessella.quant.kv import base, deco, hadamard

J, D, S = 2, 64, 300

NAMES = (
    "int8",
    "kv4",
    "kv2",
    "k4v2",
    "kv4-g32",
    "kv4-mean",
    "kv4-hadamard",
    "kv4-kivi",
    "kv2-kivi",
    "kv4-deco",
    "kv4-deco16",
    "kv4-mean-hadamard",
    "kv4-g16-deco32",
)


def keys_values(rng: torch.Generator, S: int = S, D: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    """K with a few far offset channels and correlated others, V with a few large tokens."""
    mix = torch.randn(J, D, D, generator=rng) / D**0.5
    k = torch.einsum("sjd,jde->sje", torch.randn(S, J, D, generator=rng), mix)
    k[:, :, [3, 35]] += torch.tensor([9.0, -7.0])
    v = torch.randn(S, J, D, generator=rng)
    v[::50] *= 4
    return k, v


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("name", NAMES)
def test_coded_keys_and_values_are_close(name: str, rng):
    k, v = keys_values(rng)
    codec = kv.parse(name)
    k2, v2 = codec.roundtrip(k, v, 64)
    k_bits, v_bits = codec.pages.k_bits, codec.pages.v_bits
    allowed = {8: 0.02, 4: 0.25, 2: 1.2}
    assert 0 < error(k2, k) < allowed[k_bits] and 0 < error(v2, v) < allowed[v_bits]


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32", "fp8"])
def test_uncoded_pages_round_to_their_dtype(name: str, rng):
    k, v = keys_values(rng)
    codec = kv.parse(name)
    assert torch.equal(codec.roundtrip(k, v, 64)[0], k.to(codec.dtype).float())
    assert codec.bytes_per_token(J, D, 64) == 2 * J * D * codec.dtype.itemsize


def test_outlier_channels_are_what_the_codecs_are_for(rng):
    k, v = keys_values(rng)
    errors = {n: error(kv.parse(n).roundtrip(k, v, 64)[0], k) for n in NAMES}
    for name in ("kv4-mean", "kv4-hadamard", "kv4-deco", "kv4-kivi"):
        assert errors[name] < 0.75 * errors["kv4"], (name, errors)
    assert errors["int8"] < 0.1 * errors["kv4"] and errors["kv2"] > 2 * errors["kv4"]


@pytest.mark.parametrize("name", ["kv4-hadamard", "kv4-deco", "kv4-deco16", "kv4-mean-deco32"])
@pytest.mark.parametrize("D", [64, 96])
def test_factors_leave_attention_as_it_is(name: str, D: int, rng):
    """q'.k' (+ q.mean) is q.k, and p v' through o_fold is p v: nothing needs to be rebuilt."""
    if D == 96 and name == "kv4-deco16":
        name = "kv4-deco48"
    k, v = keys_values(rng, D=D)
    q, p = torch.randn(5, J, D, generator=rng), torch.rand(5, S, generator=rng)
    f = kv.parse(name).fit(k[:256], v[:256])
    shift = torch.zeros(1, J, D) if f.k_mean is None else f.k_mean
    k2, v2 = base.fold(k - shift, f.k_fold), base.fold(v, f.v_fold)
    scores = torch.einsum("tjd,sjd->jts", base.fold(q, f.q_fold), k2)
    scores = scores + torch.einsum("tjd,xjd->jt", q, shift)[..., None]
    assert torch.allclose(scores, torch.einsum("tjd,sjd->jts", q, k), atol=2e-3, rtol=1e-3)
    out = base.fold(torch.einsum("ts,sjd->tjd", p, v2), f.o_fold)
    assert torch.allclose(out, torch.einsum("ts,sjd->tjd", p, v), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("m", [1, 2, 16, 64])
def test_hadamard_is_orthonormal(m: int):
    h = hadamard.matrix(m)
    assert torch.allclose(h @ h, torch.eye(m), atol=1e-6)
    assert torch.allclose(h.abs(), torch.full((m, m), m**-0.5))
    assert [hadamard.block_of(d) for d in (64, 80, 96, 256)] == [64, 16, 32, 256]


def test_deco_is_the_papers_decomposition(rng):
    """A = T_S^-1 of the SVD of the whole view [S D/m, m], up to sign and one common scale."""
    x, _ = keys_values(rng, 256)
    m = 16
    into, back = deco.Deco(m)._factors(x)
    for head in range(J):
        w = x[:, head].reshape(-1, m)
        large, small = deco.decompose(w)
        assert torch.allclose(large @ small, w, atol=1e-4)
        ours = w @ into[0, head, 0]
        ratio = ours / large.flip(-1)  # eigh ascends, svd descends
        one = ratio.abs().median()
        assert torch.allclose(ours.abs(), large.flip(-1).abs() * one, atol=2e-3 * float(one))
        assert torch.allclose(into[0, head, 0] @ back[0, head, 0].T, torch.eye(m), atol=1e-4)


def test_deco_survives_a_head_without_rank(rng):
    x = torch.zeros(256, J, D)
    x[:, 1, 5] = 1.0
    f = deco.Deco().fit(x, x)
    assert all(torch.isfinite(t).all() for t in vars(f).values() if t is not None)
    k, v = kv.parse("kv4-deco").roundtrip(x, x, 64)
    assert (
        torch.isfinite(k).all() and error(k[:, 1], x[:, 1]) < 0.1 and error(v[:, 1], x[:, 1]) < 0.1
    )


@pytest.mark.parametrize("name", kv.PUBLISHED)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_published_versions(name: str, bits: int, rng):
    k, v = keys_values(rng)
    k2, v2 = kv.PUBLISHED[name](k, v, bits)
    assert k2.shape == k.shape and v2.shape == v.shape and k2.dtype == torch.float32
    assert 0 < error(k2, k) < {8: 0.05, 4: 0.6, 2: 1.5}[bits]
    if name == "kivi":
        assert torch.equal(k2[-128:], k[-128:]) and torch.equal(v2[-128:], v[-128:])
        assert not torch.equal(k2[:128], k[:128])
    if name == "sage":
        assert torch.equal(v2, v)


def test_the_published_deco_beats_its_baseline_on_outliers(rng):
    k, v = keys_values(rng)
    ours, baseline = (kv.PUBLISHED[n](k, v, 4)[0] for n in ("deco-icl", "rtn-token"))
    assert error(ours, k) < error(baseline, k)


def test_bytes_of_a_token():
    bytes_of = {n: kv.parse(n).bytes_per_token(8, 128, 64) for n in ("bf16", "int8", "kv4", "kv2")}
    assert bytes_of["bf16"] == 4096
    assert 0.5 < bytes_of["int8"] / 4096 < 0.53
    assert 0.25 < bytes_of["kv4"] / 4096 < 0.27
    assert 0.125 < bytes_of["kv2"] / 4096 < 0.145


@pytest.mark.parametrize(
    "name, words",
    [
        ("kv3", "expected bf16, fp16, fp32, fp8, int8"),
        ("", "expected bf16"),
        ("bf16-g32", "expected bf16"),
        ("kv4-g7", "got 'g7'"),
        ("kv4-hadmard", "got 'hadmard'"),
        ("kv4-deco-hadamard", "can be combined"),
        ("kv4-kivi-g32", "can be combined"),
        ("kv4-mean-mean", "can be combined"),
    ],
)
def test_names_that_are_refused(name: str, words: str):
    with pytest.raises(kv.CodecError, match=words):
        kv.parse(name)


def test_a_codec_that_does_not_fit_the_head():
    with pytest.raises(kv.CodecError, match="whole blocks of 48, got D=64"):
        kv.parse("kv4-deco48").fit(torch.zeros(256, J, D), torch.zeros(256, J, D))


def test_which_codecs_share_pages_by_the_token():
    exact = {n: kv.parse(n).token_exact for n in ("bf16", "kv4", "kv4-hadamard", "kv4-kivi")}
    assert exact == {"bf16": True, "kv4": True, "kv4-hadamard": True, "kv4-kivi": False}
    assert kv.parse("kv4-deco").fit_tokens == kv.FIT_TOKENS == 256
    assert kv.parse("kv4").fit(torch.zeros(0, J, D), torch.zeros(0, J, D)) is None
    assert isinstance(kv.parse("kv4-mean").fit(*keys_values(torch.Generator())), KVFactors)
