"""Perplexity of a causal language model, and how far it is from a reference.

A document is split into non-overlapping windows of `ctx` tokens, the last one as short as it
comes out. Windows are scored apart from each other, with no padding and no text in common:

* With a BOS token (the tokenizer's, else the model configuration's) a window is fed as BOS
  followed by all its tokens but the last, and each of its tokens is predicted: every token of
  every document counts exactly once.
* Without one, nothing predicts the first token of a window; the others count.

The tokenizer adds no special tokens of its own. Sums are kept in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

LOGIT_ELEMENTS = 1 << 24
"""Most logits held in fp32 at a time (64 MiB), whatever the size of the vocabulary."""


class EvaluationError(ValueError):
    """An evaluation that cannot be done, or whose model gives no numbers."""


@dataclass(frozen=True)
class EvalResult:
    """What :func:`perplexity` measured.

    Standard errors treat windows as independent samples: the variance of a mean over tokens is
    that of a ratio of sums over windows (Cochran, Sampling Techniques, chapter 6), and carries
    over to the perplexity to first order. They are NaN when there is one window only.
    """

    ppl: float
    """exp of the mean negative log-likelihood per token."""
    ppl_stderr: float
    tokens: int
    """Tokens predicted."""
    kl: float | None = None
    """Mean over tokens of KL(reference || model) in nats; None without a reference."""
    top1: float | None = None
    """Share of tokens at which model and reference prefer the same token."""
    windows: int = 0
    documents: int = 0
    """Documents that at least one predicted token came from."""
    ppl_ref: float | None = None
    """Perplexity of the reference."""
    ppl_ref_stderr: float | None = None
    ppl_ratio: float | None = None
    """ppl / ppl_ref."""
    ppl_ratio_stderr: float | None = None
    """Of the ratio, from the paired differences: far tighter than two separate errors."""


@dataclass(frozen=True)
class Window:
    """Tokens fed to the model and the tokens they are to predict, both int64 [n]."""

    inputs: Tensor
    targets: Tensor
    document: int


def split_windows(
    docs: Iterable[list[int]], ctx: int, bos: int | None, limit_tokens: int | None = None
) -> list[Window]:
    """Cut tokenised documents into windows, as the head of this module says.

    Args:
        docs: token ids of each document; consumed only as far as the limit needs.
        ctx: tokens in a window, at least 2.
        bos: id fed before each window, or None.
        limit_tokens: stop after predicting so many tokens; the last window is cut to fit.
    """
    windows: list[Window] = []
    left = math.inf if limit_tokens is None else limit_tokens
    for document, ids in enumerate(docs):
        for start in range(0, len(ids), ctx):
            window = ids[start : start + ctx]
            if bos is not None:
                window = [bos, *window]
            n = int(min(len(window) - 1, left))
            if n > 0:
                tokens = torch.tensor(window[: n + 1], dtype=torch.int64)
                windows.append(Window(tokens[:-1], tokens[1:], document))
                left -= n
            if left <= 0:
                return windows
    return windows


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    tokenizer,
    docs: Iterable[str],
    *,
    ctx: int = 1024,
    reference: nn.Module | None = None,
    limit_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    cache: Callable[[], Cache] | None = None,
    memo: dict[int, Tensor] | None = None,
) -> EvalResult:
    """Score `docs` with a Hugging Face causal LM, and compare it with a reference in one pass.

    Args:
        model, reference: causal LMs over the same vocabulary, in evaluation mode.
        tokenizer: the model's; the reference is fed the same tokens.
        docs: documents; empty ones contribute nothing.
        ctx: tokens in a window, 2 up to what the models' positions allow.
        limit_tokens: predict only the first so many tokens of the documents.
        progress: called with (tokens done, tokens in all) after each window.
        cache: makes an empty cache, through which the model (not the reference) reads each
            window: its tokens attend to what the cache keeps of them and of those before.
        memo: filled with the reference's hidden states, and read where it has them: one dict for
            several calls with the same documents, ctx and reference saves its work.

    Logits are made a few rows at a time (:data:`LOGIT_ELEMENTS`) for models whose logits are the
    output embedding of the last hidden state, which is verified, not assumed; others hold the
    logits of one window.

    Raises:
        EvaluationError: ctx out of range, nothing to predict, vocabularies that differ, or a
            model whose likelihoods are NaN or infinite.
    """
    models = [model] if reference is None else [model, reference]
    for m in models:
        _check_ctx(m, ctx)
    bos = tokenizer.bos_token_id
    if bos is None:
        bos = getattr(model.config.get_text_config(), "bos_token_id", None)
    if isinstance(bos, list):
        bos = bos[0]
    encoded = (tokenizer(d, add_special_tokens=False, verbose=False)["input_ids"] for d in docs)
    windows = split_windows(encoded, ctx, bos, limit_tokens)
    if not windows:
        raise EvaluationError("perplexity: the text holds no token to predict")
    total = sum(len(w.targets) for w in windows)
    scorers = [_Scorer(m, windows[0].inputs[:8]) for m in models]
    scorers[0].cache = cache
    scorers[-1].memo = memo if reference is not None else None
    sums = []
    done = 0
    for i, w in enumerate(windows):
        sums.append(_score_window(scorers, w, i))
        done += len(w.targets)
        if progress is not None:
            progress(done, total)
    return _summarise(torch.stack(sums), windows, with_reference=reference is not None)


def _check_ctx(model: nn.Module, ctx: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if ctx < 2 or (positions is not None and ctx > positions):
        upto = "" if positions is None else f" up to the model's {positions} positions"
        raise EvaluationError(f"perplexity: ctx: expected at least 2{upto}, got {ctx}")


class _Scorer:
    """Logits of one model, a few rows at a time."""

    def __init__(self, model: nn.Module, probe: Tensor):
        """`probe`: a few token ids, on which splitting off the head is tried."""
        self.model = model
        self.cache: Callable[[], Cache] | None = None
        self.memo: dict[int, Tensor] | None = None
        self.name = getattr(model, "name_or_path", "") or type(model).__name__
        self.head = self._split_head(probe.to(model.device)[None])

    def _split_head(self, probe_1n: Tensor) -> nn.Module | None:
        """The output embedding, if it is all there is between last hidden state and logits."""
        body, head = self.model.base_model, self.model.get_output_embeddings()
        if head is None or body is self.model:
            return None
        hidden = getattr(body(input_ids=probe_1n, use_cache=False), "last_hidden_state", None)
        if hidden is None:
            return None
        logits = self.model(input_ids=probe_1n, use_cache=False).logits
        # A soft cap, a scale or a projection between the two would show here.
        return head if torch.equal(head(hidden), logits) else None

    def remembered(self, number: int, inputs_n: Tensor) -> Tensor:
        """:meth:`hidden` of a window, once for all calls that share a memo."""
        if self.memo is None:
            return self.hidden(inputs_n)
        if number not in self.memo:
            self.memo[number] = self.hidden(inputs_n)
        return self.memo[number]

    def hidden(self, inputs_n: Tensor) -> Tensor:
        """What :meth:`logits` turns into logits: [n, hidden], or [n, V] of an unsplit model."""
        ids = inputs_n.to(self.model.device)[None]
        through = {"use_cache": False}
        if self.cache is not None:
            through = {"use_cache": True, "past_key_values": self.cache()}
        if self.head is None:
            return self.model(input_ids=ids, **through).logits[0]
        return self.model.base_model(input_ids=ids, **through).last_hidden_state[0]

    def log_probs(self, rows: Tensor) -> Tensor:
        """fp32 log-probabilities [rows, V] of some rows of :meth:`hidden`, on the CPU or GPU."""
        logits = rows if self.head is None else self.head(rows)
        return torch.log_softmax(logits.float(), dim=-1)


def _score_window(scorers: list[_Scorer], w: Window, number: int) -> Tensor:
    """fp64 [4]: sums over a window of NLL, reference NLL, KL and agreements."""
    states = [s.remembered(number, w.inputs) for s in scorers]
    sums = torch.zeros(4, dtype=torch.float64)
    for rows in _chunks(len(w.targets), scorers[0].model.config.get_text_config().vocab_size):
        targets = w.targets[rows]
        logp = scorers[0].log_probs(states[0][rows])
        sums[0] -= _gather(logp, targets)
        if len(scorers) == 1:
            continue
        logq = scorers[1].log_probs(states[1][rows]).to(logp.device)
        if logq.shape != logp.shape:
            raise EvaluationError(
                f"perplexity: reference {scorers[1].name} has {logq.shape[1]} tokens in its "
                f"vocabulary, expected {logp.shape[1]} as in {scorers[0].name}"
            )
        sums[1] -= _gather(logq, targets)
        # 0 * log(0 / p) is 0: tokens that the reference rules out do not count.
        kl = torch.where(logq > -torch.inf, logq.exp() * (logq - logp), 0.0).sum(-1)
        sums[2] += kl.clamp_min(0).sum(dtype=torch.float64).cpu()
        sums[3] += (logp.argmax(-1) == logq.argmax(-1)).sum().cpu()
    for scorer, nll in zip(scorers, sums[:2].tolist(), strict=False):
        if not math.isfinite(nll):
            raise EvaluationError(
                f"perplexity: {scorer.name}: log-likelihood of document {w.document} is {nll}"
            )
    return sums


def _chunks(n: int, vocab: int) -> Iterator[slice]:
    """Slices that cover 0..n-1 and keep fp32 logits within LOGIT_ELEMENTS."""
    step = max(1, LOGIT_ELEMENTS // vocab)
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _gather(logp: Tensor, targets: Tensor) -> Tensor:
    """Sum of the targets' log-probabilities, fp64, on the CPU."""
    picked = logp.gather(1, targets.to(logp.device)[:, None])
    return picked.sum(dtype=torch.float64).cpu()


