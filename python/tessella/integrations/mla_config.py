"""``model_type: tessella_mla``: the configuration of models with latent attention.

Named as DeepSeek's fields where they mean the same. The type is our own because the meaning is
not: converted models have no norm on the latent (``qk_latent_layernorm: false``) and may have
biases, which code for DeepSeek's models would ignore without a word.
"""

from __future__ import annotations

import importlib
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

MODEL_TYPE = "tessella_mla"


class MLAConfig(PreTrainedConfig):
    """A decoder with latent attention in every layer: RMS norms, gated MLP, rotary positions.

    Attributes that are not those of Llama:
        kv_lora_rank: L, numbers of a token's latent; the largest of all layers.
        layer_kv_lora_ranks: L of each layer, where they differ.
        qk_rope_head_dim: R, width of the rope key that all heads share, and of the table of
            angles; channels (2i, 2i + 1) are a pair.
        qk_nope_head_dim, v_head_dim: D and E, width of a head's other key channels and values.
        q_lora_rank: rank of the queries' projection; None: one full matrix.
        qk_latent_layernorm: an RMS norm on the latent (and on the queries' one), as in DeepSeek.
        attention_bias: of q_proj (or q_a_proj) and kv_a_proj_with_mqa.
        attention_output_bias: of o_proj.
        sliding_window, layer_types: as in Qwen2.
        conversion: how the model was converted (folds, calibration...), for the record.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    kv_lora_rank: int = 512
    layer_kv_lora_ranks: list[int] | None = None
    q_lora_rank: int | None = None
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    qk_latent_layernorm: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    conversion: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        self.num_key_value_heads = self.num_attention_heads
        self.head_dim = self.qk_rope_head_dim  # what transformers makes the table of angles for
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        # Whoever has a configuration asks for its model next. The registry of models itself is
        # loaded in the middle of transformers' own import, when ours could not be imported yet.
        importlib.import_module("tessella.integrations.mla_model")

    def rank(self, layer: int) -> int:
        """L of a layer."""
        ranks = self.layer_kv_lora_ranks
        return self.kv_lora_rank if ranks is None else ranks[layer]


if MODEL_TYPE not in CONFIG_MAPPING:
    AutoConfig.register(MODEL_TYPE, MLAConfig)
