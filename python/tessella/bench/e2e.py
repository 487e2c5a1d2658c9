"""A whole model, end to end: prefill and decode of a Llama-3.2-1B shape with random weights.

The model of transformers and its conversions share embeddings and norms, so all of them fit in
memory and nothing but the linears differs. A decode step runs on a cache of `ctx` tokens, which is
cut back to `ctx` after it; a prefill starts from nothing. Tokens per second are B * tokens / time.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn

from tessella import _native
from tessella.bench.suite import Case, Family, Prepared, Selection, Subject
from tessella.bench.timing import Call
from tessella.integrations import attention
from tessella.integrations.cache import growing_cache
from tessella.integrations.paged import PAGE_SIZE as PAGE
from tessella.integrations.paged import paged_cache
from tessella.models.fuse import flatten_head, fuse
from tessella.models.linear import W4AxLinear
from tessella.quant import kv
from tessella.quant.recipe import PRESETS, Recipe, Rtn

SHAPES: dict[str, dict[str, int]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 1024,
    },
}
"""Dimensions by name; weights are random, which changes no time."""

CTX = (128, 4096)
QUICK_CTX = (16,)
PHASES = ("decode", "prefill")
RECIPES: dict[str, Recipe] = {
    "w4a8": dataclasses.replace(PRESETS["w4a8"], steps=(Rtn(clip="none"),)),
    "w4a8kv4": dataclasses.replace(PRESETS["w4a8kv4-rtn"], steps=(Rtn(clip="none"),)),
    "w4a8-head": dataclasses.replace(PRESETS["w4a8"], steps=(Rtn(clip="none"),), lm_head=True),
}
"""Conversions measured: the linears of the layers, those over a coded cache, those and the head.

