"""Applies a recipe's steps to a checkpoint, a decoder layer at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessella.formats import BLOCK_K, padded_k
from tessella.models import presets
from tessella.models.checkpoint import Checkpoint
from tessella.models.config import LayerFormat
from tessella.models.errors import CheckpointError
from tessella.models.plan import Linear, Shard, check_source
from tessella.models.report import LayerRecord
from tessella.quant import rtn
from tessella.quant.calibrate import HEAD, SITES, LayerStats, Stats, Stream, collect, digest_of
from tessella.quant.error import output_error, some_rows
from tessella.quant.fmpq import rotate_blocks
from tessella.quant.layer import Acts, Heads, Layer
from tessella.quant.recipe import Recipe
from tessella.quant.rtn import relative_error

SITE_OF = {linear: site for site, linears in SITES.items() for linear in linears}
"""The site that each linear of a layer reads."""

OUTER_ROWS = 8192
"""Rows of the embedding and the head that are changed at a time."""


@dataclass(frozen=True)
class Calibration:
    """A model's layers and the tokens to send through them; see :mod:`tessella.quant.calibrate`.

    `cache`: folder that keeps statistics between conversions, or None.
    """

    stream: Stream
    batches: Sequence[Tensor]
    cache: Path | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all batches."""
        return sum(b.numel() for b in self.batches)

    def digest(self) -> str:
        """What results depend on besides the model."""
        return digest_of(self.batches)

    def collect(self, recipe: Recipe, needed: Callable[[int], bool]) -> Iterator[LayerStats]:
        """Statistics for a recipe, of the layers that are needed."""
        wants = recipe.needs & {"hessian"}
        return collect(self.stream, self.batches, wants=wants, cache=self.cache, needed=needed)


