"""The Hopper planner of w4ax_gemm: every plan is legal."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessella import _native

pytestmark = pytest.mark.skipif(_native._C is None, reason="needs the compiled _C module")

SMEM = 227 * 1024
TILES = ("8", "16", "32", "64", "128", "256", "64x192", "128x192")


def size(tile: str) -> tuple[int, int]:
    """(tokens, features) of a tile's name."""
    tokens, _, features = tile.partition("x")
    return int(tokens), int(features or (64 if int(tokens) <= 32 else 128))


@given(
    M=st.integers(1, 20000),
    N=st.integers(1, 60000),
    K=st.integers(1, 65536),
    scheme=st.sampled_from(("channel", "g128", "twolevel")),
    sms=st.sampled_from((78, 114, 132)),
    tile=st.sampled_from(("", *TILES)),
)
@settings(max_examples=400, deadline=None)
def test_plan_is_legal(M, N, K, scheme, sms, tile):
    """Tiles cover the result, the ring fits, a split leaves every part some of K."""
    p = _native._C.plan_w4ax_gemm_sm90(M, N, K, scheme, sms, tile)
    if scheme == "g128" and tile in ("256", "64x192", "128x192"):
        assert p["stages"] == 0  # no such body
        return
    if tile:
        assert (p["tokens"], p["features"]) == size(tile)
        assert p["kernel"] == f"w4ax_gemm.sm90.t{tile}"
    units = -(-N // p["features"]) * -(-M // p["tokens"])
    assert 0 <= p["whole"] <= units and p["tiles"] == 2 * units - p["whole"]
    if p["whole"] < units:  # halves are for the last wave of a tile that has a half
        assert p["tokens"] >= 128 and p["split"] == 1
        assert p["whole"] == units // sms * sms
    assert 2 <= p["stages"] <= 16 and p["smem"] <= SMEM
    assert p["split"] in ((1, 2, 3, 4, 6, 8) if p["tokens"] >= 64 else (1, 2, 4, 8))
    assert p["split"] <= -(-K // 128)
    if p["split"] > 1:
        assert p["grid"] == p["tiles"] * p["split"]
    elif p["stream"] == 0:
        assert 1 <= p["grid"] <= p["tiles"]


@given(
    M=st.integers(1, 9000),
    N=st.integers(1, 60000),
    K=st.integers(1, 65536),
    tokens=st.sampled_from((64, 128, 256)),
)
@settings(max_examples=200, deadline=None)
def test_shares_of_k(M, N, K, tokens):
    """Every thread block has a share of the streamed tiles; the rest are whole waves."""
    p = _native._C.plan_w4ax_gemm_sm90(M, N, K, tile=str(tokens), stream=True)
    units, blocks = -(-N // 128) * -(-M // tokens), -(-K // 128)
    assert p["tiles"] == p["whole"] == units and p["split"] == 1
    assert p["kernel"] == f"w4ax_gemm.sm90.s{tokens}"
    assert 1 <= p["stream"] < 2 * 132 and 1 <= p["grid"] == min(132, p["stream"] * blocks)
    assert (units - p["stream"]) % 132 == 0
    assert 2 <= p["stages"] <= 16 and p["smem"] <= SMEM


def test_shares_instead_of_a_wave_that_fills_little():
    """160 tiles of 256 tokens, on 132 SMs."""
    p = _native._C.plan_w4ax_gemm_sm90(512, 10240, 8192)
    assert (p["kernel"], p["stream"], p["grid"]) == ("w4ax_gemm.sm90.s256", 160, 132)
    assert "160 of them by shares of K" in p["text"]


@pytest.mark.parametrize("M", (1024, 2048))
def test_many_activations_are_not_read_out_of_order(M):
    """112 and 224 tiles of 256 tokens would be dealt out, but 19 and 38 MB leave L2."""
    assert _native._C.plan_w4ax_gemm_sm90(M, 3584, 18944)["stream"] == 0


@pytest.mark.parametrize(
    "M,N,K,kernel,tiles,split",
    (
        (512, 4608, 3584, "t128x192", 96, 1),
        (512, 6144, 4096, "t128x192", 128, 1),
        (64, 4608, 3584, "t64", 36, 3),
        (64, 4096, 14336, "t64", 32, 3),
    ),
)
def test_waves_that_other_tiles_and_parts_fill(M, N, K, kernel, tiles, split):
    """128 x 256 and powers of two would leave up to half of the SMs idle."""
    p = _native._C.plan_w4ax_gemm_sm90(M, N, K)
    assert (p["kernel"], p["tiles"], p["split"]) == (f"w4ax_gemm.sm90.{kernel}", tiles, split)


def test_an_unknown_tile_is_refused():
    with pytest.raises(ValueError, match=r"tile: expected one of 8, 16, .*128x192, got '64x128'"):
        _native._C.plan_w4ax_gemm_sm90(64, 4096, 4096, tile="64x128")


@given(M=st.integers(1, 256), N=st.integers(1, 20000), K=st.integers(1, 30000))
@settings(max_examples=100, deadline=None)
def test_a_few_tokens_are_not_padded_to_many(M, N, K):
    """A tile has fewer than twice the tokens there are, or is the smallest."""
    p = _native._C.plan_w4ax_gemm_sm90(M, N, K)
    assert p["tokens"] == 8 or p["tokens"] < 2 * M


def test_last_wave_in_halves():
    """134 tiles on 132 SMs: two are cut rather than given a wave of their own."""
    p = _native._C.plan_w4ax_gemm_sm90(300, 8576, 4096, tile="256")
    assert (p["whole"], p["tiles"], p["grid"]) == (132, 136, 132)
    assert "the last 4 of them halves" in p["text"]
