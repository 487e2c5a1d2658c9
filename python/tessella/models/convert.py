"""Converts a Hugging Face checkpoint to 4 bit, one decoder layer at a time.

Memory is bounded by the largest layer and its output: weights are read one by one, and each
layer becomes one shard of the result. See :mod:`tessella.models.partial` for what happens when a
conversion is interrupted, and docs/formats.md for what is written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessella._version import __version__
from tessella.formats import FORMAT_VERSION
from tessella.models.apply import Applier, Calibration, memory_estimate
from tessella.models.checkpoint import CONFIG, INDEX, Checkpoint
from tessella.models.config import LayerFormat, QuantizationConfig
from tessella.models.errors import CheckpointError, ConversionError
from tessella.models.hub import CARRIED, resolve
from tessella.models.partial import Partial, check_target, free_bytes
from tessella.models.plan import Linear, Shard, check_source, is_tied, plan
from tessella.models.report import LayerRecord, Progress, Report, peak_rss
from tessella.quant import kv
from tessella.quant.calibrate import CalibrationError
from tessella.quant.recipe import Recipe
from tessella.quant.rtn import relative_error

SAMPLE_BYTES, SAMPLES = 1 << 16, 16
"""A source file is recognised by size, time stamp and this many samples of its contents."""


def convert(
    model: str | os.PathLike,
    out: str | os.PathLike,
    recipe: Recipe,
    *,
    device: str = "cpu",
    resume: bool = False,
    dry_run: bool = False,
    progress: Callable[[Progress], None] | None = None,
    calibration: Calibration | None = None,
) -> Report:
    """Convert a checkpoint into the folder `out`.

    Args:
        model: a folder, or a hub id (then the checkpoint is downloaded first).
        out: folder to create; it must not exist, or be empty. Work is done in ``<out>.partial``.
        recipe: what to do.
        device: where the weights are quantised.
        resume: go on from the shards that an interrupted conversion left; the result has the
            same bytes as an uninterrupted one. Without it such shards are discarded.
        dry_run: check everything that can be checked without reading weights, and report sizes;
            nothing is written.
        progress: called after every linear.
        calibration: text through the model, for recipes whose steps need it; for others it makes
            the report tell errors of results.

    Raises:
        ConversionError: for everything that can be wrong with source, recipe, target, device or
            disk; the message names file and tensor, expected and got. Nothing is left at `out`.
    """
    started = time.perf_counter()
    target = Path(out).expanduser().resolve()
    check_target(target)
    check_device(device)
    try:
        source = Checkpoint.open(resolve(model))
        _check_cache(source, recipe)
        _check_calibration(recipe, calibration)
        shards = plan(source, recipe)
        if dry_run:
            layers = [_record(linear, None) for shard in shards for linear in shard.linears]
        else:
            layers, shards = _run(
                source, shards, recipe, target, device, resume, progress, calibration
            )
    except (CheckpointError, CalibrationError) as e:
        raise ConversionError(str(e)) from e
    return Report(
        layers=layers,
        bytes_in=source.nbytes,
        bytes_out=sum(shard.nbytes for shard in shards),
        seconds=time.perf_counter() - started,
        peak_rss=peak_rss(),
        memory_estimate=memory_estimate(source, shards, recipe, calibration),
    )


def _run(
    source: Checkpoint,
    shards: list[Shard],
    recipe: Recipe,
    target: Path,
    device: str,
    resume: bool,
    progress: Callable[[Progress], None] | None,
    calibration: Calibration | None,
) -> tuple[list[LayerRecord], list[Shard]]:
    """Write every shard that is not finished yet, then the small files, then publish.

    Returns the records and the shards as they were stored.
    """
    records: list[LayerRecord] = []
    formats: dict[str, LayerFormat] = {}
    total, bytes_done = sum(len(shard.linears) for shard in shards), 0

    def advance(record: LayerRecord, nbytes: int) -> None:
        nonlocal bytes_done
        records.append(record)
        bytes_done += nbytes
        if progress:
            progress(Progress(len(records), total, record.name, bytes_done))

    with Partial(target, _fingerprint(source, recipe, device, calibration), resume) as partial:
        _check_space(shards, partial)
        stats = None
        if calibration is not None:
            todo = [shard for shard in shards if shard.file not in partial.finished]
            count = check_source(source)[1]
            needed = {count if shard.layer is None else shard.layer for shard in todo}
            if not any(shard.layer is None and shard.linears for shard in todo):
                needed -= {count}
            stats = calibration.collect(recipe, needed.__contains__)
        applier = Applier(source, recipe, device, stats)
        for shard in shards:
            bytes_done += sum(info.nbytes for info in shard.copied.values())
            if finished := partial.finished.get(shard.file):
                for linear, record in zip(shard.linears, finished["records"]):
                    advance(
                        LayerRecord(**record | {"shape": linear.shape}),
                        source.tensors[linear.source].nbytes,
                    )
                formats |= {name: LayerFormat(**f) for name, f in finished["formats"].items()}
                continue
            first = len(records)
            if recipe.changes or calibration:
                tensors, stored = applier.shard(shard, advance)
            else:
                tensors, stored = _plain(source, shard, recipe, device, advance)
            formats |= stored
            made = {
                "records": [dataclasses.asdict(record) for record in records[first:]],
                "formats": {name: dataclasses.asdict(f) for name, f in stored.items()},
            }
            partial.write_shard(shard.file, tensors, made)
            del tensors
        shards = [_stored(shard, formats) for shard in shards]
        _write_small_files(source, shards, recipe, partial, formats)
        partial.publish()
    return records, shards


def _stored(shard: Shard, formats: dict[str, LayerFormat]) -> Shard:
    """A shard as it was stored: a step may leave out a permutation that was planned for."""
    linears = [dataclasses.replace(x, format=formats[x.name]) for x in shard.linears]
    return dataclasses.replace(shard, linears=linears)


def _plain(
    source: Checkpoint,
    shard: Shard,
    recipe: Recipe,
    device: str,
    advance: Callable[[LayerRecord, int], None],
) -> tuple[dict[str, Tensor], dict[str, LayerFormat]]:
    """A shard's tensors and formats where weights do not depend on each other."""
    tensors = {}
    for linear in shard.linears:
        converted, rel_error = _quantize(source, linear, recipe, device)
        tensors.update(converted)
        advance(_record(linear, rel_error), source.tensors[linear.source].nbytes)
    tensors.update({name: source.read(name) for name in shard.copied})
    return tensors, {linear.name: linear.format for linear in shard.linears}


