"""Converts a checkpoint with grouped queries into one with latent attention, layer by layer.

Three passes over the calibration text. The first, through the original, gathers second moments of
each layer's keys and values, from which follow the rotations for any fold, and chooses bands
(:mod:`tessella.mla.bands`). The second, unless folds are given, tries them on the whole model
(:mod:`tessella.mla.folds`). The third goes through the model with
partial RoPE, gathers moments again, makes each layer's latents from them and writes the layer.
What happens when a conversion is interrupted: :mod:`tessella.models.partial`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessella._version import __version__
from tessella.mla import decoder as dec
from tessella.mla.attention import GQA, Latent, balanced, partial_rope, to_latent
from tessella.mla.bands import WINDOWS, BandSearch
from tessella.mla.folds import Search, Trial
from tessella.mla.lowrank import Components, allocate, components
from tessella.mla.rotate import energy_kept, pair_moments, rotation
from tessella.mla.shape import (
    Fold,
    MLAError,
    check_finite,
    check_fold,
    check_rank,
    check_tokens,
    collapse_of,
    folds_of,
)
from tessella.models import presets
from tessella.models.checkpoint import CONFIG, INDEX, Checkpoint
from tessella.models.convert import carry_over, check_device, source_fingerprint
from tessella.models.errors import CheckpointError, ConversionError
from tessella.models.hub import resolve
from tessella.models.latent import CheckpointDecoder
from tessella.models.partial import Partial, check_target
from tessella.models.report import peak_rss

AUTO, ADAPTIVE, BANDS = "auto", "adaptive", "bands"
CRITERIA = ("kl", "ppl")
LEAST_ENERGY = 1e-4
"""Of the mean energy of a layer's queries: less counts as this, lest scales become extreme."""

RANK_STEP = 64
"""Ranks of layers under a budget are multiples of this, or of the rank if that is smaller."""


@dataclass(frozen=True)
class Options:
    """What a conversion makes.

    Attributes:
        rank: L; with `layer_ranks` the mean over layers.
        rope: R, head_dim / 1, 2 or 4.
        fold: a number, or one for each layer, where a tuple of numbers stands for bands; "auto"
            (one for all), "adaptive" (one for each layer) or "bands" (bands for each layer).
        balance: scale keys so that queries weigh all of their channels alike (exact).
        hadamard: spread the latent's energy over its channels, for caches of few bits.
        layer_ranks: give each layer its rank, from how its energy falls off.
        criterion: how folds are compared: "kl" to the original's predictions, or "ppl" of the text.
    """

    rank: int = 512
    rope: int = 64
    fold: int | str | tuple[Fold, ...] = AUTO
    balance: bool = True
    hadamard: bool = False
    layer_ranks: bool = False
    criterion: str = "kl"


@dataclass(frozen=True)
class Step:
    """Progress: `done` of `total` in one of the passes "statistics", "folds", "layers"."""

    stage: str
    done: int
    total: int
    divergence: float | None = None


@dataclass(frozen=True)
class MLAReport:
    """What a conversion did.

    `ppl_before` and `ppl_after` are of the text that folds are chosen on: a first look, no
    evaluation. `kl` is KL(original || converted) there. `bytes_per_token`: of a 16-bit cache of
    latents and rope keys, all layers; `bytes_per_token_gqa` of one of the original's keys and
    values. `energy_kept`: the share of each layer's key energy that keeps RoPE.
    """

    folds: list[Fold]
    ranks: list[int]
    rope: int
    ppl_before: float
    ppl_after: float
    kl: float
    bytes_per_token: int
    bytes_per_token_gqa: int
    energy_kept: list[float]
    trials: list[dict[str, Any]]
    seconds: float
    peak_rss: int


def to_mla(
    model: str | os.PathLike,
    out: str | os.PathLike,
    options: Options,
    calibration: Tensor,
    selection: Tensor,
    *,
    device: str = "cpu",
    resume: bool = False,
    progress: Callable[[Step], None] | None = None,
) -> MLAReport:
    """Convert a checkpoint into the folder `out`.

    Args:
        model: a folder, or a hub id. Llama, Mistral or Qwen2.
        out: folder to create; it must not exist, or be empty. Work is done in ``<out>.partial``.
        options: what to make.
        calibration: int64 [N, T], token ids that moments are gathered over.
        selection: int64 [M, T'], token ids that folds are compared on.
        device: where it is computed.
        resume: go on from what an interrupted conversion with the same inputs left.
        progress: called after every step.

    Raises:
        ConversionError: everything that can be wrong, with the number and its limit. Nothing is
            left at `out`.
    """
    started = time.perf_counter()
    target = Path(out).expanduser().resolve()
    check_target(target)
    check_device(device)
    try:
        source = Checkpoint.open(resolve(model))
        decoder = CheckpointDecoder(source, device)
        _check(decoder, options, calibration, selection)
        fingerprint = _fingerprint(source, options, (calibration, selection), device)
        with Partial(target, fingerprint, resume) as partial, torch.inference_mode():
            work = _Conversion(decoder, options, partial, progress)
            report = work.run(calibration, selection)
            partial.publish()
    except (CheckpointError, MLAError) as e:
        raise ConversionError(str(e)) from e
    seconds = time.perf_counter() - started
    return dataclasses.replace(report, seconds=seconds, peak_rss=peak_rss())


