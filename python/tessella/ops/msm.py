"""msm: attention over paged keys and values (matmul - softmax - matmul), plans and append."""

from __future__ import annotations

import torch
from torch import Tensor

from tessella.formats_kv import KVPages, MsmBatch
from tessella.ops._register import define, refuse_gradient
from tessella.ref import msm as ref


def msm_plan(
    batch: MsmBatch, H: int, J: int, *, window: int = 0, units: int = 0, split: int = 0
) -> Tensor:
    """The table of tasks for a batch: int32 [words], on the CPU, good for every layer.

    Tiles of 16, 32, 64 or 128 packed rows (tokens times H / J), longest first; keys are split where
    there are fewer tasks than workers (XY-Serve, ASPLOS 2026, section 4). csrc/msm/plan.h has the
    format, which is the same for every device.

    Args:
        batch: only cu_q, kv_len and mask are read; they lie on the CPU.
        H, J: query heads and kv heads.
        window: keys that a token of a "window" request sees, itself included.
        units: workers to keep busy; 0: torch's threads.
        split: 0: chosen here. A multiple of 256: keys are cut at its multiples, so that a
            request's result does not depend on its neighbours.

    Raises:
        RuntimeError: lengths or masks that make no sense, naming the argument and the request.
    """
    return torch.ops.tessella.msm_plan(
        batch.cu_q, batch.kv_len, batch.mask, H, J, window, units, split
    )


def msm_attn(
    q_THD: Tensor,
    cache: KVPages,
    batch: MsmBatch,
    *,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    plan: Tensor | None = None,
    lse: bool = False,
    max_kv_len: int = 0,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of ragged queries over paged keys and values: prefill, decode, trees in one call.

    Token i of a request is at position kv_len - q_len + i. With s = scale * q.k, or
    softcap * tanh(s / softcap), over the keys that its mask lets it see::

        lse = log(sum exp(s) + exp(sink));  out = sum exp(s - lse) v

    Args:
        q_THD: bf16, fp16 or (CPU) fp32 [T, H, D], unit stride along D.
        cache: pages [P, J, 2, Z, D]; H is a multiple of J, D a multiple of 16 up to 256, Z a
            multiple of 16 up to 256.
        batch: requests and their masks; current tokens are already in the cache.
        scale: of the scores; D ** -0.5 if None.
        window: keys that a token of a "window" request sees, itself included.
        softcap: 0 for none.
        sinks: fp32 [H], a logit of each head that takes part in the sum only.
        plan: from :func:`msm_plan` for this batch, H and J; None: made from max_kv_len. On CUDA it
            lies in the GPU's memory, as lengths and pages do, with any room behind it; nothing of
            that is read on the host, so a captured call takes new contents of the same tensors,
            and what would be refused on the CPU is undefined but for a plan of another batch,
            which stops the kernel (with TESSELLA_DEBUG=1 a page outside the cache does too).
        lse: return (out, lse), lse fp32 [T, H] to base e: partial attentions can be merged.
        max_kv_len: upper bound of kv_len, 0 if unknown.
        out: [T, H, D] of q's dtype to write to instead of a new tensor.

    Returns:
        [T, H, D] of q's dtype. A row that sees no key is 0, its lse -inf (or the sink).

    Raises:
        RuntimeError: tensors that do not fit each other, a page id, length, mask or plan that is
            out of range, a tree wider than its bits: before any work, nothing is written.
    """
    refuse_gradient("msm_attn", q_THD, cache.pages)
    args = (q_THD, cache.pages, *batch_args(q_THD, batch, scale, window, softcap, sinks, plan))
    return call("msm_attn", q_THD, (*args, max_kv_len), lse, out)


def batch_args(q_THD, batch, scale, window, softcap, sinks, plan) -> tuple:
    """The arguments that all attention ops share, in the order of their schemas."""
    b, scale = batch, q_THD.shape[-1] ** -0.5 if scale is None else scale
    lengths = (b.block_table, b.cu_q, b.kv_len, b.mask, b.tree_bits, b.tree_row)
    return (*lengths, scale, window, softcap, sinks, plan)


def call(op: str, q_THD: Tensor, args: tuple, lse: bool, out: Tensor | None):
    """Run an attention op or its out variant; out, or (out, lse)."""
    if out is None:
        o, sums = getattr(torch.ops.tessella, op)(*args, lse)
    else:
        o, sums = out, q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32) if lse else None
        getattr(torch.ops.tessella, f"{op}_out")(*args, out, sums)
    return (o, sums) if lse else o


def msm_append(
    k_TJD: Tensor,
    v_TJD: Tensor,
    slots: Tensor,
    cache: KVPages,
    rope: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write keys, rotated, and values of T tokens into their slots.

    Args:
        k_TJD, v_TJD: bf16, fp16 or fp32 [T, J, D], unit stride along D.
        slots: int64 [T], page * Z + offset. -1 is skipped, and so is any other slot outside the
            cache, which with TESSELLA_DEBUG=1 raises instead.
        cache: pages of any float dtype.
        rope: (cos, sin), fp32 [T, R/2] each: channels i and i + R/2 of a key are rotated (RoFormer,
            section 3.2.2, by halves); channels from R on are not. None: keys are rotated already.

    Raises:
        RuntimeError: tensors that do not fit each other; nothing is written.
    """
    refuse_gradient("msm_append", k_TJD, v_TJD)
    cos, sin = rope or (None, None)
    torch.ops.tessella.msm_append(k_TJD, v_TJD, slots, cos, sin, cache.pages)


def how(scale, window, softcap, sinks) -> dict:
    """Keyword arguments of the reference."""
    return {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}


def finish(q: Tensor, out: Tensor, sums: Tensor, lse: bool) -> tuple[Tensor, Tensor]:
    """The reference's fp64 results as the op returns them."""
    return out.to(q.dtype), sums.float() if lse else q.new_empty(
        (0, q.shape[1]), dtype=torch.float32
    )


def fake_attn(q: Tensor, lse: bool) -> tuple[Tensor, Tensor]:
    """Shapes of an attention's results."""
    shape = (q.shape[0] if lse else 0, q.shape[1])
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        shape, dtype=torch.float32
    )