class Applier:
    """Makes the tensors of shards as a recipe says; memory holds one decoder layer.

    Args:
        stats: statistics of the layers that :meth:`shard` will be asked for, in this order; None
            without a calibration.
    """

    def __init__(
        self, source: Checkpoint, recipe: Recipe, device: str, stats: Iterator[LayerStats] | None
    ):
        self.source, self.recipe, self.device, self.stats = source, recipe, device, stats
        self.arch, self.layers = check_source(source)
        self._heads = heads_of(source)

    def shard(
        self, shard: Shard, advance: Callable[[LayerRecord, int], None]
    ) -> tuple[dict[str, Tensor], dict[str, LayerFormat]]:
        """Tensors by name, and how each linear is stored; `advance` is told of each linear."""
        if shard.layer is None:
            return self._outer(shard, advance)
        prefix = self.arch.layer(shard.layer) + "."
        layer = self._read(shard, prefix)
        before = {linear.name: self._error(layer, linear, prefix) for linear in shard.linears}
        for step in self.recipe.changes:
            step.change(layer)
        tensors, formats = {}, {}
        for linear in shard.linears:
            site = SITE_OF[linear.name.removeprefix(prefix)]
            acts, stats = layer.acts[site], layer.stats.get(site)
            w_NK = layer.tensors.pop(f"{linear.name}.weight".removeprefix(prefix))
            formats[linear.name] = self._format(linear, acts)
            parts, record = self._codes(linear, w_NK, stats, formats[linear.name])
            if acts.perm is not None:
                parts[f"{linear.name}.perm"] = acts.perm.to("cpu", torch.int32)
            tensors |= parts
            advance(
                dataclasses.replace(record, before=before[linear.name]),
                self.source.tensors[linear.source].nbytes,
            )
        for name in shard.copied:
            tensors[name] = self._dense(layer, name, prefix)
        return tensors, formats

    def _read(self, shard: Shard, prefix: str) -> Layer:
        """The layer's tensors in fp32 (fp64 stays), and its statistics."""
        names = [*shard.copied, *(linear.source for linear in shard.linears)]
        tensors = {name.removeprefix(prefix): self._float(name) for name in names}
        found = self._next(shard.layer)
        layer = Layer(shard.layer, self._heads, self.recipe.target, tensors)
        if found is not None:
            layer.stats, layer.key_radius = found.sites, found.key_radius
        return layer

    def _next(self, index: int) -> LayerStats | None:
        found = None if self.stats is None else next(self.stats).to(self.device)
        if found is not None and found.index != index:
            raise AssertionError(f"statistics of layer {found.index} instead of {index}")
        return found

    def _float(self, name: str) -> Tensor:
        t = self.source.read(name).to(self.device)
        return t if t.dtype == torch.float64 else t.float()

    def _error(self, layer: Layer, linear: Linear, prefix: str) -> float | None:
        """Error of the linear's results if nothing were done but rounding to nearest."""
        name = linear.name.removeprefix(prefix)
        stats = layer.stats.get(SITE_OF[name])
        if stats is None:
            return None
        w = some_rows(layer.tensors[f"{name}.weight"])
        return self._results_error(linear, w, rtn.quantize(w, self.recipe.scheme), stats, None)

    def _results_error(
        self, linear: Linear, w: Tensor, q: Any, stats: Stats | None, k8: int | None
    ) -> float | None:
        if stats is None:
            return None
        k8 = linear.format.k8 if k8 is None else k8
        return output_error(w, q, stats.rows, k8=k8, granularity=self.recipe.granularity)

    def _format(self, linear: Linear, acts: Acts) -> LayerFormat:
        """How a linear is stored. Raises CheckpointError for what no kernel can honour."""
        k8 = linear.format.k8 if acts.k8 is None else acts.k8
        K = linear.shape[1]
        if k8 > padded_k(K) or (k8 > 0 and k8 % BLOCK_K):
            raise CheckpointError(
                f"recipe {self.recipe.name!r}: {linear.name}: expected INT8 channels in blocks of "
                f"{BLOCK_K} up to {padded_k(K)}, got {k8}"
            )
        if self.recipe.granularity == "token" and 0 < k8 < padded_k(K):
            raise CheckpointError(
                f"recipe {self.recipe.name!r}: {linear.name}: activations.granularity: 'token' "
                f"needs one precision, got {k8} INT8 channels of {K}; use 'class' or 'block'"
            )
        return dataclasses.replace(
            linear.format, k8=k8, perm=acts.perm is not None, hadamard=acts.hadamard
        )

    def _codes(
        self, linear: Linear, w_NK: Tensor, stats: Stats | None, stored: LayerFormat
    ) -> tuple[dict[str, Tensor], LayerRecord]:
        try:
            q = self.recipe.quantize(w_NK, stats)
        except ValueError as e:
            file = self.source.tensors[linear.source].file
            raise CheckpointError(f"{file}: tensor {linear.source!r}: {e}") from e
        tensors = {f"{linear.name}.{field}": t.cpu() for field, t in q.tensors().items()}
        after = None
        if stats is not None:
            rows = {f: some_rows(t) for f, t in q.tensors().items()}
            part = type(q).from_tensors(rows, q.scheme, q.K)
            after = self._results_error(linear, some_rows(w_NK), part, stats, stored.k8)
        error = relative_error(w_NK, q)
        nbytes = dataclasses.replace(linear, format=stored).nbytes
        record = LayerRecord(linear.name, linear.shape, stored.scheme, error, nbytes, after=after)
        return tensors, record

    def _dense(self, layer: Layer, name: str, prefix: str) -> Tensor:
        """A tensor that is not quantised, in the dtype of the source."""
        short = name.removeprefix(prefix)
        t = layer.tensors[short]
        site = SITE_OF.get(short.removesuffix(".weight"))
        acts = layer.acts[site] if site and short.endswith(".weight") else Acts()
        if acts.hadamard:  # nobody rotates or permutes its activations
            t = rotate_blocks(t, acts.k8)
        if acts.perm is not None:
            t = t[:, acts.perm.argsort()]
        return t.to(self.source.read(name).dtype).cpu().contiguous()

    def _outer(
        self, shard: Shard, advance: Callable[[LayerRecord, int], None]
    ) -> tuple[dict[str, Tensor], dict[str, LayerFormat]]:
        """Embedding, final norm, head, and what belongs to no layer."""
        tensors, formats = {}, {}
        for linear in shard.linears:
            found = self._next(self.layers)
            stats = None if found is None else found.sites[HEAD]
            if stats is not None and self.recipe.turns:
                self._turn_stats(stats)
            w_NK = self._changed("head", linear.source).to(self.device)
            parts, record = self._codes(linear, w_NK, stats, linear.format)
            tensors |= parts
            formats[linear.name] = linear.format
            advance(record, self.source.tensors[linear.source].nbytes)
        arch = self.arch
        roles = {arch.embedding: "embedding", arch.final_norm: "norm", arch.head: "head"}
        for name, info in shard.copied.items():
            role = roles.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            stored = name if name in self.source.tensors else f"{arch.embedding}.weight"
            tensors[name] = self._changed(role, stored)
            assert tuple(tensors[name].shape) == info.shape
        return tensors, formats

    def _changed(self, role: str | None, name: str) -> Tensor:
        """A tensor outside the layers after all steps, in the dtype of the source."""
        t = self.source.read(name)
        if role is None or not self.recipe.turns:
            return t
        gain = self._float(f"{self.arch.final_norm}.weight")
        for rows in t.split(OUTER_ROWS):  # views: changed in place
            x = rows.to(self.device)
            x = x if x.dtype == torch.float64 else x.float()
            for step in self.recipe.changes:
                x = step.change_outer(role, x, gain)
            rows.copy_(x)
        return t

    def _turn_stats(self, stats: Stats) -> None:
        """The head's inputs after the steps: without the norm's gain, and turned."""
        gain = self._float(f"{self.arch.final_norm}.weight")
        stats.scale(torch.where(gain == 0, 0.0, 1 / gain))
        ones = torch.ones_like(gain)
        for step in self.recipe.changes:
            stats.rotate(lambda x, step=step: step.change_outer("head", x, ones))