def _check(decoder: CheckpointDecoder, options: Options, cal: Tensor, sel: Tensor) -> None:
    heads = decoder.heads
    collapse = collapse_of(heads, options.rope)
    check_rank(heads, options.rope, options.rank)
    if not isinstance(options.fold, str):
        given = (options.fold,) if isinstance(options.fold, int) else options.fold
        if len(given) not in (1, decoder.count):
            raise MLAError(f"fold: expected 1 or {decoder.count} numbers, got {len(given)}")
        for fold in given:
            check_fold(heads, collapse, fold)
    elif options.fold not in (words := (AUTO, ADAPTIVE, BANDS)):
        raise MLAError(f"fold: expected a number, {', '.join(words)}, got {options.fold!r}")
    if options.criterion not in CRITERIA:
        raise MLAError(f"criterion: expected {' or '.join(CRITERIA)}, got {options.criterion!r}")
    check_tokens(heads, cal.numel())
    if sel.ndim != 2 or sel.shape[0] < 1 or sel.shape[1] < 2:
        raise MLAError(
            f"calibration: expected text left over to choose folds on, got windows {sel.shape}"
        )


class _Conversion:
    """One conversion at work."""

    def __init__(
        self,
        decoder: CheckpointDecoder,
        options: Options,
        partial: Partial,
        progress: Callable[[Step], None] | None,
    ):
        self.decoder, self.options, self.partial = decoder, options, partial
        self.heads, self.count = decoder.heads, decoder.count
        self.collapse = collapse_of(decoder.heads, options.rope)
        self._progress = progress
        self.scales: list[Tensor] = []  # [2 W] of a layer's keys and values
        self.moments: list[Tensor] = []
        self.bands: list[Fold] = []
        self.trials: list[Trial] = []

    def run(self, calibration: Tensor, selection: Tensor) -> MLAReport:
        """All passes, and the files."""
        h = self.decoder.embed(calibration)
        for i in range(self.count):
            found = self._gather(i, h)
            self.scales.append(self._scale(i, h))
            self.moments.append(self._scaled(i, found))
            if self.options.fold == BANDS:
                self.bands.append(self._bands(i, h))
            h = dec.advance(self.decoder, i, h)
            self._tell("statistics", i + 1, self.count)
        folds = self._folds(selection)
        rotations = [self._rotation(i, fold) for i, fold in enumerate(folds)]
        ranks = self._ranks(rotations)
        files = self._write_layers(calibration, selection, rotations, ranks)
        self._write_rest(files, folds, ranks, selection.shape[1])
        element, original = 2, 2 * self.heads.width
        W = self.heads.width
        return MLAReport(
            folds=folds,
            ranks=ranks,
            rope=self.options.rope,
            ppl_before=math.exp(self._scores["before"]),
            ppl_after=math.exp(self._scores["after"]),
            kl=self._scores["kl"],
            bytes_per_token=element * (sum(ranks) + self.count * self.options.rope),
            bytes_per_token_gqa=element * original * self.count,
            energy_kept=[
                energy_kept(m[:W, :W], r, self.options.rope)
                for m, r in zip(self.moments, rotations)
            ],
            trials=[dataclasses.asdict(t) for t in self.trials],
            seconds=0.0,
            peak_rss=0,
        )

    def _scale(self, i: int, h: Tensor) -> Tensor:
        """fp64 [2 W]: what layer i's keys and values are multiplied by, and queries divided by."""
        J, half = self.heads.J, self.heads.D // 2
        scale = torch.ones(J, half, dtype=torch.float64, device=h.device)
        if self.options.balance:
            energies = dec.query_energies(self.decoder, i, h)
            floor = LEAST_ENERGY * energies.mean()
            scale = energies.clamp_min(floor).sqrt() if floor > 0 else scale
            scale = scale / scale.mean()
        keys = torch.cat((scale, scale), -1).flatten()
        return torch.cat((keys, torch.ones_like(keys)))

    def _gather(self, i: int, h: Tensor) -> Tensor:
        found = dec.moments(self.decoder, i, h)
        check_finite(f"layer {i}: moments of keys and values on the calibration text", found)
        return found

    def _scaled(self, i: int, moments: Tensor) -> Tensor:
        """Moments of layer i's keys and values after :func:`balanced`."""
        return self.scales[i][:, None] * moments * self.scales[i]

    def _pairs(self, i: int) -> Tensor:
        W = self.heads.width
        return pair_moments(self.moments[i][:W, :W], self.heads)

    def _rotation(self, i: int, fold: Fold) -> Tensor:
        return rotation(self._pairs(i), self.heads, self.collapse, fold)

    def _original(self, i: int) -> GQA:
        """Layer i's attention, in fp64, keys and queries balanced."""
        scale = self.scales[i].view(2, self.heads.J, 2, -1)[0, :, 0]
        return balanced(self.decoder.layer(i).attention.to(torch.float64), scale)

    def _bands(self, i: int, h: Tensor) -> Fold:
        """Bands of layer i by its attention's output; h [N, T, hidden] enters the layer."""
        file = f"bands {i}"
        if file not in self.partial.finished:
            gqa = self._original(i).to(torch.float32)
            x = self.decoder.layer(i).normed(h[:WINDOWS])
            angles = self.decoder.angles(h.shape[1])
            search = BandSearch(gqa, x, angles, self._pairs(i), self.collapse)
            self.partial.note(file, {"bands": list(search.run(self._legal()))})
        return tuple(self.partial.finished[file]["bands"])

    def _legal(self) -> list[int]:
        return folds_of(self.heads, self.collapse)

    def _candidate(self, i: int, fold: Fold):
        """Layer i with partial RoPE, as selection tries it."""
        return partial_rope(self._original(i), self._rotation(i, fold), self.options.rope)

    def _folds(self, selection: Tensor) -> list[Fold]:
        wanted, legal = self.options.fold, self._legal()
        if not isinstance(wanted, str):
            return [wanted] * self.count if isinstance(wanted, int) else list(wanted)
        known = self.partial.finished.get("folds", {"folds": []})["folds"]
        if len(known) == self.count:
            return [tuple(f) if isinstance(f, list) else f for f in known]
        total = len(legal) * (self.count + 1 if wanted == ADAPTIVE else 1)

        def tell(trial: Trial) -> None:
            self.trials.append(trial)
            self._tell("folds", len(self.trials), total, trial.divergence)

        search = Search(self.decoder, selection, self._candidate, self.options.criterion, tell)
        uniform = [search.uniform(legal)] * self.count
        chosen = uniform if wanted == AUTO else self.bands
        if wanted == ADAPTIVE:

            def keep(found: list[int]) -> None:
                self.partial.note("folds", {"folds": found})

            chosen = search.adaptive(legal, known, keep)
        if wanted != AUTO:  # choices layer by layer may end worse than one for all
            chosen = min((chosen, uniform), key=lambda folds: search.run(0, folds))
        self.partial.note("folds", {"folds": chosen})
        return chosen

    def _components(self, moments: Tensor, rotated: Tensor) -> Components:
        return components(moments, rotated, self.options.rope)

    def _ranks(self, rotations: list[Tensor]) -> list[int]:
        rank = self.options.rank
        if not self.options.layer_ranks:
            return [rank] * self.count
        found = [self._components(m, r).energies for m, r in zip(self.moments, rotations)]
        most = 2 * self.heads.width - self.options.rope
        return allocate(found, rank, min(RANK_STEP, rank), most)

    def _write_layers(
        self, cal: Tensor, sel: Tensor, rotations: list[Tensor], ranks: list[int]
    ) -> dict[str, dict[str, int]]:
        """Write every layer's shard; the sizes of tensors by file."""
        source, arch = self.decoder.source, self.decoder.arch
        h, before, after = (self.decoder.embed(ids) for ids in (cal, sel, sel))
        files, total = {}, self.count + 1
        for i, (rotated, rank) in enumerate(zip(rotations, ranks)):
            gqa = self._original(i)
            parts = self._components(self._scaled(i, self._gather(i, h)), rotated)
            latent = to_latent(gqa, rotated, self.options.rope, parts, rank, self.options.hadamard)
            prefix = f"{arch.layer(i)}."
            attention = f"{prefix}self_attn."
            stored = source.tensors[f"{attention}q_proj.weight"].dtype
            tensors = _tensors(attention, latent.to("cpu"), _DTYPES.get(stored, torch.float32))
            copied = (n for n in source.tensors if n.startswith(prefix) and attention not in n)
            tensors |= {n: source.read(n) for n in copied}
            file = _file(i + 1, total)
            if file not in self.partial.finished:
                self.partial.write_shard(file, tensors, {})
            files[file] = {n: t.nbytes for n, t in tensors.items()}
            partial = partial_rope(gqa, rotated, self.options.rope)
            h = dec.advance(self.decoder, i, h, partial.to(torch.float32))
            before = dec.advance(self.decoder, i, before)
            after = dec.advance(self.decoder, i, after, latent.to(torch.float32))
            self._tell("layers", i + 1, self.count)
        self._scores = {
            "before": dec.divergence(self.decoder, before, None, sel),
            "after": dec.divergence(self.decoder, after, None, sel),
            "kl": dec.divergence(self.decoder, after, before, sel),
        }
        return files

    def _write_rest(
        self, files: dict[str, dict[str, int]], folds: list[int], ranks: list[int], window: int
    ) -> None:
        """Embedding, norm and head; index, config.json, and what is carried over."""
        source, arch = self.decoder.source, self.decoder.arch
        rest = [n for n in source.tensors if not n.startswith(f"{arch.layers}.")]
        file = _file(self.count + 1, self.count + 1)
        if file not in self.partial.finished:
            self.partial.write_shard(file, {n: source.read(n) for n in sorted(rest)}, {})
        files[file] = {n: source.tensors[n].nbytes for n in rest}
        index = {
            "metadata": {"total_size": sum(sum(f.values()) for f in files.values())},
            "weight_map": {n: file for file, f in files.items() for n in sorted(f)},
        }
        self.partial.write_text(INDEX, json.dumps(index, indent=2) + "\n")
        config = _config(self.decoder, self.options, folds, ranks)
        config["conversion"]["window"] = window  # of the text that folds were chosen on
        self.partial.write_text(CONFIG, json.dumps(config, indent=2) + "\n")
        carry_over(source, self.partial)

    def _tell(self, stage: str, done: int, total: int, divergence: float | None = None) -> None:
        if self._progress is not None:
            self._progress(Step(stage, done, total, divergence))


