"""Records of accuracy: what an evaluation measured, merged into a results file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from tessella.bench import records
from tessella.models.linear import W4AxLinear
from tessella.models.outliers import NOTE, Outliers
from tessella.quant.fmpq import w4a4_share

KEY = ("model", "recipe", "kv", "ctx", "text", "outliers")
"""What makes two records the same evaluation."""


def record(
    model: str, lm: nn.Module, answer: dict[str, Any], ctx: int, text: str = ""
) -> dict[str, Any]:
    """The record of one evaluation: `answer` is what ``tessella eval --json`` prints.

    For a model with latent attention `model` is what it was converted from, the recipe says how,
    and `latent` has the details; without a codec the cache is of 16 bits.
    """
    if lm.config.model_type == "tessella_mla":
        found = _record(model, lm, answer, ctx)
        latents = _latents(lm, text)
        how = latent_recipe(latents["latent"])
        recipe = how if found["recipe"] == "bf16" else f"{how}, {found['recipe']}"
        return {**found, **latents, "model": latents["model"] or found["model"], "recipe": recipe}
    return _record(model, lm, answer, ctx) | ({"text": text} if answer["kv"] is None else {})


def _latents(lm: nn.Module, text: str) -> dict[str, Any]:
    """What a record of a model with latent attention has else."""
    c = lm.config
    conversion = c.conversion or {}
    ranks = [c.rank(i) for i in range(c.num_hidden_layers)]
    healed = conversion.get("healed") or {}
    return {
        "model": conversion.get("source"),
        "text": text,
        "latent": {
            "rank": sum(ranks) / len(ranks),
            "ranks": c.layer_kv_lora_ranks,
            "rope": c.qk_rope_head_dim,
            "fold": conversion.get("fold"),
            "folds": conversion.get("folds"),
            "balance": conversion.get("balance", False),
            "window": conversion.get("window"),
            "hadamard": conversion.get("hadamard", False),
            "healed": healed,
            "bytes_per_token": 2 * (sum(ranks) + len(ranks) * c.qk_rope_head_dim),
        },
    }


def latent_recipe(latent: dict[str, Any]) -> str:
    """A name for how a model was converted, distinct for distinct conversions."""
    layers = " by layer" if latent["ranks"] else ""
    chosen = isinstance(latent["fold"], str) and latent["window"]
    fold = f"{latent['fold']} at {latent['window']}" if chosen else str(latent["fold"])
    parts = [f"mla {latent['rank']:.0f}{layers} + {latent['rope']}", f"fold {fold}"]
    parts += ["balanced"] * bool(latent.get("balance"))
    parts += ["hadamard"] * bool(latent["hadamard"])
    if healed := latent["healed"]:
        parts += [f"healed {healed['steps']}"]
        parts += [f"sft {healed['sft_steps']}"] * bool(healed.get("sft_steps"))
    return ", ".join(parts)


def _record(model: str, lm: nn.Module, answer: dict[str, Any], ctx: int) -> dict[str, Any]:
    quantization = getattr(lm.config, "quantization_config", None)
    recipe = getattr(quantization, "recipe", {}).get("name", "bf16")
    weights = sum(t.numel() * t.element_size() for t in _weights(lm))
    stamp = records.stamp(str(lm.device))
    rounded = {
        key: answer[key] if answer[key] is None else round(answer[key], 6)
        for key in ("ppl", "ppl_stderr", "ppl_ref", "kl", "top1", "ppl_ratio", "ppl_ratio_stderr")
    }
    return {
        "model": Path(model).name,
        "recipe": recipe,
        "kv": answer["kv"],
        "ctx": ctx,
        "tokens": answer["tokens"],
        "outliers": _outliers(lm),
        **rounded,
        "w4a4_fraction": _w4a4_fraction(lm),
        "weight_bytes": weights,
        "cache_bytes_per_token": answer["cache_bytes_per_token"],
        "commit": stamp["commit"],
        "date": stamp["date"],
    }


def save(path: Path, new: dict[str, Any], key: tuple[str, ...] = KEY) -> None:
    """Add a record to a file; the same evaluation (by `key`) done again replaces its old record."""
    old = json.loads(path.read_text()) if path.exists() else []
    merged = {tuple(r.get(k) for k in key): r for r in [*old, new]}
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n ".join(json.dumps(r) for r in merged.values())
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"[\n {rows}\n]\n")
    temporary.replace(path)


def markdown(records: list[dict[str, Any]]) -> str:
    """A table of evaluations, and what they were done on."""
    head = ("recipe", "cache", "bytes a token", "of bf16", "perplexity", "ratio", "KL", "top-1")
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    plain = {r["cache_bytes_per_token"] for r in records if r["kv"] == "bf16"}
    for r in records:
        nbytes = r["cache_bytes_per_token"]
        size = "" if nbytes is None else f"{nbytes:,.0f}"
        share = "" if nbytes is None or len(plain) != 1 else f"{nbytes / max(plain):.1%}"
        ratio = f"{r['ppl_ratio']:.4f} ± {r['ppl_ratio_stderr']:.4f}"
        name = r["recipe"] + (f" (outliers {r['outliers']})" if r.get("outliers") else "")
        cache = f"`{r['kv']}`" if r["kv"] else ""
        cells = (name, cache, size, share, f"{r['ppl']:.4f}", ratio)
        lines.append("| " + " | ".join((*cells, f"{r['kl']:.5f}", f"{r['top1']:.2%}")) + " |")
    about = sorted(
        {f"{r['model']}, {r['tokens']:,} tokens, windows of {r['ctx']}" for r in records}
    )
    commits = sorted({f"{r['commit']} of {r['date']}" for r in records})
    return "\n".join(lines) + f"\n\n{'; '.join(about)}; measured at {', '.join(commits)}."


def layers_markdown(records: list[dict[str, Any]]) -> str:
    """A table of recipes on synthetic layers."""
    lines = [
        "| K | recipe | W4A4 | INT8 channels | rotated | error of the results |",
        "|---:|---|---:|---:|---|---:|",
    ]
    for r in records:
        turned = "yes" if r["hadamard"] else ""
        cells = (f"{r['w4a4_fraction']:.1%}", f"{r['int8_channels']:,}", turned)
        lines.append(f"| {r['K']} | `{r['recipe']}` | {' | '.join(cells)} | {r['error']:.2%} |")
    return "\n".join(lines)


def _outliers(lm: nn.Module) -> str | None:
    """The outliers that a model was given, as "1.00% x20"; None for a model as it is."""
    note = getattr(lm.config, NOTE, None)
    return None if note is None else str(Outliers(**note))


def _w4a4_fraction(lm: nn.Module) -> float | None:
    """Share of the converted linears' GEMM volume that is W4A4; None without such linears."""
    linears = [m for m in lm.modules() if isinstance(m, W4AxLinear)]
    if not linears:
        return None
    shapes = ((m.out_features, m.in_features, m.k8) for m in linears)
    return round(w4a4_share(shapes), 4)


