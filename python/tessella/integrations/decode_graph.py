"""Decoding under CUDA graphs: steps of one token a request, replayed with new lengths.

A graph is captured for batches of up to 1, 2, 4, ... requests, with every input of a step in
buffers of fixed size: tokens, positions, slots, block table, lengths and plan. A step fills the
buffers and replays; requests that a batch lacks are stood in for by ones whose token is stored
nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tessella import ops
from tessella.formats_kv import KV4Pages, MsmBatch
from tessella.kv.cache import PagedKVCache
from tessella.kv.step import workers

PLAN_WORDS = 1 << 13
"""Room for a plan: about 900 tasks, several for each of 64 requests."""


@dataclass
class _Inputs:
    """What a graph reads, all on the GPU."""

    ids: Tensor
    positions: Tensor
    slots: Tensor
    batch: MsmBatch
    plan: Tensor


class GraphStep:
    """A step's attention over the fixed buffers of a graph; stands in for kv.step.Step."""

    def __init__(self, cache: PagedKVCache, inputs: _Inputs):
        self.cache, self.inputs = cache, inputs

    def attend(
        self,
        layer: int,
        q_THD: Tensor,
        k_TJD: Tensor,
        v_TJD: Tensor,
        *,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Append and attend: [T, H, D]."""
        pages, now = self.cache.main.layers[layer], self.inputs
        how = {"scale": scale, "softcap": softcap, "sinks": sinks, "plan": now.plan}
        if not isinstance(pages, KV4Pages):
            ops.msm_append(k_TJD, v_TJD, now.slots, pages)
            return ops.msm_attn(q_THD, pages, now.batch, **how)
        factors = self.cache.factors[layer]
        ops.kv4_append(k_TJD, v_TJD, now.slots, pages, factors=factors)
        return ops.kv4_attn(q_THD, pages, now.batch, factors=factors, **how)


class DecodeGraphs:
    """Captured decode steps of a model over a cache, by the size of their batch."""

    def __init__(self, model: nn.Module, cache: PagedKVCache, heads: int, forward):
        """
        Args:
            model: on a GPU.
            cache: its pages stay where they are from now on.
            heads: query heads.
            forward: (ids [1, T], positions [1, T], step) -> logits [T, V].
        """
        self.model, self.cache, self.heads, self._forward = model, cache, heads, forward
        self.replays = 0
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, _Inputs, Tensor]] = {}
        self._pool = None

    @staticmethod
    def serves(model: nn.Module, cache: PagedKVCache) -> bool:
        """Whether steps of this model and cache can be captured.

        Not on CPUs, not with codecs that keep something for each sequence, not under a window.
        """
        config = model.config.get_text_config()
        windowed = getattr(config, "sliding_window", None) and getattr(
            config, "use_sliding_window", True
        )
        return model.device.type == "cuda" and not cache.has_rows and not windowed

    def run(self, ids: list[int], handles: list[int], slots: Tensor) -> Tensor:
        """Logits [n, V] of one token of each of n sequences, which have room for it already."""
        n = len(ids)
        size = 1 << (n - 1).bit_length()
        table = self.cache.main.table
        sequences = [table[self.cache.inner(h)] for h in handles]
        lengths = [s.length for s in sequences] + [1] * (size - n)
        batch = MsmBatch(
            torch.zeros(size, self._most_blocks(), dtype=torch.int32),
            torch.arange(size + 1, dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
        )
        for row, s in zip(batch.block_table, sequences):
            row[: len(s.blocks)] = torch.tensor(s.blocks, dtype=torch.int32)
        plan = self._plan(batch)
        if size not in self._graphs:
            self._graphs[size] = self._capture(size, batch, plan)
        graph, now, logits = self._graphs[size]
        now.ids[0, :n] = torch.tensor(ids)
        now.positions[0] = torch.tensor(lengths) - 1
        now.slots.fill_(-1)
        now.slots[:n] = slots
        now.batch.block_table.copy_(batch.block_table)
        now.batch.kv_len.copy_(batch.kv_len)
        now.plan[: len(plan)] = plan.to(now.plan.device)
        graph.replay()
        self.replays += 1
        return logits[:n]

    def _most_blocks(self) -> int:
        return len(self.cache.main.table.pool.holders)

    def _plan(self, batch: MsmBatch) -> Tensor:
        units = workers(self.model.device)
        while True:
            plan = ops.msm_plan(batch, self.heads, self.cache.shape.J, units=units)
            if len(plan) <= PLAN_WORDS or units == 1:
                return plan
            units //= 2  # fewer parts

    def _capture(self, size: int, batch: MsmBatch, plan: Tensor):
        device = self.model.device
        words = max(PLAN_WORDS, len(plan))
        now = _Inputs(
            torch.zeros(1, size, dtype=torch.int64, device=device),
            torch.zeros(1, size, dtype=torch.int64, device=device),
            torch.full((size,), -1, dtype=torch.int64, device=device),
            MsmBatch(*(t.to(device) for t in (batch.block_table, batch.cu_q, batch.kv_len))),
            torch.zeros(words, dtype=torch.int32, device=device),
        )
        now.plan[: len(plan)] = plan.to(device)
        step = GraphStep(self.cache, now)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # nothing is stored: every slot is -1
            for _ in range(2):
                self._forward(now.ids, now.positions, step)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward(now.ids, now.positions, step)
        self._pool = self._pool or graph.pool()
        return graph, now, logits
