"""A small engine: many requests over one paged cache, prefill, decode and verification mixed.

Every step fills a budget of tokens. Running requests come first, each with its last token or with a
tree of drafts behind it; what is left goes to prompts, whole or in chunks, and a prompt begins
after the longest prefix that the cache has already (XY-Serve's token-wise scheduling). The tokens
of all requests go through the model as one ragged row, and each layer attends with one call.

Decoding is greedy. A drafted token is kept where the model predicts it, so the text is the same
with and without drafts; only the number of steps differs. (Kernels for few and for many rows round
apart: where two tokens are as likely to within that, either may come.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from tessella.integrations.decode_graph import DecodeGraphs, GraphStep
from tessella.integrations.draft import Tree, draft
from tessella.integrations.latent import LatentLayer
from tessella.integrations.paged import (
    PAGE_SIZE,
    PagedLayer,
    head_dim,
    latent_shapes,
    paged_cache,
)
from tessella.kv.cache import CacheFullError, CacheShape, PagedKVCache
from tessella.kv.step import Step
from tessella.quant.kv import LatentCodec

MOST_DRAFTS = 255
"""Drafted tokens of a request and step: trees of 256 nodes are plenty."""


class RunnerError(ValueError):
    """A request that the runner cannot serve."""


@dataclass
class Request:
    """A prompt and what became of it."""

    prompt: list[int]
    max_new_tokens: int
    on_token: Callable[[int], None] | None = None
    tokens: list[int] = field(default_factory=list)
    """New tokens."""
    steps: int = 0
    """Steps of the model that this request took part in."""
    handle: int = -1
    done: bool = False

    @property
    def text(self) -> list[int]:
        """Prompt and new tokens."""
        return self.prompt + self.tokens


@dataclass
class Stats:
    """What a runner did."""

    steps: int = 0
    rows: int = 0
    """Tokens that went through the model."""
    mixed: int = 0
    """Steps that had prefill rows beside others."""
    reused: int = 0
    """Prompt tokens that were in the cache already."""


class Runner:
    """Greedy generation for many requests; :meth:`submit`, then :meth:`run`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        codec: str | None = None,
        tokens: int = 4096,
        budget: int = 512,
        speculate: int = 0,
        page_size: int = PAGE_SIZE,
        eos: frozenset[int] = frozenset(),
        sequences: int = 32,
    ):
        """
        Args:
            model: a causal LM of transformers whose attention is torch's or this package's.
            codec: of the cache, a name of :mod:`tessella.quant.kv`; None: as for
                :func:`~tessella.integrations.paged.paged_cache`.
            tokens: of all requests that the cache has room for.
            budget: tokens of a step, at least 1; a longer prompt is taken in chunks.
            speculate: drafted tokens of a request and step, 0 to 255.
            page_size: tokens of a page.
            eos: tokens that end a request.
            sequences: most requests at a time.

        Raises:
            RunnerError: a budget or a number of drafts out of range, or drafts with a codec that
                does not code each token by itself.
            ValueError: a codec that does not exist or does not fit the model.
        """
        head = paged_cache(model, codec)  # switches the attention, finds the codec
        if budget < 1 or not 0 <= speculate <= MOST_DRAFTS:
            raise RunnerError(
                f"runner: expected budget >= 1 and speculate in 0..{MOST_DRAFTS}, "
                f"got {budget} and {speculate}"
            )
        if speculate and not head.codec.token_exact:
            raise RunnerError(
                "runner: speculate: expected a codec that codes each token by itself, such as kv4 "
                f"or kv4-hadamard, got {head.codec.name}"
            )
        config = model.config.get_text_config()
        latents = latent_shapes(config) if isinstance(head.codec, LatentCodec) else ()
        shape = CacheShape(
            config.num_hidden_layers,
            1 if latents else config.num_key_value_heads,
            0 if latents else head_dim(config),
            model.dtype,
            str(model.device),
            latents,
        )
        self.model = model
        self.positions = getattr(config, "max_position_embeddings", None)
        self.budget, self.speculate, self.eos, self.most = budget, speculate, eos, sequences
        self.cache = PagedKVCache(
            shape,
            head.codec,
            pages=-(-tokens // page_size),
            page_size=page_size,
            sequences=sequences,
        )
        self.graphs = None
        if DecodeGraphs.serves(model, self.cache):
            heads = config.num_attention_heads
            self.graphs = DecodeGraphs(model, self.cache, heads, self._logits)
        self.stats = Stats()
        self._waiting: list[Request] = []
        self._running: list[Request] = []

    def submit(
        self,
        prompt: list[int],
        max_new_tokens: int,
        on_token: Callable[[int], None] | None = None,
    ) -> Request:
        """Queue a prompt; `on_token` is called with each new token.

        Raises RunnerError: no tokens, nothing to generate, or more than the model's positions.
        """
        if not prompt or max_new_tokens < 1:
            raise RunnerError("runner: expected at least one prompt token and one new token")
        total = len(prompt) + max_new_tokens
        if self.positions is not None and total > self.positions:
            raise RunnerError(
                f"runner: prompt of {len(prompt)} tokens and {max_new_tokens} new ones: expected "
                f"at most the model's {self.positions} positions"
            )
        request = Request(list(prompt), max_new_tokens, on_token)
        self._waiting.append(request)
        return request

    @torch.inference_mode()
    def run(self) -> Stats:
        """Step until every request is done. Raises CacheFullError if one does not fit at all."""
        while self._waiting or self._running:
            self.step()
        return self.stats

    def step(self) -> None:
        """One pass of the model over as many tokens as the budget allows."""
        rows = self._decoding()
        decoding = {r.request.handle for r in rows}
        rows += self._prefilling(self.budget - sum(len(r.ids) for r in rows), decoding)
        rows, step = self._room(rows)
        if self.graphs is not None and all(r.tree is not None and len(r.ids) == 1 for r in rows):
            handles = [r.request.handle for r in rows]
            tokens = self.graphs.run([r.ids[0] for r in rows], handles, step.slots)
            logits = list(tokens.split(1))
        else:
            logits = self._forward(rows, step)
        self._count(rows)
        for i, row in enumerate(rows):
            self._take(i, row, step, logits)

    def _decoding(self) -> list[_Row]:
        """The next token of every running request, with drafts while the budget lasts."""
        ready = [r for r in self._running if self.cache.length(r.handle) == len(r.text) - 1]
        ready = ready[: self.budget]
        spare = self.budget - len(ready)
        rows = []
        for request in ready:
            left = request.max_new_tokens - len(request.tokens) - 1
            n = min(self.speculate, left, spare)
            tree = draft(request.text, n) if n > 0 else Tree([request.text[-1]])
            spare -= len(tree) - 1
            start = self.cache.length(request.handle)
            rows.append(_Row(request, tree.tokens, [start + d for d in tree.depths()], tree))
        return rows

    def _prefilling(self, budget: int, decoding: set[int]) -> list[_Row]:
        """Chunks of prompts that are not all in the cache yet; `decoding` have their row."""
        while self._waiting and len(self._running) < self.most:
            request = self._waiting.pop(0)
            request.handle = self.cache.open(request.text)
            self.stats.reused += self.cache.length(request.handle)
            self._running.append(request)
        rows = []
        for request in self._running:
            start = self.cache.length(request.handle)
            chunk = request.text[start:][: max(0, budget)]
            if not chunk or request.handle in decoding:
                continue
            budget -= len(chunk)
            rows.append(_Row(request, chunk, list(range(start, start + len(chunk))), None))
        return rows

    def _forward(self, rows: list[_Row], step: Step) -> list[Tensor]:
        """Logits [n, V] of each row's tokens that predict something."""
        device = self.model.device
        ids = torch.tensor([[i for r in rows for i in r.ids]], device=device)
        positions = torch.tensor([[p for r in rows for p in r.positions]], device=device)
        hidden = self._hidden(ids, positions, step)
        wanted, ends = [], [len(r.ids) for r in rows]
        for row, start in zip(rows, [sum(ends[:i]) for i in range(len(ends))]):
            first = 0 if row.tree is not None else len(row.ids) - 1
            wanted.append(range(start + first, start + len(row.ids)))
        logits = self.model.get_output_embeddings()(hidden[[i for span in wanted for i in span]])
        return list(logits.split([len(span) for span in wanted]))

    def _hidden(self, ids: Tensor, positions: Tensor, step: Step | GraphStep) -> Tensor:
        """Last hidden states [T, hidden] of tokens [1, T]."""
        return self.model.base_model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=_StepCache(step, self.cache.shape),
            use_cache=True,
        ).last_hidden_state[0]

    def _logits(self, ids: Tensor, positions: Tensor, step: GraphStep) -> Tensor:
        """Logits [T, V] of tokens [1, T]."""
        return self.model.get_output_embeddings()(self._hidden(ids, positions, step))

    def _take(self, index: int, row: _Row, step: Step, logits: list[Tensor]) -> None:
        """Append what the model predicted, forget rejected drafts, and end what is done."""
        request = row.request
        if row.tree is None:
            if self.cache.length(request.handle) < len(request.text):
                return  # the prompt goes on in the next step
            new = [int(logits[index][-1].argmax())]
        else:
            path, after = row.tree.accept(logits[index].argmax(-1).tolist())
            new = [*(row.tree.tokens[i] for i in path[1:]), after]
            if len(row.tree) > 1:
                step.keep(index, path)
        for token in new:
            if request.done:
                break
            request.tokens.append(token)
            if request.on_token is not None:
                request.on_token(token)
            request.done = token in self.eos or len(request.tokens) == request.max_new_tokens
        if request.done:
            stored = min(self.cache.length(request.handle), len(request.text))
            self.cache.truncate(request.handle, stored)
            self.cache.publish(request.handle, request.text[:stored])
            self.cache.free(request.handle)
            self._running.remove(request)

    def _room(self, rows: list[_Row]) -> tuple[list[_Row], Step]:
        """A step for these rows; where the cache is full, without the youngest requests.

        Those wait again, and what they had is computed anew (or found in the cache) later.
        """
        while True:
            try:
                handles = [r.request.handle for r in rows]
                counts = [len(r.ids) for r in rows]
                return rows, self.cache.step(handles, counts, [r.mask for r in rows])
            except CacheFullError:
                if len(self._running) <= 1:
                    raise
            youngest = self._running.pop()
            self.cache.free(youngest.handle)
            self._waiting.insert(0, youngest)
            rows = [r for r in rows if r.request is not youngest]

    def _count(self, rows: list[_Row]) -> None:
        self.stats.steps += 1
        self.stats.rows += sum(len(r.ids) for r in rows)
        self.stats.mixed += len({r.tree is None for r in rows}) == 2
        for row in rows:
            row.request.steps += 1


@dataclass
class _Row:
    """A request's part of a step."""

    request: Request
    ids: list[int]
    positions: list[int]
    tree: Tree | None
    """None: a chunk of a prompt."""

    @property
    def mask(self) -> Tensor | None:
        """Who sees whom among the tokens, if they are more than one and not a chunk."""
        return None if self.tree is None or len(self.tree) == 1 else self.tree.seen()


class _StepCache(Cache):
    """A step as transformers' cache: one row that holds the tokens of all requests."""

    def __init__(self, step: Step, shape: CacheShape):
        kind = LatentLayer if shape.latents else PagedLayer
        super().__init__(layers=[kind(self, i) for i in range(shape.layers)])
        self.seen = 0
        self._step = step

    def step_of(self, layer: int, key: Tensor, padding: Tensor | None) -> tuple[Step, None]:
        return self._step, None