_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _file(number: int, total: int) -> str:
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def _tensors(prefix: str, latent: Latent, dtype: torch.dtype) -> dict[str, Tensor]:
    """The stored tensors of one attention."""
    found = {
        "q_proj.weight": latent.q,
        "q_proj.bias": latent.q_bias,
        "kv_a_proj_with_mqa.weight": latent.kv_a,
        "kv_a_proj_with_mqa.bias": latent.kv_a_bias,
        "kv_b_proj.weight": latent.kv_b,
        "o_proj.weight": latent.o,
        "o_proj.bias": latent.o_bias,
    }
    return {prefix + n: t.to(dtype).contiguous() for n, t in found.items() if t is not None}


_KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("tie_word_embeddings", "attention_dropout", "mlp_bias", "dtype", "torch_dtype"),
)
"""Fields of config.json that mean the same after the conversion."""


def _config(
    decoder: CheckpointDecoder, options: Options, folds: list[int], ranks: list[int]
) -> dict[str, Any]:
    """config.json of the result."""
    source, D = decoder.source, decoder.heads.D
    attention = f"{decoder.arch.layer(0)}.self_attn."
    windows = [decoder.window(i) for i in range(decoder.count)]
    return {
        "architectures": [presets.MLA],
        "model_type": "tessella_mla",
        **{k: source.config[k] for k in _KEPT if k in source.config},
        "kv_lora_rank": max(ranks),
        "layer_kv_lora_ranks": ranks if len(set(ranks)) > 1 else None,
        "q_lora_rank": None,
        "qk_rope_head_dim": options.rope,
        "qk_nope_head_dim": D,
        "v_head_dim": D,
        "qk_latent_layernorm": False,
        "rope_parameters": decoder.rope,
        "attention_bias": f"{attention}q_proj.bias" in source.tensors,
        "attention_output_bias": f"{attention}o_proj.bias" in source.tensors,
        "sliding_window": next((w for w in windows if w), None),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
        "conversion": {
            "tessella_version": __version__,
            "source": source.path.resolve().name,
            "fold": options.fold,
            "balance": options.balance,
            "folds": folds,
            "hadamard": options.hadamard,
            "layer_ranks": options.layer_ranks,
            "criterion": options.criterion,
        },
    }


def _fingerprint(
    source: Checkpoint, options: Options, texts: tuple[Tensor, ...], device: str
) -> dict[str, Any]:
    """What the bytes of the result depend on, by topic."""
    digest = hashlib.sha256()
    for ids in texts:
        digest.update(str(tuple(ids.shape)).encode() + ids.contiguous().numpy().tobytes())
    return {
        "options": dataclasses.asdict(options),
        "calibration text": digest.hexdigest(),
        **source_fingerprint(source, device),
    }