def _ref_plan(cu_q, kv_len, mask, H, J, window, units, split):
    return ref.plan(MsmBatch(cu_q.new_empty((len(kv_len), 0)), cu_q, kv_len, mask), H, J, window)


def _fake_plan(cu_q, kv_len, mask, H, J, window, units, split):
    words = torch.library.get_ctx().new_dynamic_size()
    return kv_len.new_empty(words)


def _ref_attn(q, pages, table, cu_q, kv_len, mask, bits, row, scale, window, softcap, sinks, *rest):
    batch = MsmBatch(table, cu_q, kv_len, mask, bits, row)
    out, sums = ref.msm_attn(q, pages, batch, **how(scale, window, softcap, sinks))
    return finish(q, out, sums, rest[-1])


def _ref_attn_out(*args):
    *front, out, lse = args
    got, sums = _ref_attn(*front, True)
    out.copy_(got)
    if lse is not None:
        lse.copy_(sums)


def _ref_append(k, v, slots, cos, sin, pages):
    ref.msm_append(k, v, slots, pages, cos, sin)


define(
    "msm_plan(Tensor cu_q, Tensor kv_len, Tensor? mask, int H, int J, int window, int units,"
    " int split) -> Tensor",
    ref=_ref_plan,
    fake=_fake_plan,
)
BATCH_ARGS = (
    "Tensor block_table, Tensor cu_q, Tensor kv_len, Tensor? mask, Tensor? tree_bits,"
    " Tensor? tree_row, float scale, int window, float softcap, Tensor? sinks, Tensor? plan,"
    " int max_kv_len"
)
"""Arguments of every attention op, after its queries and its cache."""
define(
    f"msm_attn(Tensor q, Tensor pages, {BATCH_ARGS}, bool lse) -> (Tensor, Tensor)",
    ref=_ref_attn,
    fake=lambda q, *rest: fake_attn(q, rest[-1]),
)
define(
    f"msm_attn_out(Tensor q, Tensor pages, {BATCH_ARGS}, Tensor(a!) out, Tensor(b!)? lse) -> ()",
    ref=_ref_attn_out,
    fake=lambda *_: None,
)
define(
    "msm_append(Tensor k, Tensor v, Tensor slots, Tensor? cos, Tensor? sin, Tensor(a!) pages)"
    " -> ()",
    ref=_ref_append,
    fake=lambda *_: None,
)
