"""mla: attention over latents, and the coding of what is appended to them."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.formats_kv import MsmBatch
from tessella.formats_mla import MLACache, MLACodec
from tessella.ops import msm
from tessella.ops._register import define, refuse_gradient
from tessella.ref import mla as ref


def mla_decode(
    q_THL: Tensor,
    q_rope_THR: Tensor,
    cache: MLACache,
    batch: MsmBatch,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    plan: Tensor | None = None,
    lse: bool = False,
    max_kv_len: int = 0,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Absorbed attention: queries in the space of latents, which are keys and values at once.

    With q~ = W_UK^T q of each head (DeepSeek-V2, section 2.1.2), over the tokens c that a query
    sees::

        s = scale * (q~ . latent[c] + q_rope . rope[c]);  out = sum softmax(s) latent[c]

    The caller multiplies `out` by each head's W_UV. A latent's scale multiplies its column of s
    and its probability, exactly. Over codes, q~ is quantised to INT8 per row and probabilities per
    row and 256 tokens: within 1e-2 (relative, L2) of exact attention over the same codes. Over
    plain numbers only rounding remains.

    Args:
        q_THL: bf16, fp16 or (CPU) fp32 [T, H, L], unit stride along L; any H up to 128.
        q_rope_THR: [T, H, R] of the same dtype, rotated.
        cache: pages of one codec.
        batch: requests and their masks; current tokens are already in the cache.
        scale: of the scores: (D_nope + R) ** -0.5 of the model, not of L.
        window, softcap, sinks, lse, max_kv_len: as for :func:`msm_attn`.
        plan: from :func:`msm_plan` for this batch, H and J = 1.
        out: [T, H, L] of q's dtype to write to instead of a new tensor.

    Returns:
        [T, H, L] of q's dtype, or (out, lse), lse fp32 [T, H] to base e. A row that sees no token
        is 0, its lse -inf (or the sink).

    Raises:
        RuntimeError: tensors that do not fit each other, a page id, length, mask or plan that is
            out of range: before any work, nothing is written.
    """
    refuse_gradient("mla_decode", q_THL, q_rope_THR)
    shared = msm.batch_args(q_THL, batch, scale, window, softcap, sinks, plan)
    args = (q_THL, q_rope_THR, cache.blob, cache.codec.name, cache.Z, *shared, max_kv_len)
    return msm.call("mla_decode", q_THL, args, lse, out)


def mla_append(
    latent_TL: Tensor,
    rope_TR: Tensor,
    slots: Tensor,
    cache: MLACache,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Code latents, and rope keys after their rotation, into their slots, in one pass.

    Codes of a token x, in fp32, every step rounded once::

        s = fp16(max |x| / qmax);  q = clamp(round_half_even(x * (1 / s)), -qmax, qmax)

    An inf, a NaN or a scale over fp16 gives scale NaN, which spoils whatever sees the token.

    Args:
        latent_TL: bf16, fp16 or fp32 [T, L], unit stride along L.
        rope_TR: [T, R] of the same dtype.
        slots: int64 [T], page * Z + offset. -1 is skipped, and so is any other slot outside the
            cache, which with TESSELLA_DEBUG=1 raises instead.
        cache: pages of one codec.
        rotation: (cos, sin), fp32 [T, R/2] each: pairs (2i, 2i + 1) are rotated, as DeepSeek's
            interleaved rope does. None: they are rotated already.

    Raises:
        RuntimeError: tensors that do not fit each other; nothing is written.
    """
    refuse_gradient("mla_append", latent_TL, rope_TR)
    cos, sin = rotation or (None, None)
    torch.ops.tessella.mla_append(
        latent_TL, rope_TR, slots, cos, sin, cache.codec.name, cache.Z, cache.blob
    )


def _ref_decode(q, q_rope, pages, codec, Z, *rest):
    table, cu_q, kv_len, mask, bits, row, scale, window, softcap, sinks, _, _, lse = rest
    out, sums = ref.mla_decode(
        q,
        q_rope,
        MLACache(pages, MLACodec.parse(codec), Z, q.shape[2], q_rope.shape[2]),
        MsmBatch(table, cu_q, kv_len, mask, bits, row),
        **msm.how(scale, window, softcap, sinks),
    )
    return msm.finish(q, out, sums, lse)


def _ref_decode_out(*args):
    *front, out, lse = args
    got, sums = _ref_decode(*front, True)
    out.copy_(got)
    if lse is not None:
        lse.copy_(sums)


def _ref_append(latent, rope, slots, cos, sin, codec, Z, pages):
    cache = MLACache(pages, MLACodec.parse(codec), Z, latent.shape[1], rope.shape[1])
    ref.mla_append(latent, rope, slots, cache, None if cos is None else (cos, sin))


_DECODE_ARGS = f"Tensor q, Tensor q_rope, Tensor pages, str codec, int Z, {msm.BATCH_ARGS}"
define(
    f"mla_decode({_DECODE_ARGS}, bool lse) -> (Tensor, Tensor)",
    ref=_ref_decode,
    fake=lambda q, *rest: msm.fake_attn(q, rest[-1]),
)
define(
    f"mla_decode_out({_DECODE_ARGS}, Tensor(a!) out, Tensor(b!)? lse) -> ()",
    ref=_ref_decode_out,
    fake=lambda *_: None,
)
define(
    "mla_append(Tensor latent, Tensor rope, Tensor slots, Tensor? cos, Tensor? sin, str codec,"
    " int Z, Tensor(a!) pages) -> ()",
    ref=_ref_append,
    fake=lambda *_: None,
)
