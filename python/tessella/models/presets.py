"""Names of the modules and tensors of each supported architecture."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tessella.models.errors import CheckpointError

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QKVO = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_KV_LATENT = ("self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.o_proj")
_Q_LATENT = ("self_attn.q_a_proj", "self_attn.q_b_proj")
MLA = "TessellaMLAForCausalLM"
"""Name of the architecture with latent attention (:mod:`tessella.integrations.mla_model`)."""


@dataclass(frozen=True)
class Architecture:
    """Where a decoder-only model keeps what. Names in a layer are relative to ``layer(i)``.

    `biases` says which linears have one: True, or the config field that decides.
    """

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    linears: tuple[str, ...] = _QKVO + _MLP
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    biases: dict[str, bool | str] = field(default_factory=dict)

    def layer(self, i: int) -> str:
        """Module name of decoder layer i."""
        return f"{self.layers}.{i}"

    def layer_tensors(self, config: dict[str, Any]) -> list[str]:
        """Tensors that every layer of a model with this config must have."""
        biased = [n for n, b in self.biases.items() if (config.get(b) if isinstance(b, str) else b)]
        weights = [f"{name}.weight" for name in self.linears + self.norms]
        return weights + [f"{name}.bias" for name in biased]


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        biases={**dict.fromkeys(_QKVO, "attention_bias"), **dict.fromkeys(_MLP, "mlp_bias")}
    ),
    "MistralForCausalLM": Architecture(),
    "Qwen2ForCausalLM": Architecture(biases=dict.fromkeys(_QKV, True)),
    "Qwen3ForCausalLM": Architecture(
        norms=(*Architecture().norms, "self_attn.q_norm", "self_attn.k_norm"),
        biases=dict.fromkeys(_QKVO, "attention_bias"),
    ),
    MLA: Architecture(
        linears=("self_attn.q_proj", *_KV_LATENT, *_MLP),
        biases={
            **dict.fromkeys(("self_attn.q_proj", _KV_LATENT[0]), "attention_bias"),
            "self_attn.o_proj": "attention_output_bias",
            **dict.fromkeys(_MLP, "mlp_bias"),
        },
    ),
}
"""Supported architectures by the name in config.json's `architectures`."""


def architecture(config: dict[str, Any], file: str) -> Architecture:
    """The entry for a config read from `file`. Raises CheckpointError on an unsupported one."""
    names = config.get("architectures") or [None]
    if names[0] not in ARCHITECTURES:
        raise CheckpointError(
            f"{file}: architectures: expected one of {', '.join(ARCHITECTURES)}, got {names[0]!r}"
        )
    arch = ARCHITECTURES[names[0]]
    return _latent(arch, config) if names[0] == MLA else arch


def _latent(arch: Architecture, config: dict[str, Any]) -> Architecture:
    """The latent architecture with what its config adds: norms, queries of low rank."""
    low, normed = config.get("q_lora_rank") is not None, config.get("qk_latent_layernorm")
    if low:
        biases = {"self_attn.q_a_proj": "attention_bias", **arch.biases}
        del biases["self_attn.q_proj"]
        arch = replace(arch, linears=(*_Q_LATENT, *arch.linears[1:]), biases=biases)
    if normed:
        norms = ("self_attn.q_a_layernorm",) * low + ("self_attn.kv_a_layernorm",)
        arch = replace(arch, norms=(*arch.norms, *norms))
    return arch
