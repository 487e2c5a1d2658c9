"""Pack and unpack every format in plain torch, written from the comments of csrc/layout/*.h.

Nothing here shares code with the C++ layouts: tests/test_layout.py compares the two index by
index, so neither can drift without the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.formats import BLOCK_K, W4Weight, group_size, padded_k

PANEL_N = 64  # out features of one panel of the CPU layout
STEP_K = 8  # channels of one 256-byte step of a panel


def pack_nibbles(q: Tensor) -> Tensor:
    """Codes [..., K] (values 0..15) -> bytes [..., K/2], even channel in the low nibble."""
    q = q.to(torch.uint8)
    return q[..., 0::2] | (q[..., 1::2] << 4)


def unpack_nibbles(b: Tensor) -> Tensor:
    """Bytes [..., K/2] -> codes uint8 [..., K]."""
    return torch.stack([b & 15, b >> 4], -1).flatten(-2)


def unpack_signed_nibbles(b: Tensor) -> Tensor:
    """Bytes [..., K/2] of two's-complement nibbles -> codes int8 [..., K] in -8..7."""
    q = unpack_nibbles(b).to(torch.int8)
    return torch.where(q > 7, q - 16, q)


def w4_cpu_bytes(scheme: str, N: int, K: int) -> int:
    """Bytes of an [N, K] weight in the CPU panel layout, and in the CUDA one too."""
    return -(-N // PANEL_N) * (padded_k(K) // BLOCK_K * _block_bytes(scheme) + _tail(scheme))


def _group_rows(scheme: str) -> int:
    """Rows of group scales that one 128-channel block of a panel carries."""
    return 0 if scheme == "channel" else BLOCK_K // group_size(scheme, BLOCK_K)


def _block_bytes(scheme: str) -> int:
    scale_bytes = 1 if scheme == "twolevel" else 2
    return PANEL_N * BLOCK_K // 2 + _group_rows(scheme) * PANEL_N * (scale_bytes + 1)


def _tail(scheme: str) -> int:
    return {"channel": PANEL_N * 5, "twolevel": PANEL_N * 4}.get(scheme, 0)


def _rows(t: Tensor, panels: int) -> Tensor:
    """[N, ...] -> [panels, 64, ...], missing rows zero."""
    pad = panels * PANEL_N - t.shape[0]
    if pad:
        t = torch.cat([t, t.new_zeros(pad, *t.shape[1:])])
    return t.reshape(panels, PANEL_N, *t.shape[1:])


def _bytes(t: Tensor) -> Tensor:
    """Any contiguous tensor [panels, blocks, ...] -> its bytes [panels, blocks, bytes]."""
    return t.contiguous().flatten(2).view(torch.uint8)


def w4_pack_cpu(w: W4Weight) -> Tensor:
    """Canonical weight -> uint8 blob in the panel layout of csrc/layout/w4.h."""
    panels, blocks = -(-w.N // PANEL_N), padded_k(w.K) // BLOCK_K
    q = _rows(unpack_nibbles(w.codes), panels)  # [panels, n, Kp]
    q = q.view(panels, PANEL_N, blocks, BLOCK_K // STEP_K, 2, 4)  # block, step, half, k % 4
    q = q.permute(0, 2, 3, 1, 5, 4).contiguous()  # panels, block, step, n, k % 4, half
    parts = [_bytes(q[..., 0] | (q[..., 1] << 4))]
    for t in (w.group_scales, w.zeros) if w.scheme != "channel" else ():
        rows = _rows(t, panels).view(panels, PANEL_N, blocks, -1)
        parts.append(_bytes(rows.permute(0, 2, 3, 1)))
    body = torch.cat(parts, 2).flatten(1)
    tail = [_rows(w.channel_scales, panels).view(torch.uint8).flatten(1)] if _tail(w.scheme) else []
    if w.scheme == "channel":
        tail.append(_rows(w.zeros, panels))
    return torch.cat([body, *tail], 1).flatten()


def w4_unpack_cpu(blob: Tensor, scheme: str, N: int, K: int) -> W4Weight:
    """The inverse of :func:`w4_pack_cpu`."""
    panels, blocks = -(-N // PANEL_N), padded_k(K) // BLOCK_K
    rows, body_bytes = _group_rows(scheme), blocks * _block_bytes(scheme)
    blob = blob.view(panels, -1)
    body = blob[:, :body_bytes].view(panels, blocks, -1)

    def take(lo: int, hi: int, dtype: torch.dtype) -> Tensor:  # bytes lo..hi of each block
        t = body[:, :, lo:hi].contiguous().view(dtype).view(panels, blocks, rows, PANEL_N)
        return t.permute(0, 3, 1, 2).reshape(panels * PANEL_N, blocks * rows)[:N].contiguous()

    nq = PANEL_N * BLOCK_K // 2
    b = body[:, :, :nq].reshape(panels, blocks, BLOCK_K // STEP_K, PANEL_N, 4)
    q = torch.stack([b & 15, b >> 4], -1).permute(0, 3, 1, 2, 5, 4)
    codes = pack_nibbles(q.reshape(panels * PANEL_N, blocks * BLOCK_K)[:N])
    channel_scales = group_scales = None
    tail = blob[:, body_bytes:]
    if _tail(scheme):
        s = tail[:, : PANEL_N * 4].contiguous().view(torch.float32)
        channel_scales = s.flatten()[:N].clone()
    if scheme == "channel":
        zeros = tail[:, PANEL_N * 4 :].flatten()[:N].clone()
    else:
        two = scheme == "twolevel"
        mid = nq + rows * PANEL_N * (1 if two else 2)
        group_scales = take(nq, mid, torch.uint8 if two else torch.float16)
        zeros = take(mid, mid + rows * PANEL_N, torch.uint8)
    return W4Weight(codes, channel_scales, group_scales, zeros, scheme, K)


def _fragment_index() -> Tensor:
    """[4096, 2] of the CUDA layout's code bytes: (feature, channel) of each low nibble.

    The high nibble is the same feature's code 16 channels on.
    """
    at = torch.arange(PANEL_N * BLOCK_K // 2)
    row, thread, word, byte = at // 2048, at // 16 % 128, at // 4 % 4, at % 4
    warp, r, c = thread // 32, thread % 32 // 4, thread % 4
    n = 16 * warp + r + 8 * (word % 2)
    k = 32 * (2 * row + word // 2) + 4 * c + byte
    return torch.stack([n, k], 1)


def _pair_order() -> Tensor:
    """The features of a panel in the order r, r + 8 of each r of each 16-feature slice."""
    return torch.arange(PANEL_N).view(4, 2, 8).transpose(1, 2).flatten()


def w4_pack_cuda(w: W4Weight) -> Tensor:
    """Canonical weight -> uint8 blob in the fragment layout of csrc/layout/w4_frag.h."""
    panels, blocks = -(-w.N // PANEL_N), padded_k(w.K) // BLOCK_K
    n, k = _fragment_index().to(w.codes.device).unbind(1)
    q = _rows(unpack_nibbles(w.codes), panels)
    q = q.view(panels, PANEL_N, blocks, BLOCK_K).transpose(1, 2)  # panel, block, n, k
    parts = [q[:, :, n, k] | (q[:, :, n, k + 16] << 4)]
    if w.scheme != "channel":
        order = _pair_order().to(w.codes.device)
        scales, zeros = (
            _rows(t, panels).view(panels, PANEL_N, blocks, -1).permute(0, 2, 3, 1)[..., order]
            for t in (w.group_scales, w.zeros)
        )
        if w.scheme == "twolevel":
            parts.append(_bytes(torch.stack([scales, zeros], -1)))
        else:
            parts += [_bytes(scales), _bytes(zeros)]
    body = torch.cat(parts, 2).flatten(1)
    tail = [_rows(w.channel_scales, panels).view(torch.uint8).flatten(1)] if _tail(w.scheme) else []
    if w.scheme == "channel":
        tail.append(_rows(w.zeros, panels))
    return torch.cat([body, *tail], 1).flatten()


def w4_widen_cuda(w: W4Weight) -> Tensor:
    """Two-level weight -> uint8 blob of the bytes q * s1 + a that its products are made of.

    In the order of wgmma's fragment registers, which no decoding makes: a panel's block of 128
    channels is 4 rows of 32 channels; in a row thread 32 warp + 4 r + c owns 16 bytes, register
    2 i + h of which has feature 16 warp + r + 8 h and channels 16 i + 4 c..+3. The panel's 64
    channel scales follow its blocks. This is for measuring what decoding costs; nothing stores it.

    Raises:
        ValueError: another scheme.
    """
    if w.scheme != "twolevel":
        raise ValueError(f"w4_widen_cuda: scheme: expected twolevel, got {w.scheme}")
    panels, blocks = -(-w.N // PANEL_N), padded_k(w.K) // BLOCK_K
    q = _rows(unpack_nibbles(w.codes), panels).view(panels, PANEL_N, blocks, BLOCK_K)
    s1, a = (_rows(t, panels).view(panels, PANEL_N, blocks, 1) for t in (w.group_scales, w.zeros))
    # panel, (warp, h, r), block, (row, i, c, byte) -> panel, block, row, warp, r, c, i, h, byte
    byte = (q * s1 + a).view(panels, 4, 2, 8, blocks, 4, 2, 4, 4)
    body = byte.permute(0, 4, 5, 1, 3, 7, 6, 2, 8).flatten(1)
    tail = _rows(w.channel_scales, panels).view(torch.uint8).flatten(1)
    return torch.cat([body, tail], 1).flatten()