def heads_of(source: Checkpoint) -> Heads:
    """Heads of a checkpoint, from its config."""
    config = source.config
    H = config["num_attention_heads"]
    D = config.get("head_dim") or config["hidden_size"] // H
    arch = presets.architecture(config, source.config_file)
    qk_norm = any(name.endswith(".q_norm") for name in arch.norms)
    return Heads(H, config.get("num_key_value_heads") or H, D, qk_norm)


def memory_estimate(
    source: Checkpoint, shards: Sequence[Shard], recipe: Recipe, calibration: Calibration | None
) -> int:
    """Bytes of memory that a conversion takes at its peak, the interpreter's own included."""
    largest = 0
    for shard in shards:
        weights = sum(linear.shape[0] * linear.shape[1] * 4 for linear in shard.linears)
        dense = sum(info.nbytes for info in shard.copied.values())
        if shard.layer is None:
            work = 2 * dense + 2 * weights
        elif not (recipe.changes or calibration):
            one = max((linear.shape[0] * linear.shape[1] for linear in shard.linears), default=0)
            work = dense + shard.nbytes + 2 * one
        else:
            work = 2 * weights + shard.nbytes + dense
        if calibration is not None and shard.layer is not None:
            K = [linear.shape[1] for linear in shard.linears] or [0]
            hessian = 4 * max(K) ** 2 if "hessian" in recipe.needs else 0
            work += weights + 7 * hessian  # itself, its factors, and their inverse
        largest = max(largest, work)
    hidden = 0
    if calibration is not None:
        hidden = calibration.tokens * source.config["hidden_size"] * 4
    return PROCESS_BYTES + largest + hidden


PROCESS_BYTES = 400 << 20
"""Resident memory of a process with torch and transformers loaded, before any work."""
