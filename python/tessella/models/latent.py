"""Reads a checkpoint with grouped queries as a conversion to latents wants it.

Weights are read one layer at a time. As many layers as fit a share of the free memory stay, since
the selection of folds passes through them again and again.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm

from tessella.mla.attention import GQA, Angles
from tessella.mla.decoder import Layer
from tessella.mla.frequencies import frequencies, settings
from tessella.mla.shape import Heads, MLAError, check_finite
from tessella.models import presets
from tessella.models.checkpoint import Checkpoint
from tessella.models.errors import CheckpointError

CONVERTIBLE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")

MEMORY_SHARE = 0.4
"""Of the free memory, for layers that stay loaded."""

_REASONS = {
    "Qwen3ForCausalLM": "its norms between the projections and RoPE act on each head apart, so a "
    "rotation over heads cannot pass through them",
    presets.MLA: "it has latent attention already",
}


class CheckpointDecoder:
    """A :class:`tessella.mla.decoder.Decoder` that reads a checkpoint.

    Raises CheckpointError: an architecture that cannot be converted, with the reason; a model that
    is quantised; a kind of RoPE, an activation or a tensor that does not fit.
    """

    def __init__(self, source: Checkpoint, device: str = "cpu"):
        self.source, self.device = source, torch.device(device)
        config = source.config
        self.arch = _architecture(config, source.config_file)
        self.count = config["num_hidden_layers"]
        H = config["num_attention_heads"]
        D = config.get("head_dim") or config["hidden_size"] // H
        self.heads = Heads(H, config.get("num_key_value_heads") or H, D)
        self.eps = config.get("rms_norm_eps", 1e-6)
        try:
            self.rope = settings(config)
        except MLAError as e:
            raise CheckpointError(f"{source.config_file}: {e}") from None
        if (act := config.get("hidden_act", "silu")) != "silu":
            raise CheckpointError(f"{source.config_file}: hidden_act: expected 'silu', got {act!r}")
        source.require(
            f"{self.arch.layer(i)}.{suffix}"
            for i in range(self.count)
            for suffix in self.arch.layer_tensors(config)
        )
        head = self.arch.embedding if config.get("tie_word_embeddings") else self.arch.head
        self._names = (f"{self.arch.embedding}.weight", f"{self.arch.final_norm}.weight")
        self._names += (f"{head}.weight",)
        source.require(self._names)
        self._ends: dict[str, Tensor] = {}
        self._layers: OrderedDict[int, Layer] = OrderedDict()
        self._room: int | None = None

    def window(self, i: int) -> int | None:
        """Tokens that layer i sees, itself included; None: all."""
        config = self.source.config
        size = config.get("sliding_window")
        if config["architectures"][0] == "LlamaForCausalLM" or not size:
            return None
        if config["architectures"][0] == "MistralForCausalLM":
            return size
        if not config.get("use_sliding_window"):
            return None
        kinds = config.get("layer_types")
        slides = i >= config.get("max_window_layers", self.count)
        return size if (kinds[i] == "sliding_attention" if kinds else slides) else None

    def read(self, name: str, required: bool = True) -> Tensor | None:
        """A tensor in fp32 on the device; None where an optional one is not stored.

        Raises MLAError when it holds NaN or infinity.
        """
        if not required and name not in self.source.tensors:
            return None
        t = self.source.read(name).to(self.device, torch.float32)
        check_finite(f"{self.source.tensors[name].file}: tensor {name!r}", t)
        return t

    def layer(self, i: int) -> Layer:
        """Decoder layer i; the ones used last stay loaded."""
        if i in self._layers:
            self._layers.move_to_end(i)
            return self._layers[i]
        if self._room is None:
            share = MEMORY_SHARE * _free_memory(self.device)
            prefix = f"{self.arch.layer(i)}."
            tensors = self.source.tensors.items()
            elements = sum(torch.Size(t.shape).numel() for n, t in tensors if n.startswith(prefix))
            self._room = max(1, int(share // (4 * elements)))
        while len(self._layers) >= self._room:
            self._layers.popitem(last=False)
        self._layers[i] = self._read_layer(i)
        return self._layers[i]

    def _read_layer(self, i: int) -> Layer:
        prefix = self.arch.layer(i)

        def weights(part: str, names: str) -> dict[str, Tensor | None]:
            found = {}
            for n in names.split():
                stem = f"{prefix}.{part}.{n}_proj"
                found[n] = self.read(f"{stem}.weight")
                found[f"{n}_bias"] = self.read(f"{stem}.bias", required=False)
            return found

        qkvo = {n.removeprefix("_"): t for n, t in weights("self_attn", "q k v o").items()}
        for b in ("k_bias", "v_bias"):  # both or none: they become one
            other = qkvo["v_bias" if b == "k_bias" else "k_bias"]
            if qkvo[b] is None and other is not None:
                qkvo[b] = torch.zeros_like(other)
        return Layer(
            attention=GQA(self.heads, window=self.window(i), **qkvo),
            input_norm=self.read(f"{prefix}.input_layernorm.weight"),
            post_norm=self.read(f"{prefix}.post_attention_layernorm.weight"),
            **weights("mlp", "gate up down"),
            eps=self.eps,
        )

    def embed(self, ids: Tensor) -> Tensor:
        """fp32 [B, T, hidden]."""
        return embedding(ids.to(self.device), self._end(0))

    def head(self, h: Tensor) -> Tensor:
        """Logits [..., V] of the last layer's hidden states."""
        return linear(rms_norm(h, h.shape[-1:], self._end(1), self.eps), self._end(2))

    def angles(self, T: int) -> Angles:
        """cos and sin fp32 [T, D / 2]."""
        inv = frequencies(self.rope, self.heads.D).to(self.device)
        turned = torch.outer(torch.arange(T, device=self.device, dtype=torch.float64), inv)
        return turned.cos().float(), turned.sin().float()

    def _end(self, which: int) -> Tensor:
        name = self._names[which]
        if name not in self._ends:
            self._ends[name] = self.read(name)
        return self._ends[name]


def _architecture(config: dict[str, Any], file: str) -> presets.Architecture:
    arch = presets.architecture(config, file)
    if (name := config["architectures"][0]) not in CONVERTIBLE:
        raise CheckpointError(
            f"{file}: architectures: expected one of {', '.join(CONVERTIBLE)}, got {name!r}: "
            f"{_REASONS[name]}"
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{file}: quantization_config: expected a model in full precision; quantise the "
            "converted model instead"
        )
    return arch


def _free_memory(device: torch.device) -> int:
    """Bytes that are free where layers are kept."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
