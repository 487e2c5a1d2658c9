"""Windows of tokens of one length, drawn evenly from all documents of a text."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class TooShortError(ValueError):
    """A text with fewer tokens than are needed; the message has both numbers."""


def token_windows(tokenizer, documents: Iterable[str], ctx: int) -> Tensor:
    """All full windows int64 [N, ctx] of the documents, each from the start token if there is one.

    What is left of a document after its last full window is not used.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step, found = ctx - len(bos), []
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found += [bos + ids[i : i + step] for i in range(0, len(ids) - step + 1, step)]
    return torch.tensor(found, dtype=torch.int64).view(-1, ctx)


def spread(windows_NT: Tensor, counts: list[int], what: str) -> list[Tensor]:
    """Disjoint sets of so many windows, each spread evenly over the text.

    Raises TooShortError when there are fewer windows than sets; with fewer than asked for, the
    sets shrink in proportion.
    """
    N, wanted = len(windows_NT), sum(counts)
    if len(counts) > N:
        raise TooShortError(
            f"{what}: expected at least {len(counts)} windows of {windows_NT.shape[1]} tokens, "
            f"the text gives {N}"
        )
    if wanted > N:
        counts = [max(1, c * N // wanted) for c in counts]
        counts[0] = N - sum(counts[1:])
        wanted = N
    order = torch.arange(wanted) * N // wanted
    # every set takes its turn along the text, in proportion to its size
    turn = torch.cat([(torch.arange(c) + 0.5) / c for c in counts]).argsort(stable=True)
    owner = torch.cat([torch.full((c,), s) for s, c in enumerate(counts)])[turn]
    return [windows_NT[order[owner == s]] for s in range(len(counts))]
