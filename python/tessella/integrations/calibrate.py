"""Calibration of checkpoints: layers read from disk one at a time, batches made of text.

transformers builds the model without memory (meta device); a decoder layer gets its weights when
its turn comes, and is let go after it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tessella.integrations.text import read_documents
from tessella.models.apply import Calibration
from tessella.models.checkpoint import Checkpoint
from tessella.models.hub import resolve
from tessella.models.plan import check_source
from tessella.quant.calibrate import CalibrationError, LayerStats, ModuleStream, collect

SAMPLES, CTX = 32, 512
"""Windows of text, and tokens in each, where nothing else is asked for."""

SHORTEST = 16
"""Windows with fewer tokens are left out."""


class CheckpointStream(ModuleStream):
    """A checkpoint in full precision as a stream of layers, computed in fp32.

    Args:
        path: folder or hub id.
        device: where layers run.

    Raises CheckpointError for what the converter refuses as well.
    """

    def __init__(self, path: str, device: str = "cpu"):
        folder = resolve(path)
        self.source, self.device = Checkpoint.open(folder), device
        self.arch, self.layers = check_source(self.source)
        config = AutoConfig.from_pretrained(folder)
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self.skeleton = AutoModelForCausalLM.from_config(config).eval()
        self.skeleton.float()
        self.body = self.skeleton.base_model
        rotary = type(self.body.rotary_emb)
        self.body.rotary_emb = rotary(config=self.body.config).to(device)

    def identity(self) -> str:
        """A digest of the files' bytes."""
        digest = hashlib.sha256()
        for file in sorted({info.file for info in self.source.tensors.values()}):
            with file.open("rb") as f:
                while part := f.read(1 << 20):
                    digest.update(part)
        digest.update((self.source.path / "config.json").read_bytes())
        return digest.hexdigest()

    def embed(self, tokens_BT: Tensor) -> Tensor:
        table = self.source.read(f"{self.arch.embedding}.weight")
        return table[tokens_BT.cpu()].float().to(self.device)

    def layer(self, i: int) -> nn.Module:
        prefix = self.arch.layer(i)
        return self._filled(self.skeleton.get_submodule(prefix), prefix)

    def head_input(self, hidden_BTK: Tensor) -> Tensor:
        norm = self._filled(self.skeleton.get_submodule(self.arch.final_norm), self.arch.final_norm)
        return norm(hidden_BTK)

    def _filled(self, module: nn.Module, prefix: str) -> nn.Module:
        """A copy of a module of the skeleton, with the checkpoint's weights in fp32."""
        module = copy.deepcopy(module)
        state = {
            name: self.source.read(f"{prefix}.{name}").to(self.device, torch.float32)
            for name in module.state_dict()
        }
        module.load_state_dict(state, assign=True)
        return module


def token_batches(
    tokenizer, documents: Sequence[str], samples: int = SAMPLES, ctx: int = CTX
) -> list[Tensor]:
    """Windows int64 [1, up to ctx] of documents, BOS first where the tokenizer has one.

    Documents are taken at even distances, each one's first window before any one's second.
    Raises CalibrationError when the text gives no window of :data:`SHORTEST` tokens.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = max(1, len(documents) // samples)
    order = [*documents[::step], *(d for i, d in enumerate(documents) if i % step)]
    windows: list[list[list[int]]] = []
    full = ctx - len(bos)
    for document in order:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        cut = [bos + ids[i : i + full] for i in range(0, len(ids), full)]
        windows.append([w for w in cut if len(w) >= SHORTEST])
        if sum(bool(w) for w in windows) == samples:
            break
    depth = max(map(len, windows), default=0)
    ranked = [w[n] for n in range(depth) for w in windows if len(w) > n]
    if not ranked:
        raise CalibrationError(f"calibration: the text has no window of {SHORTEST} tokens")
    return [torch.tensor([w], dtype=torch.int64) for w in ranked[:samples]]


def batches_of(path: str, text: Path, samples: int = SAMPLES, ctx: int = CTX) -> list[Tensor]:
    """Batches for a checkpoint (folder or hub id) from a text file.

    Raises TextError, and CalibrationError as :func:`token_batches`.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve(path))
    config = AutoConfig.from_pretrained(resolve(path))
    longest = getattr(config, "max_position_embeddings", None) or ctx
    return token_batches(tokenizer, read_documents(text), samples, min(ctx, longest))


def calibration(
    path: str,
    text: Path,
    *,
    samples: int = SAMPLES,
    ctx: int = CTX,
    device: str = "cpu",
    cache: Path | None = None,
) -> Calibration:
    """What :func:`tessella.models.convert.convert` takes to calibrate a checkpoint on a text.

    Raises TextError, CalibrationError and CheckpointError.
    """
    batches = batches_of(path, text, samples, ctx)
    return Calibration(CheckpointStream(path, device), batches, cache)


def calibrate(
    path: str,
    text: Path,
    *,
    samples: int = SAMPLES,
    ctx: int = CTX,
    wants: frozenset[str] | set[str] = frozenset(),
    device: str = "cpu",
    cache: Path | None = None,
    needed: Callable[[int], bool] = lambda index: True,
) -> Iterator[LayerStats]:
    """Statistics of a checkpoint over a text; see :func:`~tessella.quant.calibrate.collect`."""
    batches = batches_of(path, text, samples, ctx)
    stream = CheckpointStream(path, device)
    return collect(stream, batches, wants=wants, cache=cache, needed=needed)
