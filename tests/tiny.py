"""Tiny random checkpoints of every supported architecture, with a tokenizer and a chat template.

K of the projections is 256, two blocks; K of down_proj is 200, no multiple of 128. Two query
heads share a key/value head. Qwen2 has biases, Qwen3 has q/k norms.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, LAYERS, VOCAB = 256, 200, 4, 2, 2, 96

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"


def model(arch: str, *, tied: bool = False, **options) -> PreTrainedModel:
    """A random model in bf16 whose norms and biases are random too."""
    config, cls = ARCHITECTURES[arch]
    torch.manual_seed(1234)
    m = cls(
        config(
            **{
                "vocab_size": VOCAB,
                "hidden_size": HIDDEN,
                "intermediate_size": INTERMEDIATE,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "num_key_value_heads": KV_HEADS,
                "head_dim": HIDDEN // HEADS,
                "max_position_embeddings": 128,
                "tie_word_embeddings": tied,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 1,
                "initializer_range": 0.06,
            }
            | options
        )
    )
    for name, p in m.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)
    return m.to(torch.bfloat16).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Words "w0".."w90", with a chat template; pads with the end token."""
    vocab = ["<s>", "</s>", "<unk>", "user", ":", *(f"w{i}" for i in range(VOCAB - 5))]
    t = Tokenizer(WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<unk>"))
    t.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def save(path: Path, arch: str, *, sharded: bool = False, **options) -> PreTrainedModel:
    """Write :func:`model` and :func:`tokenizer` as a checkpoint; returns the model."""
    m = model(arch, **options)
    m.save_pretrained(path, **({"max_shard_size": "300KB"} if sharded else {}))
    tokenizer().save_pretrained(path)
    (path / "LICENSE").write_text("do what you like\n")
    (path / "training_args.bin").write_bytes(b"not carried over")
    return m


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
