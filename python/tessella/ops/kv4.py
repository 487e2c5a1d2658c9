"""kv4: attention over coded pages (8, 4 and 2 bits), and the coding of what is appended to them."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.formats_kv import KV4Pages, KVCodec, KVFactors, MsmBatch
from tessella.ops import msm
from tessella.ops._register import define, refuse_gradient
from tessella.ref import kv4 as ref


def kv4_attn(
    q_THD: Tensor,
    cache: KV4Pages,
    batch: MsmBatch,
    *,
    factors: KVFactors | None = None,
    rows: Tensor | None = None,
    tail_row: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    plan: Tensor | None = None,
    lse: bool = False,
    max_kv_len: int = 0,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over coded pages; :func:`msm_attn` with keys and values ``(q - z) * s``.

    On CPU, with few query rows, the codes themselves are multiplied: queries are quantised to INT8
    per row, probabilities to INT8 per 64 keys, zeros are folded through sums. With many, blocks are
    decoded. On CUDA codes become fp16 numbers, and queries and probabilities are rounded to fp16.
    Neither rebuilds what `factors` changed: they are applied to queries, scores and totals.

    Args:
        q_THD, batch, scale, window, softcap, sinks, plan, lse, max_kv_len, out: as for
            :func:`msm_attn`.
        cache: blobs [P, J, page_bytes] of one codec.
        factors: k_mean, q_fold and o_fold, of F sequences.
        rows: int32 [B], each request's row of the factors; None: row 0.
        tail_row: int32 [B], each request's row of `cache.k_tail`, for codecs that have one.

    Returns:
        As :func:`msm_attn`.

    Raises:
        RuntimeError: as :func:`msm_attn`; a codec, factor or row that does not fit.
    """
    refuse_gradient("kv4_attn", q_THD)
    f = factors or KVFactors()
    front = (q_THD, cache.blob, cache.codec.name, cache.Z)
    shared = msm.batch_args(q_THD, batch, scale, window, softcap, sinks, plan)
    own = (f.k_mean, f.q_fold, f.o_fold, rows, cache.k_tail, tail_row)
    return msm.call("kv4_attn", q_THD, (*front, *shared, max_kv_len, *own), lse, out)


def kv4_append(
    k_TJD: Tensor,
    v_TJD: Tensor,
    slots: Tensor,
    cache: KV4Pages,
    rope: tuple[Tensor, Tensor] | None = None,
    *,
    factors: KVFactors | None = None,
    rows: Tensor | None = None,
    tail_row: Tensor | None = None,
) -> None:
    """Rotate, code and write keys and values of T tokens into their slots, in one pass.

    A group of channels x with smallest and largest value lo, hi, in fp32, every step rounded once::

        s = fp16((hi - lo) / qmax);  z = fp16(-lo / s);  q = round_half_even(x / s + z)

    A range of at most 2^-10 of the magnitude is stored as a constant; an inf, a NaN or a scale
    over fp16 gives scale NaN, which spoils whatever attends to the token.

    Args:
        k_TJD, v_TJD, slots, rope: as for :func:`msm_append`.
        cache: blobs [P, J, page_bytes].
        factors: k_mean, k_fold and v_fold, applied in this order after the rotation.
        rows: int32 [T], each token's row of the factors; None: row 0.
        tail_row: int32 [T], each token's row of `cache.k_tail`, for codecs that have one: keys wait
            there until their page is full. Tokens of a page come in order.

    Raises:
        RuntimeError: tensors that do not fit each other; nothing is written.
    """
    refuse_gradient("kv4_append", k_TJD, v_TJD)
    f, (cos, sin) = factors or KVFactors(), rope or (None, None)
    front = (k_TJD, v_TJD, slots, cos, sin, cache.codec.name, cache.Z)
    own = (f.k_mean, f.k_fold, f.v_fold, rows)
    torch.ops.tessella.kv4_append(*front, *own, cache.blob, cache.k_tail, tail_row)


def _cache(pages, codec, Z, D, k_tail) -> KV4Pages:
    return KV4Pages(pages, KVCodec.parse(codec), Z, D, k_tail)


def _ref_attn(q, pages, codec, Z, *rest):
    table, cu_q, kv_len, mask, bits, row, scale, window, softcap, sinks, _, _, *own, lse = rest
    k_mean, q_fold, o_fold, rows, k_tail, tail_row = own
    out, sums = ref.kv4_attn(
        q,
        _cache(pages, codec, Z, q.shape[2], k_tail),
        MsmBatch(table, cu_q, kv_len, mask, bits, row),
        factors=KVFactors(k_mean=k_mean, q_fold=q_fold, o_fold=o_fold),
        rows=rows,
        tail_row=tail_row,
        **msm.how(scale, window, softcap, sinks),
    )
    return msm.finish(q, out, sums, lse)


def _ref_attn_out(*args):
    *front, out, lse = args
    got, sums = _ref_attn(*front, True)
    out.copy_(got)
    if lse is not None:
        lse.copy_(sums)


def _ref_append(k, v, slots, cos, sin, codec, Z, k_mean, k_fold, v_fold, rows, pages, tail, row):
    ref.kv4_append(
        k,
        v,
        slots,
        _cache(pages, codec, Z, k.shape[2], tail),
        None if cos is None else (cos, sin),
        KVFactors(k_mean=k_mean, k_fold=k_fold, v_fold=v_fold),
        rows,
        row,
    )


_ATTN_ARGS = (
    f"Tensor q, Tensor pages, str codec, int Z, {msm.BATCH_ARGS}, Tensor? k_mean, Tensor? q_fold,"
    " Tensor? o_fold, Tensor? rows, Tensor? k_tail, Tensor? tail_row"
)
define(
    f"kv4_attn({_ATTN_ARGS}, bool lse) -> (Tensor, Tensor)",
    ref=_ref_attn,
    fake=lambda q, *rest: msm.fake_attn(q, rest[-1]),
)
define(
    f"kv4_attn_out({_ATTN_ARGS}, Tensor(a!) out, Tensor(b!)? lse) -> ()",
    ref=_ref_attn_out,
    fake=lambda *_: None,
)
define(
    "kv4_append(Tensor k, Tensor v, Tensor slots, Tensor? cos, Tensor? sin, str codec, int Z,"
    " Tensor? k_mean, Tensor? k_fold, Tensor? v_fold, Tensor? rows, Tensor(a!) pages,"
    " Tensor(b!)? k_tail, Tensor? tail_row) -> ()",
    ref=_ref_append,
    fake=lambda *_: None,
)
