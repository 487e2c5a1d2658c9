"""The ops: one file per family with schema, wrapper, fake kernel and documentation."""

from tessella.ops.act_quant import act_quant, rms_norm_quant, silu_mul_quant
from tessella.ops.kv4 import kv4_append, kv4_attn
from tessella.ops.mla import mla_append, mla_decode
from tessella.ops.msm import msm_append, msm_attn, msm_plan
from tessella.ops.w4ax_gemm import w4_pack, w4_unpack, w4ax_gemm, w4ax_grouped, w4ax_linear

__all__ = [
    "act_quant",
    "kv4_append",
    "kv4_attn",
    "mla_append",
    "mla_decode",
    "msm_append",
    "msm_attn",
    "msm_plan",
    "rms_norm_quant",
    "silu_mul_quant",
    "w4_pack",
    "w4_unpack",
    "w4ax_gemm",
    "w4ax_grouped",
    "w4ax_linear",
]