def _summarise(sums_W4: Tensor, windows: list[Window], *, with_reference: bool) -> EvalResult:
    tokens_W = torch.tensor([len(w.targets) for w in windows], dtype=torch.float64)
    tokens = int(tokens_W.sum())
    nll, ref, kl, agree = (sums_W4.sum(0) / tokens).tolist()
    base = EvalResult(
        ppl=math.exp(nll),
        ppl_stderr=math.exp(nll) * _stderr(sums_W4[:, 0], tokens_W),
        tokens=tokens,
        windows=len(windows),
        documents=len({w.document for w in windows}),
    )
    if not with_reference:
        return base
    ratio = math.exp(nll - ref)
    paired = _stderr(sums_W4[:, 0] - sums_W4[:, 1], tokens_W)
    return replace(
        base,
        kl=kl,
        top1=agree,
        ppl_ref=math.exp(ref),
        ppl_ref_stderr=math.exp(ref) * _stderr(sums_W4[:, 1], tokens_W),
        ppl_ratio=ratio,
        ppl_ratio_stderr=ratio * paired,
    )


def _stderr(sums_W: Tensor, tokens_W: Tensor) -> float:
    """Standard error of sum(sums) / sum(tokens) over W windows of unequal length; NaN for W=1."""
    W = len(sums_W)
    if W < 2:
        return math.nan
    residuals = sums_W - sums_W.sum() / tokens_W.sum() * tokens_W
    return math.sqrt(W / (W - 1) * float(residuals.square().sum())) / float(tokens_W.sum())
