"""The model with latent attention: against DeepSeek's, absorbed, cached, quantised, registered."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import tiny
from command import environment
from tessella.integrations import hf
from tessella.integrations.mla_config import MLAConfig
from tessella.integrations.mla_model import MLAAttention, TessellaMLAForCausalLM
from tessella.mla import attend
from tessella.models.convert import convert
from tessella.models.fuse import RMSNormQuant
from tessella.models.linear import W4AxLinear
from tessella.quant.recipe import PRESETS

SHAPES = {
    "plain": {},
    "biased": {"attention_bias": True, "attention_output_bias": True},
    "normed": {"qk_latent_layernorm": True, "q_lora_rank": 48},
    "low": {"q_lora_rank": 48, "v_head_dim": 40},
    "ranks": {"layer_kv_lora_ranks": [96, 64]},
}


def config(**options) -> MLAConfig:
    return AutoConfig.for_model(
        "tessella_mla",
        **{
            "vocab_size": tiny.VOCAB,
            "hidden_size": 256,
            "intermediate_size": 200,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "kv_lora_rank": 96,
            "qk_rope_head_dim": 32,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "max_position_embeddings": 128,
            "initializer_range": 0.06,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        }
        | options,
    )


def model(**options) -> TessellaMLAForCausalLM:
    torch.manual_seed(7)
    m = AutoModelForCausalLM.from_config(config(**options)).eval()
    for name, p in m.named_parameters():
        if "norm" in name:
            nn.init.uniform_(p, 0.5, 1.5)
        elif name.endswith("bias"):
            nn.init.normal_(p, std=0.3)
    return m


def angles(c, S: int) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = LlamaRotaryEmbedding(c)(torch.zeros(1), torch.arange(S)[None])
    return cos.double(), sin.double()


IDS = torch.randint(0, tiny.VOCAB, (2, 23), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", SHAPES)
def test_absorbed_is_expanded_in_fp64(kind):
    c = config(**SHAPES[kind])
    a = model(**SHAPES[kind]).model.layers[1].self_attn.double()
    x = torch.randn(2, 19, 256, dtype=torch.float64)
    q_nope, q_rope, latent, k_rope = a.project(x, angles(c, 19))
    out = attend.absorbed(
        q_nope, q_rope, latent, k_rope, a.kv_b_proj.weight, a.scaling, attend.causal(19, 19)
    )
    expected, _ = a(x, angles(c, 19), attention_mask=attend.causal(19, 19)[None, None])
    got = a.o_proj(out.transpose(1, 2).flatten(2))
    assert (got - expected).abs().max() < 1e-12 * expected.abs().max()


def test_is_deepseeks_attention():
    shared = {"attention_bias": True, "hidden_size": 256, "num_attention_heads": 4}
    shared |= {"q_lora_rank": 48, "kv_lora_rank": 96, "qk_rope_head_dim": 32}
    shared |= {"qk_nope_head_dim": 64, "v_head_dim": 40}
    theirs_config = DeepseekV3Config(**shared)
    theirs_config._attn_implementation = "sdpa"
    theirs = DeepseekV3Attention(theirs_config, 0).double().eval()
    ours_config = config(**shared, attention_output_bias=True, qk_latent_layernorm=True)
    ours_config._attn_implementation = "sdpa"
    ours = MLAAttention(ours_config, 0).double().eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.2)
    ours.load_state_dict(theirs.state_dict())
    x, mask = torch.randn(2, 19, 256, dtype=torch.float64), attend.causal(19, 19)[None, None]
    expected = theirs(x, angles(theirs_config, 19), mask)[0]
    got = ours(x, angles(ours_config, 19), mask)[0]
    # their norm of a latent goes through fp32, as ours; nothing else rounds
    assert (got - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("kind", [*SHAPES, "sliding"])
def test_cached_decoding_is_one_pass(kind):
    m = model(**SHAPES.get(kind, {"sliding_window": 8}))
    whole = m(input_ids=IDS).logits
    first = m(input_ids=IDS[:, :9], use_cache=True)
    rest = m(input_ids=IDS[:, 9:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat((first.logits, rest), 1), whole, rtol=1e-4, atol=1e-5)


def test_a_sliding_window_hides_old_tokens():
    m = model(sliding_window=4, num_hidden_layers=1)
    other = IDS.clone()
    other[:, :5] = (other[:, :5] + 1) % tiny.VOCAB
    a, b = m(input_ids=IDS).logits, m(input_ids=other).logits
    torch.testing.assert_close(a[:, 8:], b[:, 8:])
    assert not torch.allclose(a[:, 7], b[:, 7])


def test_padding_on_the_left_changes_nothing():
    m = model()
    padded = torch.cat((torch.ones(2, 5, dtype=torch.int64), IDS), 1)
    mask = torch.cat((torch.zeros(2, 5), torch.ones(IDS.shape)), 1).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    got = m(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(got, m(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_every_weight_gets_a_gradient():
    m = model(**SHAPES["normed"]).train()
    m(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())


class _Latents(DynamicLayer):
    """A cache layer that keeps latents: the protocol of `latent_layer`."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def get_seq_length(self):
        return self.seen

    def attend_latent(self, attention, q_nope, q_rope, latent, k_rope, mask):
        S = latent.shape[1]
        self.kept = (
            (latent, k_rope)
            if not self.seen
            else (
                torch.cat((self.kept[0], latent), 1),
                torch.cat((self.kept[1], k_rope), 1),
            )
        )
        self.seen += S
        out = attend.absorbed(
            q_nope,
            q_rope,
            *self.kept,
            attention.kv_b_proj.weight,
            attention.scaling,
            attend.causal(S, self.seen),
        )
        return out.transpose(1, 2)


def test_a_cache_of_latents_takes_over():
    m = model()
    expected = m(input_ids=IDS).logits
    cache = DynamicCache()
    cache.layers = [_Latents(), _Latents()]
    pieces = [m(input_ids=IDS[:, i:j], past_key_values=cache).logits for i, j in ((0, 9), (9, 23))]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "biased", "normed"])
def test_four_bit_linears(kind, tmp_path):
    m = model(**SHAPES[kind]).to(torch.bfloat16)
    m.save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    report = convert(tmp_path / "m", tmp_path / "q", PRESETS["w4a8"])
    assert len(report.layers) == 2 * (8 if kind == "normed" else 7)
    quantised, _ = hf.load(tmp_path / "q")
    attention = quantised.model.layers[0].self_attn
    assert isinstance(attention.kv_b_proj, W4AxLinear)
    assert isinstance(attention.kv_a_proj_with_mqa, W4AxLinear)
    assert isinstance(quantised.model.layers[0].input_layernorm, RMSNormQuant)
    got, expected = quantised(input_ids=IDS).logits, m(input_ids=IDS).logits
    assert (got - expected).norm() < 0.5 * expected.norm()
    assert quantised.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape[1] == 26


PLAIN = """
import sys, transformers
assert "tessella" not in sys.modules
try:
    transformers.AutoConfig.from_pretrained(sys.argv[1])
except ValueError as e:
    print(e)
"""

OURS = """
import sys, tessella
assert "transformers" not in sys.modules
import transformers
print(type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
"""


def test_only_tessella_loads_it(tmp_path):
    """Without tessella transformers refuses the type; with it the registries know it."""
    model().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "tessella_mla" and not written["qk_latent_layernorm"]

    def said(code: str) -> str:
        args = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(args, capture_output=True, text=True, env=environment(), check=True)
        return done.stdout

    assert "tessella_mla" in said(PLAIN)
    assert said(OURS).split() == ["TessellaMLAForCausalLM"]
