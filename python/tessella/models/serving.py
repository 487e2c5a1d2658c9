"""How many sequences fit: bytes of weights and caches, before and after conversion to latents.

Plain arithmetic on a model's shape: no device, no tensors. What a serving engine needs besides
weights and cache (activations, graphs, workspaces) is a number that the caller gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tessella.formats_kv import KVCodec
from tessella.formats_mla import MLACodec, check_sizes
from tessella.models.errors import CheckpointError

PAGE = 64
"""Tokens of a page."""

WEIGHT_BYTES = {"bf16": 2.0, "w8a8": 1.0, "w4a8": 0.5 + 2 / 128}
"""Bytes of a number of a linear layer, by recipe; embeddings and head stay 16 bit."""

CACHES = {
    "gqa-bf16": None,
    "gqa-kv8": KVCodec(8, 8),
    "gqa-kv4": KVCodec(4, 4),
    "mla-bf16": MLACodec("bf16"),
    "mla-int8": MLACodec("int8"),
    "mla-int4": MLACodec("int4"),
}
"""Caches that are compared, and how their pages are coded."""


@dataclass(frozen=True)
class Shape:
    """What of a decoder-only model decides about memory."""

    layers: int
    hidden: int
    intermediate: int
    H: int
    J: int
    D: int
    vocab: int
    tied: bool = False
    latent: tuple[int, int] | None = None
    """(L, R) of a model that has latents already."""

    @classmethod
    def of(cls, config: Mapping[str, Any], file: str) -> Shape:
        """Of a config.json. Raises CheckpointError naming a field that is missing."""
        names = {
            "layers": "num_hidden_layers",
            "hidden": "hidden_size",
            "intermediate": "intermediate_size",
            "H": "num_attention_heads",
            "vocab": "vocab_size",
        }
        if missing := [n for n in names.values() if n not in config]:
            raise CheckpointError(f"{file}: expected field {missing[0]}")
        values = {k: config[n] for k, n in names.items()}
        J = config.get("num_key_value_heads") or values["H"]
        D = config.get("head_dim") or values["hidden"] // values["H"]
        latent = None
        if rank := config.get("kv_lora_rank"):
            latent, D = (rank, config["qk_rope_head_dim"]), config["qk_nope_head_dim"]
        return cls(**values, J=J, D=D, tied=config.get("tie_word_embeddings", False), latent=latent)

    def parameters(self, latent: tuple[int, int] | None = None) -> tuple[int, int]:
        """(of all linear layers, of embeddings and head); with latents (L, R) or as it is."""
        attention = 2 * self.hidden * self.J * self.D + self.hidden * self.H * self.D
        if latent is not None:
            L, R = latent
            attention = self.hidden * (self.H * (self.D + R) + L + R) + 2 * self.H * self.D * L
        rest = self.H * self.D * self.hidden + 3 * self.hidden * self.intermediate
        return self.layers * (attention + rest), self.vocab * self.hidden * (2 - self.tied)


SHAPES = {
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32, 128, 32000),
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "llama-3-70b": Shape(80, 8192, 28672, 64, 8, 128, 128256),
    "mistral-7b": Shape(32, 4096, 14336, 32, 8, 128, 32768),
    "openpangu-7b": Shape(34, 4096, 12800, 32, 8, 128, 153376),
    "qwen2.5-7b": Shape(28, 3584, 18944, 28, 4, 128, 152064),
    "qwen2.5-14b": Shape(48, 5120, 13824, 40, 8, 128, 152064),
    "qwen2.5-72b": Shape(80, 8192, 29568, 64, 8, 128, 152064),
}
"""Published models by name."""


@dataclass(frozen=True)
class Setting:
    """A machine, its load, and how the model is stored on it.

    Attributes:
        memory: bytes of the device.
        prompt, answer: tokens of a request.
        weights: a key of :data:`WEIGHT_BYTES`.
        latent: (L, R) of the conversion.
        utilization: share of the memory that may be used.
        reserve: bytes for everything but weights and cache.
        mla_extra: bytes more of that, with latents.
        max_seqs: what the engine is limited to; 0: nothing.
        base_sequences: memory is not given but such that so many sequences fit in the GQA bf16
            cache; 0: `memory` counts.
        bandwidth: bytes a second that decode can read; 0: unknown.
        price: of an hour.
    """

    memory: float = 0.0
    prompt: int = 1024
    answer: int = 1024
    weights: str = "bf16"
    latent: tuple[int, int] = (512, 64)
    utilization: float = 0.9
    reserve: float = 0.0
    mla_extra: float = 0.0
    max_seqs: int = 0
    base_sequences: int = 0
    bandwidth: float = 0.0
    price: float = 0.0


@dataclass(frozen=True)
class Row:
    """One cache of the comparison."""

    cache: str
    bytes_per_token: float
    weight_bytes: float
    tokens: int
    """That the cache has room for."""
    fit: int
    """Sequences that it has room for."""
    sequences: int
    """The same, or the engine's limit."""
    limited_by: str
    ratio: float | None
    """Sequences beside those of the first row, as limited."""
    tok_s: float | None
    """At most, bound by reading weights and caches."""
    cost: float | None
    """Of a million generated tokens, at least."""