def _quantize(
    source: Checkpoint, linear: Linear, recipe: Recipe, device: str
) -> tuple[dict[str, Tensor], float]:
    """A linear's stored tensors by full name, and its relative error."""
    w_NK = source.read(linear.source).to(device)
    try:
        q = recipe.quantize(w_NK)
    except ValueError as e:
        file = source.tensors[linear.source].file
        raise CheckpointError(f"{file}: tensor {linear.source!r}: {e}") from e
    tensors = {f"{linear.name}.{field}": t.cpu() for field, t in q.tensors().items()}
    return tensors, relative_error(w_NK, q)


def _record(linear: Linear, rel_error: float | None) -> LayerRecord:
    return LayerRecord(linear.name, linear.shape, linear.format.scheme, rel_error, linear.nbytes)


def _write_small_files(
    source: Checkpoint,
    shards: list[Shard],
    recipe: Recipe,
    partial: Partial,
    formats: dict[str, LayerFormat],
) -> None:
    """The index, config.json, and what is carried over: tokenizer, chat template, licence."""
    index = {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": {name: shard.file for shard in shards for name in sorted(shard.sizes)},
    }
    partial.write_text(INDEX, json.dumps(index, indent=2) + "\n")
    config: dict[str, Any] = dict(source.config)
    own = any(linear.name + ".weight" != linear.source for s in shards for linear in s.linears)
    if own or (recipe.turns and is_tied(source)):
        config["tie_word_embeddings"] = False
    config["quantization_config"] = QuantizationConfig(recipe, formats).to_dict()
    partial.write_text(CONFIG, json.dumps(config, indent=2) + "\n")
    carry_over(source, partial)


def carry_over(source: Checkpoint, partial: Partial) -> None:
    """Copy what stands beside the weights: tokenizer, chat template, licence."""
    for pattern in CARRIED:
        for file in sorted(source.path.glob(pattern)):
            if file.is_file():
                partial.copy_file(file, str(file.relative_to(source.path)))


def _check_cache(source: Checkpoint, recipe: Recipe) -> None:
    """Refuse (CheckpointError) a cache codec that does not fit the model's heads."""
    config = source.config
    if recipe.cache is None:
        return
    D = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if latent := "kv_lora_rank" in config:
        D = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    try:
        codec = kv.parse(recipe.cache)
        if not (latent and isinstance(codec, kv.LatentCodec)):
            codec.check(D)
    except kv.CodecError as e:
        raise CheckpointError(f"{source.path / CONFIG}: {e}") from None


def _check_calibration(recipe: Recipe, calibration: Calibration | None) -> None:
    """Refuse (ConversionError) a recipe whose steps need inputs that nobody gave."""
    if recipe.needs and calibration is None:
        steps = [s["use"] for s, step in zip(recipe.to_dict()["steps"], recipe.steps) if step.needs]
        raise ConversionError(
            f"recipe {recipe.name!r}: {', '.join(steps)}: expected a calibration text (--calib "
            "FILE), got none; 'w4a8' and 'w4a8kv4-rtn' need none"
        )


def check_device(device: str) -> None:
    """Refuse (ConversionError) a device that torch cannot use."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:  # torch without CUDA asserts
        reason = str(e).strip().split("\n")[0]
        raise ConversionError(
            f"device: expected a usable torch device, got {device!r}: {reason}"
        ) from e


def _check_space(shards: list[Shard], partial: Partial) -> None:
    """Refuse before any work when the disk cannot hold the result."""
    needed = sum(shard.nbytes for shard in shards if shard.file not in partial.finished)
    if (free := free_bytes(partial.folder)) < needed:
        raise ConversionError(
            f"{partial.folder}: expected {needed} bytes of free disk space for the result, "
            f"got {free}"
        )


def _fingerprint(
    source: Checkpoint, recipe: Recipe, device: str, calibration: Calibration | None
) -> dict[str, Any]:
    """What the bytes of the result depend on, by topic."""
    own = {"recipe": recipe.to_dict(), "calibration": calibration and calibration.digest()}
    return {**own, **source_fingerprint(source, device)}


def source_fingerprint(source: Checkpoint, device: str) -> dict[str, Any]:
    """What every conversion of a checkpoint depends on."""
    files = sorted({info.file for info in source.tensors.values()})
    files += [source.path / CONFIG]
    return {
        "source": {file.name: _file_fingerprint(file) for file in files},
        "tessella version": __version__,
        "format version": FORMAT_VERSION,
        "device type": torch.device(device).type,
    }


def _file_fingerprint(file: Path) -> str:
    stat = file.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} ".encode())
    with file.open("rb") as f:
        for i in range(SAMPLES):
            f.seek(i * max(0, stat.st_size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(f.read(SAMPLE_BYTES))
    return digest.hexdigest()
