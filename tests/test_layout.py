"""The packed layouts: independent Python against C++, index by index, and round trips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessella import _native, layout, ops
from tessella.formats import SCHEMES, W4Weight, padded_k
from tessella.ref.act_quant import act_quant
from tessella.testing.cases import random_weight

needs_c = pytest.mark.skipif(_native._C is None, reason="needs the compiled _C module")


def mark(w: W4Weight, field: str, index: tuple[int, ...], value: int) -> torch.Tensor:
    """The packed bytes of a weight that is zero but for one stored value."""
    fields = {f: torch.zeros_like(t) for f, t in w.tensors().items()}

    fields[field][index] = value
    one = W4Weight(
        fields["codes"],
        fields.get("channel_scales"),
        fields.get("group_scales"),
        fields["zeros"],
        w.scheme,
        w.K,
    )
    return layout.w4_pack_cpu(one)


@needs_c
@pytest.mark.parametrize("scheme", SCHEMES)
def test_python_and_cpp_agree_on_every_slot(scheme, rng):
    """Codes, group scales, zeros and channel scales of an [70, 200] weight."""
    N, K = 70, 200
    w = random_weight(scheme, N, K, rng)
    Kp = padded_k(K)
    assert layout.w4_cpu_bytes(scheme, N, K) == _native._C.w4_bytes(scheme, N, K)
    # every code gets a distinct path: pack codes whose value encodes its index digit by digit
    index = torch.arange(N * Kp).view(N, Kp)
    slots = [_native._C.w4_code_slot(scheme, N, K, n, k) for n in range(N) for k in range(Kp)]
    byte = torch.tensor([s[0] for s in slots])
    shift = torch.tensor([s[1] for s in slots])
    for digit in range(0, 16, 4):
        fields = {f: torch.zeros_like(t) for f, t in w.tensors().items()}
        fields["codes"] = layout.pack_nibbles((index >> digit) & 15)
        blob = layout.w4_pack_cpu(
            W4Weight(
                fields["codes"],
                fields.get("channel_scales"),
                fields.get("group_scales"),
                fields["zeros"],
                scheme,
                K,
            )
        )
        assert torch.equal((blob[byte].long() >> shift) & 15, (index.flatten() >> digit) & 15)
    for n in (0, 1, 63, 64, N - 1):
        if scheme != "channel":
            for g in range(w.zeros.shape[1]):
                scale, zero = _native._C.w4_group_slots(scheme, N, K, n, g)
                assert mark(w, "zeros", (n, g), 9).nonzero().flatten().tolist() == [zero]
                hit = mark(w, "group_scales", (n, g), 1).nonzero().flatten().tolist()
                width = 1 if scheme == "twolevel" else 2
                assert hit and scale <= min(hit) and max(hit) < scale + width
        if scheme in ("channel", "twolevel"):
            scale, zero = _native._C.w4_channel_slots(scheme, N, K, n)
            hit = mark(w, "channel_scales", (n,), 1).nonzero().flatten().tolist()
            assert hit and scale <= min(hit) and max(hit) < scale + 4
            if scheme == "channel":
                assert mark(w, "zeros", (n,), 9).nonzero().flatten().tolist() == [zero]


@needs_c
@pytest.mark.parametrize("scheme", SCHEMES)
def test_python_and_cpp_agree_on_every_fragment_slot(scheme, rng):
    """The CUDA order of codes, group scales and zeros of a [70, 200] weight."""
    N, K = 70, 200
    w = random_weight(scheme, N, K, rng)
    blob, q = layout.w4_pack_cuda(w), layout.unpack_nibbles(w.codes)
    assert blob.numel() == _native._C.w4_bytes(scheme, N, K)
    slots = [
        [_native._C.w4_frag_code_slot(scheme, N, K, n, k) for k in range(256)] for n in range(N)
    ]
    byte, shift = torch.tensor(slots).unbind(2)
    assert torch.equal((blob[byte].long() >> shift) & 15, q.long())
    for n in range(N):
        for g in range(w.zeros.shape[1]) if scheme != "channel" else ():
            scale, zero = _native._C.w4_frag_group_slots(scheme, N, K, n, g)
            got = (
                blob[scale : scale + w.group_scales.element_size()]
                .clone()
                .view(w.group_scales.dtype)
            )
            assert got == w.group_scales[n, g] and blob[zero] == w.zeros[n, g]
        if w.channel_scales is not None:
            scale, zero = _native._C.w4_channel_slots(scheme, N, K, n)
            assert blob[scale : scale + 4].clone().view(torch.float32) == w.channel_scales[n]
            assert scheme != "channel" or blob[zero] == w.zeros[n]


@needs_c
def test_act_slots(rng):
    """Every activation code sits where layout/act.h says."""
    M, K, K8 = 3, 300, 128
    x = torch.randn(M, K, generator=rng)
    a = act_quant(x, K8, "class")
    flat8, flat4 = a.codes8.flatten(), a.codes4.flatten()
    from tessella.ref.w4ax_gemm import act_codes

    codes = act_codes(a)
    for m in range(M):
        for k in range(a.Kp):
            byte, shift = _native._C.act_code_slot(M, K, K8, m, k)
            if k < K8:
                got = int(flat8[byte])
            else:
                got = (int(flat4[byte]) >> shift) & 15
                got -= 16 if got > 7 else 0
            assert got == int(codes[m, k])


@given(
    scheme=st.sampled_from(list(SCHEMES)),
    N=st.integers(1, 150),
    K=st.integers(1, 400),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_packing_is_bijective(scheme, N, K, seed):
    """The op packs to the bytes that plain Python gives, and both unpack to the same weight."""
    w = random_weight(scheme, N, K, torch.Generator().manual_seed(seed))
    packed = ops.w4_pack(w)
    assert torch.equal(packed.blob, layout.w4_pack_cpu(w))
    for back in (ops.w4_unpack(packed), layout.w4_unpack_cpu(packed.blob, scheme, N, K)):
        assert back.tensors().keys() == w.tensors().keys()
        for name, t in w.tensors().items():
            assert torch.equal(back.tensors()[name], t), name


def test_golden_bytes():
    """The layout is part of no checkpoint, but a silent change of it is a bug all the same."""
    K = 128
    codes = layout.pack_nibbles(torch.arange(K).repeat(1, 1) % 16)
    w = W4Weight(
        codes, torch.tensor([2.0]), None, torch.tensor([5], dtype=torch.uint8), "channel", K
    )
    blob = layout.w4_pack_cpu(w)
    assert blob[:4].tolist() == [0x40, 0x51, 0x62, 0x73]  # channels 0|4, 1|5, 2|6, 3|7
    assert blob[256:260].tolist() == [0xC8, 0xD9, 0xEA, 0xFB]  # next step of 8 channels
    assert blob[4096:4100].view(torch.float32).item() == 2.0
    assert int(blob[4096 + 256]) == 5
    assert blob.numel() == 4096 + 320 and int((blob != 0).sum()) == 64 + 1 + 1
