"""Coded pages: the C++ layout against the independent one, bit by bit; the dataclasses' checks."""

import pytest
import torch

from tessella import _native
from tessella.formats_kv import KV4Pages, KVCodec, KVPages
from tessella.layout_kv import PageCodes, pack_page, unpack_page

NAMES = ["k4v4", "k8v8", "k2v2", "k4v2-g32", "k8v4-g16", "k4v4-channel", "k2v4-g32-channel"]
SHAPES = [(16, 64), (48, 96), (256, 32), (32, 256)]
needs_native = pytest.mark.skipif(_native._C is None, reason="needs compiled kernels")


def random_codes(codec: KVCodec, Z: int, D: int, pages: int, g: torch.Generator) -> PageCodes:
    def codes(bits):
        return torch.randint(0, 2**bits, (pages, Z, D), generator=g, dtype=torch.uint8)

    def rows(channel):
        shape = (pages, D) if channel else (pages, Z, codec.groups(D))
        return torch.randn(shape, generator=g).half()

    channel = codec.k_axis == "channel"
    k, v = codes(codec.k_bits), codes(codec.v_bits)
    return PageCodes(k, v, rows(channel), rows(channel), rows(False), rows(False))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("Z, D", SHAPES)
def test_unpack_inverts_pack(name, Z, D):
    codec = KVCodec.parse(name)
    assert codec.name == name
    contents = random_codes(codec, Z, D, 3, torch.Generator().manual_seed(0))
    blob = pack_page(contents, codec)
    assert blob.shape == (3, codec.page_bytes(Z, D)) and blob.shape[1] % Z == 0
    back = unpack_page(blob, codec, Z, D)
    for field in PageCodes.__dataclass_fields__:
        assert torch.equal(getattr(back, field), getattr(contents, field)), field


@needs_native
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("Z, D", [(16, 64), (48, 96), (32, 80)])
def test_both_layouts_agree_index_by_index(name, Z, D):
    codec = KVCodec.parse(name)
    if codec.group and D % codec.group:
        pytest.skip("D is not whole groups")
    G, channel = codec.group or D, codec.k_axis == "channel"
    args = (codec.k_bits, codec.v_bits, Z, D, G, channel)
    assert _native._C.kv_bytes(args) == codec.page_bytes(Z, D)
    contents = random_codes(codec, Z, D, 1, torch.Generator().manual_seed(1))
    blob = pack_page(contents, codec)[0].tolist()
    half = torch.tensor(blob[: len(blob) // 2 * 2], dtype=torch.uint8).view(torch.float16)
    for t in (*range(Z if Z < 20 else 5), Z - 1):
        for d in range(D):
            kb, ks, vb, vs = _native._C.kv_code_slots(args, t, d)
            assert blob[kb] >> ks & (2**codec.k_bits - 1) == contents.k[0, t, d]
            assert blob[vb] >> vs & (2**codec.v_bits - 1) == contents.v[0, t, d]
            at = [half[i // 2] for i in _native._C.kv_row_slots(args, t, d)]
            k = (0, d) if channel else (0, t, d // G)
            assert at[0] == contents.k_scales[k] and at[1] == contents.k_zeros[k]
            v = (0, t, d // G)
            assert at[2] == contents.v_scales[v] and at[3] == contents.v_zeros[v]


def test_four_bit_pages_take_a_quarter():
    codec = KVCodec()
    assert codec.page_bytes(64, 128) * 3.7 < 2 * 2 * 64 * 128


@pytest.mark.parametrize(
    "name", ["", "k4", "k4v3", "k4v4-", "k4v4-g", "k4v4-g24", "k4v4-chan", "x"]
)
def test_unknown_codecs_are_refused(name):
    with pytest.raises(ValueError, match=r"codec|group"):
        KVCodec.parse(name)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: KVCodec(k_bits=3), "k_bits: expected 2, 4 or 8, got 3"),
        (lambda: KVCodec(k_axis="head"), "k_axis: expected token or channel"),
        (lambda: KVCodec(group=32).groups(80), "multiple of 32, got D=80"),
        (lambda: KVPages(torch.zeros(2, 2, 3, 16, 64)), r"\[P, J, 2, Z, D\]"),
        (lambda: KVPages(torch.zeros(2, 2, 2, 16, 64, dtype=torch.int8)), "float32"),
        (lambda: KV4Pages(torch.zeros(2, 2, 7, dtype=torch.uint8), KVCodec(), 16, 64), "blob"),
        (lambda: KV4Pages.empty(2, 2, 24, 64, KVCodec()), "Z=24"),
        (lambda: KV4Pages.empty(2, 2, 16, 8, KVCodec()), "D=8"),
        (
            lambda: KV4Pages(
                torch.zeros(1, 1, KVCodec(k_axis="channel").page_bytes(16, 64), dtype=torch.uint8),
                KVCodec(k_axis="channel"),
                16,
                64,
            ),
            "k_tail",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
