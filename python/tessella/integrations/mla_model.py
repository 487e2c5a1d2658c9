"""Causal language models with latent attention, as transformers runs them.

:class:`MLAAttention` is the differentiable, expanded form: it makes every head's keys and values
from the latents and hands them to transformers' attention interface and cache. A cache that keeps
latents instead takes over by having layers with a method ``attend_latent`` (:func:`latent_layer`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from tessella.integrations.mla_config import MLAConfig
from tessella.mla.attend import rotate_pairs


def latent_layer(cache: Cache | None, index: int) -> Any | None:
    """The layer of a cache that keeps latents, or None for caches of keys and values.

    Such a layer has ``attend_latent(attention, q_nope, q_rope, latent, k_rope, mask)`` with
    q_nope [B, H, S, D], q_rope [B, H, S, R] (rotated), latent [B, S, L], k_rope [B, S, R] (rotated)
    of the new tokens, and the mask that the attention interface would get. It appends them and
    returns [B, S, H, E]. `attention` is the :class:`MLAAttention` (for ``kv_b_proj``, ``scaling``,
    ``expand`` and the layer's index).
    """
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    return layer if hasattr(layer, "attend_latent") else None


class MLAAttention(nn.Module):
    """Latent attention of one layer, expanded.

    Weights, rows by columns: ``q_proj`` [H * (D + R), hidden], each head's D, then R; or
    ``q_a_proj``, ``q_a_layernorm``, ``q_b_proj`` with a low rank; ``kv_a_proj_with_mqa``
    [L + R, hidden], the latent, then the rope key; ``kv_b_proj`` [H * (D + E), L], each head's D
    key rows, then E value rows; ``o_proj`` [hidden, H * E].
    """

    def __init__(self, config: MLAConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads = H = config.num_attention_heads
        self.qk_nope_head_dim, self.qk_rope_head_dim = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
        )
        self.v_head_dim, self.kv_lora_rank = config.v_head_dim, config.rank(layer_idx)
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.scaling = self.qk_head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.num_key_value_groups = 1
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

        hidden, bias, rank = config.hidden_size, config.attention_bias, self.kv_lora_rank
        eps, normed = config.rms_norm_eps, config.qk_latent_layernorm
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, H * self.qk_head_dim, bias=bias)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = LlamaRMSNorm(config.q_lora_rank, eps) if normed else nn.Identity()
            self.q_b_proj = nn.Linear(config.q_lora_rank, H * self.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, rank + self.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = LlamaRMSNorm(rank, eps) if normed else nn.Identity()
        up = H * (self.qk_nope_head_dim + self.v_head_dim)
        self.kv_b_proj = nn.Linear(rank, up, bias=False)
        self.o_proj = nn.Linear(H * self.v_head_dim, hidden, bias=config.attention_output_bias)

    def project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q_nope [B, H, S, D], q_rope [B, H, S, R], latent [B, S, L], k_rope [B, S, R], rotated.

        `hidden_states` is [B, S, hidden]; `position_embeddings` cos and sin [B, S, R], of which the
        first half is read. The latent is normalised where the model does that.
        """
        B, S, _ = hidden_states.shape
        cos, sin = position_embeddings
        if self.config.q_lora_rank is None:
            q = self.q_proj(hidden_states)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        q = q.view(B, S, self.num_heads, self.qk_head_dim).transpose(1, 2)
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        kv = self.kv_a_proj_with_mqa(hidden_states)
        latent, k_rope = kv.split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        q_rope = rotate_pairs(q_rope, cos[:, None], sin[:, None])
        return q_nope, q_rope, self.kv_a_layernorm(latent), rotate_pairs(k_rope, cos, sin)

    def expand(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, H, T, D + R] and values [B, H, T, E] of latents [B, T, L] and rope keys."""
        B, T, _ = latent.shape
        up = self.kv_b_proj(latent).view(B, T, self.num_heads, -1).transpose(1, 2)
        keys, values = up.split([self.qk_nope_head_dim, self.v_head_dim], -1)
        shared = k_rope[:, None].expand(-1, self.num_heads, -1, -1)
        return torch.cat((keys, shared), -1), values

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """([B, S, hidden], weights of the attention where its implementation gives them)."""
        q_nope, q_rope, latent, k_rope = self.project(hidden_states, position_embeddings)
        weights = None
        if (layer := latent_layer(past_key_values, self.layer_idx)) is not None:
            out = layer.attend_latent(self, q_nope, q_rope, latent, k_rope, attention_mask)
        else:
            keys, values = self.expand(latent, k_rope)
            if past_key_values is not None:
                keys, values = past_key_values.update(keys, values, self.layer_idx)
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, sdpa_attention_forward
            )
            fused = self.config._attn_implementation in ("sdpa", "tessella")  # which calls sdpa
            if hidden_states.shape[1] > 1 and fused:
                # torch's fused kernels want values as wide as keys; without them T x T scores
                values = nn.functional.pad(values, (0, max(0, self.qk_head_dim - self.v_head_dim)))
            out, weights = attention(
                self,
                torch.cat((q_nope, q_rope), -1),
                keys,
                values,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                sliding_window=self.sliding_window,
                **kwargs,
            )
            out = out[..., : self.v_head_dim]
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class MLADecoderLayer(GradientCheckpointingLayer):
    """Norm, latent attention, norm, gated MLP, with two residuals."""

    def __init__(self, config: MLAConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MLAAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """[B, S, hidden] -> [B, S, hidden]; `kwargs` go to the attention."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MLAPreTrainedModel(PreTrainedModel):
    """What transformers wants to know about these models."""

    config_class = MLAConfig
    config: MLAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MLADecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_attention_backend = True


class MLAModel(MLAPreTrainedModel):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: MLAConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layers = (MLADecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """As every model of transformers: ids or embeddings in, last hidden state and cache out."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("tessella_mla: expected either input_ids or inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        masks = {
            kind: make(
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            for kind, make in _MASKS.items()
            if kind in self.config.layer_types
        }
        position_embeddings = self.rotary_emb(hidden, position_ids=position_ids)
        for layer, kind in zip(self.layers, self.config.layer_types):
            hidden = layer(
                hidden,
                attention_mask=masks[kind],
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values
        )


_MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


class TessellaMLAForCausalLM(MLAPreTrainedModel, GenerationMixin):
    """A language model with latent attention; its name is what config.json's architectures say."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MLAConfig):
        super().__init__(config)
        self.model = MLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V] (of the last `logits_to_keep` tokens, 0: of all), and the loss."""
        loss_args = {k: kwargs.pop(k) for k in ("num_items_in_batch",) if k in kwargs}
        out = self.model(input_ids=input_ids, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **loss_args)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)


AutoModel.register(MLAConfig, MLAModel, exist_ok=True)
AutoModelForCausalLM.register(MLAConfig, TessellaMLAForCausalLM, exist_ok=True)
