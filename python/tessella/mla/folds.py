"""Which fold for which layer: the same for all, or chosen layer by layer.

Layer-adaptive selection (YouZhi-LLM, arXiv 2606.05868) goes from the last layer to the first. At
layer k the layers before it are still the original, those after it have their folds, and every
fold is tried; the one whose model is closest to the original stays. Layers before k do the same
in every trial, so the hidden states that enter layer k are computed once, for the original.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tessella.mla.decoder import Attention, Decoder, advance, divergence
from tessella.mla.shape import Fold, MLAError

Candidate = Callable[[int, Fold], Attention]
"""(layer, fold) -> the attention that the layer would have."""


@dataclass(frozen=True)
class Trial:
    """One evaluation on the calibration text: the folds from `layer` on, and the divergence."""

    layer: int
    folds: tuple[Fold, ...]
    divergence: float


class Search:
    """Tries folds on one piece of text.

    Args:
        decoder: the original.
        ids: int64 [N, T], text for selection.
        candidate: makes the attention of a layer with a fold.
        criterion: "kl": divergence from the original's predictions; "ppl": of the text.
        progress: called after each trial.
    """

    def __init__(
        self,
        decoder: Decoder,
        ids: Tensor,
        candidate: Candidate,
        criterion: str = "kl",
        progress: Callable[[Trial], None] | None = None,
    ):
        self.decoder, self.ids, self.candidate = decoder, ids, candidate
        self.progress = progress
        self.trials: list[Trial] = []
        self._entering = [decoder.embed(ids)]
        for i in range(decoder.count):
            self._entering.append(advance(decoder, i, self._entering[-1]))
        self._reference = self._entering.pop()
        if criterion == "ppl":
            self._reference = None
        self._made: dict[tuple[int, Fold], Attention] = {}

    def run(self, layer: int, folds: list[Fold]) -> float:
        """Divergence with the original before `layer` and `folds` from there on."""
        wanted = set(enumerate(folds, layer))
        self._made = {key: made for key, made in self._made.items() if key in wanted}
        h = self._entering[layer]
        for i, fold in enumerate(folds, layer):
            h = advance(self.decoder, i, h, self._attention(i, fold))
        found = divergence(self.decoder, h, self._reference, self.ids)
        if found != found:
            raise MLAError(f"folds: layer {layer}: expected a finite divergence, got {found}")
        self.trials.append(Trial(layer, tuple(folds), found))
        if self.progress is not None:
            self.progress(self.trials[-1])
        return found

    def _attention(self, layer: int, fold: Fold) -> Attention:
        key = (layer, fold)
        if key not in self._made:
            made = self.candidate(layer, fold)
            self._made[key] = made.to(self.decoder.device, torch.float32)
        return self._made[key]

    def uniform(self, folds: list[int]) -> int:
        """One fold for all layers: doubled while that brings the model closer (TransMLA)."""
        best, least = folds[0], self.run(0, [folds[0]] * self.decoder.count)
        for fold in folds[1:]:
            found = self.run(0, [fold] * self.decoder.count)
            if found >= least:
                break
            best, least = fold, found
        return best

    def adaptive(
        self,
        folds: list[int],
        known: list[int] | None = None,
        chosen: Callable[[list[int]], None] | None = None,
    ) -> list[int]:
        """A fold for each layer, chosen from the last to the first.

        Args:
            folds: to try.
            known: folds of the last layers, chosen before (to go on after an interruption).
            chosen: called with the folds so far after each layer.
        """
        found = list(known or [])
        for layer in reversed(range(self.decoder.count - len(found))):
            found.insert(0, min(folds, key=lambda f: self.run(layer, [f, *found])))
            if chosen is not None:
                chosen(found)
        return found