def latents_markdown(records: list[dict[str, Any]]) -> str:
    """A table of models with latent attention beside their original."""
    head = ("conversion", "latent", "bytes a token", "perplexity", "ratio", "KL", "top-1")
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for r in records:
        latent = r.get("latent") or {}
        codec = (r["kv"] or "").removeprefix("paper:latent:")
        kind = "" if not latent else f"INT{codec}" if codec else "bf16"
        nbytes = "" if not latent else f"{_latent_bytes(latent, codec):,.0f}"
        ratio = f"{r['ppl_ratio']:.4f} ± {r['ppl_ratio_stderr']:.4f}"
        name = r["recipe"] if latent else "the original, grouped queries"
        if r["text"] not in (records[0]["text"], ""):
            name += f" (on {r['text']})"
        cells = (name, kind, nbytes, f"{r['ppl']:.4f}", ratio)
        lines.append("| " + " | ".join((*cells, f"{r['kl']:.5f}", f"{r['top1']:.2%}")) + " |")
    about = sorted(
        {f"{r['model']}, {r['tokens']:,} tokens, windows of {r['ctx']}" for r in records}
    )
    commits = sorted({f"{r['commit']} of {r['date']}" for r in records})
    return "\n".join(lines) + f"\n\n{'; '.join(about)}; measured at {', '.join(commits)}."


def _latent_bytes(latent: dict[str, Any], bits: str) -> float:
    """Of a token in all layers: the latent in codes with an fp16 scale, the rope key in bf16."""
    if not bits:
        return latent["bytes_per_token"]
    layers = len(latent["folds"])
    return layers * (latent["rank"] * int(bits) / 8 + 2 + 2 * latent["rope"])


def _weights(lm: nn.Module) -> list:
    """Every tensor of the model's weights, 4-bit blobs included, shared ones once."""
    blobs = [m.blob for m in lm.modules() if isinstance(m, W4AxLinear)]
    return [*lm.parameters(), *blobs]