def token_bytes(shape: Shape, cache: str, latent: tuple[int, int]) -> float:
    """Bytes of a token in all layers, scales included."""
    codec = CACHES[cache]
    if isinstance(codec, MLACodec):
        return shape.layers * codec.page_bytes(PAGE, *latent) / PAGE
    if codec is None:
        return shape.layers * 2.0 * 2 * shape.J * shape.D
    return shape.layers * shape.J * codec.page_bytes(PAGE, shape.D) / PAGE


def weight_bytes(shape: Shape, recipe: str, latent: tuple[int, int] | None) -> float:
    """Bytes of all weights, with latents (L, R) or as the model is."""
    linears, embeddings = shape.parameters(latent)
    return linears * WEIGHT_BYTES[recipe] + 2.0 * embeddings


def plan(shape: Shape, s: Setting) -> list[Row]:
    """The caches side by side; those of keys and values only for models that have them.

    Raises ValueError: latents that kernels cannot have, or weights that do not fit.
    """
    latent = shape.latent or s.latent
    check_sizes("plan serving", *latent)
    per_sequence = -(-(s.prompt + s.answer) // PAGE) * PAGE
    names = [n for n in CACHES if not (shape.latent and n.startswith("gqa"))]
    memory = s.memory * s.utilization - s.reserve
    if s.base_sequences:
        base = weight_bytes(shape, s.weights, shape.latent)
        memory = base + s.base_sequences * per_sequence * token_bytes(shape, names[0], latent)
    rows: list[Row] = []
    for name in names:
        is_latent = name.startswith("mla")
        weights = weight_bytes(shape, s.weights, latent if is_latent else None)
        pool = memory - weights - (s.mla_extra if is_latent else 0.0)
        if pool < 0 and not rows:
            raise ValueError(
                f"plan serving: expected memory for the weights, {weights / 1e9:.1f} GB, "
                f"got {memory / 1e9:.1f} GB after reserves"
            )
        each = token_bytes(shape, name, latent)
        fit = max(0, int(pool / (each * per_sequence) + 1e-9))
        sequences = min(fit, s.max_seqs) if s.max_seqs else fit
        ratio = sequences / rows[0].sequences if rows and rows[0].sequences else None
        tok_s = cost = None
        if s.bandwidth and sequences:
            read = weights + sequences * (s.prompt + s.answer / 2) * each
            tok_s = sequences * s.bandwidth / read
            cost = s.price / 3600 / tok_s * 1e6 if s.price else None
        limit = "max-seqs" if sequences < fit else "memory"
        tokens = max(0, int(pool / each))
        rows.append(Row(name, each, weights, tokens, fit, sequences, limit, ratio, tok_s, cost))
    return rows