Without clipping: the search for the best range takes minutes and changes no time.
"""

FEWEST, MOST_S = 1, 90.0
"""A prefill of a long context takes a minute on few cores, and its noise evens out."""

PROBE_TOKENS = 32

POOL = 1 << 22
"""Random weights are drawn once and repeated."""


def cases(quick: bool) -> list[Case]:
    """The cases of a run."""
    name, contexts = ("tiny", QUICK_CTX) if quick else ("llama-3.2-1b", CTX)
    return [
        {"model": name, "phase": phase, "B": 1, "ctx": ctx} for phase in PHASES for ctx in contexts
    ]


@lru_cache(maxsize=1)
def original(shape: str) -> nn.Module:
    """The bf16 model of transformers, tied embeddings, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    weights = {
        name: torch.ones(p.shape, dtype=torch.bfloat16)
        if p.dim() == 1
        else pool.repeat(-(-p.numel() // POOL))[: p.numel()].view(p.shape)
        for name, p in model.named_parameters()
    }
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    rope = model.model.rotary_emb
    model.model.rotary_emb = type(rope)(config)  # its buffers are in no state_dict
    return model.eval().requires_grad_(False)


@lru_cache(maxsize=len(RECIPES))
def converted(shape: str, recipe_name: str) -> nn.Module:
    """The same model with 4-bit linears; all other weights are shared with the original."""
    if recipe_name == "w4a8kv4":
        return converted(shape, "w4a8")  # its cache is another
    if recipe_name != "w4a8":  # the layers are those of the plain conversion
        model = _sharing(converted(shape, "w4a8"))
        _replace(model, model.get_output_embeddings(), "lm_head", RECIPES[recipe_name])
        return model
    model = _sharing(original(shape))
    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            _replace(model, linear, f"model.{name}", RECIPES[recipe_name])
    fuse(model)  # as a converted checkpoint is loaded
    attention.use(model)
    return model


def _sharing(model: nn.Module) -> nn.Module:
    """A copy that shares every parameter and every 4-bit linear with `model`."""
    shared = [*model.parameters(), *(m for m in model.modules() if isinstance(m, W4AxLinear))]
    return copy.deepcopy(model, {id(s): s for s in shared})


def _replace(model: nn.Module, linear: nn.Linear, name: str, recipe: Recipe) -> None:
    model.set_submodule(name, W4AxLinear.from_linear(linear, recipe))


@lru_cache(maxsize=1)
def single_precision(shape: str) -> nn.Module:
    """The original in fp32, which some CPUs are faster in."""
    return copy.deepcopy(original(shape)).float()


@lru_cache(maxsize=1)
def folded(shape: str) -> nn.Module:
    """The original, with this package's attention, cache and head: what 4 bits alone are worth."""
    model = _sharing(original(shape))
    attention.use(model)
    flatten_head(model)
    return model


RIVALS = {
    "transformers_bf16": original,
    "transformers_bf16_folded": folded,
    "transformers_fp32": single_precision,
}
"""The second tells how much of a difference is not the linears'."""


def prepare(case: Case, selection: Selection) -> Prepared:
    """One phase at one context, on every model."""
    shape = case["model"]
    make = _decode if case["phase"] == "decode" else _prefill
    isa = _native._C.cpu_isa()["best"]
    subjects = []
    for recipe in RECIPES:
        if selection({"recipe": recipe}):
            model, codec = converted(shape, recipe), RECIPES[recipe].cache
            nbytes, macs = work(model, case, codec)
            subjects.append(
                Subject(
                    name=recipe,
                    kernel=f"w4ax_gemm.{isa}",
                    case={"recipe": recipe},
                    call=make(model, case, codec),
                    nbytes=nbytes,
                    macs=macs,
                    notes={"tokens": tokens(case)},
                )
            )
    rivals, absent = {}, {}
    for name, model in RIVALS.items():
        if (seconds := _estimate(model(shape), case)) > MOST_S:
            absent[f"{name} at ctx {case['ctx']}"] = f"a prefill takes some {seconds:.0f} s"
        else:
            rivals[name] = make(model(shape), case)
    return Prepared(subjects, rivals, absent=absent)


def _estimate(model: nn.Module, case: Case) -> float:
    """Seconds that a prefill takes at least, from a short one; 0 for a decode step."""
    if case["phase"] == "decode" or case["ctx"] <= PROBE_TOKENS:
        return 0.0
    call = _prefill(model, case | {"ctx": PROBE_TOKENS})
    call(0)
    before = time.perf_counter()
    call(1)
    return (time.perf_counter() - before) * case["ctx"] / PROBE_TOKENS


def tokens(case: Case) -> int:
    """Tokens that a call processes."""
    return case["B"] * (1 if case["phase"] == "decode" else case["ctx"])


def work(model: nn.Module, case: Case, codec: str | None = None) -> tuple[int, int]:
    """Bytes of weights and cache that a call must read, and multiply-adds of its linears.

    The head computes the last token only. Attention's arithmetic is left out: the bound is a
    lower one, and loose where the context is long.
    """
    nbytes = macs = 0
    head = model.get_output_embeddings()
    for module in _linears(model):
        weight = module.blob if isinstance(module, W4AxLinear) else module.weight
        rows = case["B"] if module is head else tokens(case)
        nbytes += weight.nbytes
        macs += rows * module.in_features * module.out_features
    c = model.config
    per_layer = kv.parse(codec or "bf16").bytes_per_token(c.num_key_value_heads, c.head_dim, PAGE)
    return nbytes + int(case["B"] * case["ctx"] * c.num_hidden_layers * per_layer), macs


def _linears(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if isinstance(m, nn.Linear | W4AxLinear))


def _tokens(model: nn.Module, B: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (B, n), generator=generator)


def _prefill(model: nn.Module, case: Case, codec: str | None = None) -> Call:
    ids = _tokens(model, case["B"], case["ctx"])

    @torch.no_grad()  # as transformers' generate runs
    def call(i: int) -> Tensor:
        cache = None if codec is None else paged_cache(model, codec)
        return model(input_ids=ids, use_cache=True, past_key_values=cache, logits_to_keep=1).logits

    return call


def _decode(model: nn.Module, case: Case, codec: str | None = None) -> Call:
    from transformers import DynamicCache

    if codec is not None:
        return _decode_paged(model, case, codec)
    ids, ctx, c = _tokens(model, case["B"], 1), case["ctx"], model.config
    ours = c._attn_implementation == attention.NAME
    cache = growing_cache(c) if ours else DynamicCache(config=c)
    shape = case["B"], c.num_key_value_heads, ctx, c.head_dim
    for layer in range(c.num_hidden_layers):
        cache.update(*torch.randn(2, *shape, dtype=model.dtype), layer)

    @torch.no_grad()  # as transformers' generate runs
    def call(i: int) -> Tensor:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return call


def _decode_paged(model: nn.Module, case: Case, codec: str) -> Call:
    ids, c = _tokens(model, case["B"], 1), model.config
    cache = paged_cache(model, codec)
    shape = case["B"], c.num_key_value_heads, case["ctx"], c.head_dim
    for layer in range(c.num_hidden_layers):
        cache.store(layer, *torch.randn(2, *shape, dtype=model.dtype))

    @torch.no_grad()  # as transformers' generate runs
    def call(i: int) -> Tensor:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return call


def family(device: str) -> Family | None:
    """End to end on "cpu"."""
    if device != "cpu":
        return None
    return Family(
        "e2e",
        "cpu",
        cases,
        prepare,
        {
            "model": list(SHAPES),
            "phase": list(PHASES),
            "B": [1],
            "ctx": [*QUICK_CTX, *CTX],
            "recipe": list(RECIPES),
        },
        [*RECIPES, *RIVALS],
        FEWEST,
        MOST_S,
    )
