"""Statistics of what linears read, collected in one pass over a model, a decoder layer at a time.

Linears that read the same tensor form a *site*; statistics belong to sites. They describe the
model as it is, before any step of a recipe; a step that changes weights changes the statistics
along with them (:meth:`Stats.scale` and its neighbours), so one pass serves all steps.

Memory holds the hidden states of all calibration tokens, one layer's weights and its statistics.
The order of the sums is fixed: the same model, tokens, device and thread count give the same bytes.

Letters: B sequences, T tokens of a sequence, K in features, J kv heads, D head dim, S sampled rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SITES: dict[str, tuple[str, ...]] = {
    "attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Linears of a decoder layer that read the same tensor, by the name of the site."""

HEAD = "head"
"""Site of the output head, which is no part of a layer; its index is the number of layers."""

WANTS = ("hessian",)
"""Statistics that are collected on request only: K^2 numbers for a site."""

ROWS = 256
"""Most tokens whose inputs are kept as they are, evenly spaced over the calibration text."""

CACHE_VERSION = 1
"""Version of cached statistics; part of their key."""


class CalibrationError(ValueError):
    """Statistics that cannot be collected; the message is for the user."""


@dataclass
class Stats:
    """What is known of the inputs x [tokens, K] of a site; fp32 (fp64 where x is)."""

    tokens: int
    amax: Tensor
    """max |x| of each channel, [K]; after a rotation that of `rows`."""
    mean: Tensor
    """[K]."""
    moment: Tensor
    """Mean of x^2, [K]."""
    rows: Tensor
    """Inputs of evenly spaced tokens, [S, K]."""
    hessian: Tensor | None = None
    """Mean of x x^T, [K, K]: half the second derivative of the output's squared error."""

    def scale(self, d_K: Tensor) -> None:
        """Become the statistics of x * d."""
        d = d_K.to(self.amax)
        self.amax = self.amax * d.abs()
        self.mean, self.moment, self.rows = self.mean * d, self.moment * d * d, self.rows * d
        if self.hessian is not None:
            self.hessian = self.hessian * d * d[:, None]

    def permute(self, p_K: Tensor) -> None:
        """Become the statistics of x[:, p]."""
        p = p_K.long()
        for name in ("amax", "mean", "moment"):
            setattr(self, name, getattr(self, name)[p])
        self.rows = self.rows[:, p]
        if self.hessian is not None:
            self.hessian = self.hessian[p][:, p]

    def rotate(self, turn: Callable[[Tensor], Tensor]) -> None:
        """Become the statistics of turn(x), linear along the last dimension.

        The largest magnitudes, and without a Hessian the second moments too, are those of `rows`.
        """
        self.mean, self.rows = turn(self.mean), turn(self.rows)
        self.amax = self.rows.abs().amax(0)
        if self.hessian is None:
            self.moment = self.rows.square().mean(0)
        else:
            self.hessian = turn(turn(self.hessian).T.contiguous())
            self.moment = self.hessian.diagonal().clamp_min(0).clone()

    def to(self, device: str | torch.device) -> None:
        """Move to a device."""
        for name, t in self.tensors().items():
            setattr(self, name, t.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, an absent Hessian left out."""
        return {k: t for k, t in vars(self).items() if isinstance(t, Tensor)}


@dataclass
class LayerStats:
    """Statistics of one decoder layer (or, with the site :data:`HEAD` only, of what follows)."""

    index: int
    sites: dict[str, Stats] = field(default_factory=dict)
    key_radius: Tensor | None = None
    """[J, D/2]: over all tokens the largest length of the pair (k_i, k_(i+D/2)) that RoPE turns."""

    def to(self, device: str | torch.device) -> LayerStats:
        """Move to a device (cached statistics come on the CPU); returns itself."""
        for stats in self.sites.values():
            stats.to(device)
        if self.key_radius is not None:
            self.key_radius = self.key_radius.to(device)
        return self


class Stream(Protocol):
    """A decoder-only model whose layers can be had one at a time."""

    layers: int

    def identity(self) -> str:
        """A digest of the weights, for the key of cached statistics."""

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Token ids -> hidden states [B, T, hidden]."""

    def layer(self, i: int) -> nn.Module:
        """Decoder layer i with its weights; freed when the caller lets go of it."""

    def run(self, layer: nn.Module, hidden_BTK: Tensor) -> Tensor:
        """The hidden states after a layer, each token attending to those up to itself."""

    def head_input(self, hidden_BTK: Tensor) -> Tensor:
        """What the output head reads."""


class ModuleStream(Stream):
    """A :class:`Stream` of a causal language model in memory, built as Llama's are.

    Args:
        model: with `model.embed_tokens`, `model.layers`, `model.rotary_emb`, `model.norm`.
    """

    def __init__(self, model: nn.Module):
        self.body = model.model
        self.layers = len(self.body.layers)

    def identity(self) -> str:
        digest = hashlib.sha256()
        for name, t in sorted(self.body.state_dict().items()):
            digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
            digest.update(t.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def embed(self, tokens_BT: Tensor) -> Tensor:
        return self.body.embed_tokens(tokens_BT.to(self.body.embed_tokens.weight.device))

    def layer(self, i: int) -> nn.Module:
        return self.body.layers[i]

    def run(self, layer: nn.Module, hidden_BTK: Tensor) -> Tensor:
        T = hidden_BTK.shape[1]
        positions = torch.arange(T, device=hidden_BTK.device)
        behind = positions[:, None] - positions
        attention = layer.self_attn  # a window of its own, or that of all layers
        holder = attention if hasattr(attention, "sliding_window") else attention.config
        window = getattr(holder, "sliding_window", None) or T
        hidden = (behind < 0) | (behind >= window)
        mask = torch.zeros(T, T, dtype=hidden_BTK.dtype, device=hidden_BTK.device)
        mask.masked_fill_(hidden, torch.finfo(hidden_BTK.dtype).min)
        out = layer(
            hidden_BTK,
            attention_mask=mask[None, None],
            position_ids=positions[None],
            position_embeddings=self.body.rotary_emb(hidden_BTK, positions[None]),
        )
        return out[0] if isinstance(out, tuple) else out

    def head_input(self, hidden_BTK: Tensor) -> Tensor:
        return self.body.norm(hidden_BTK)


@torch.no_grad()
def collect(
    stream: Stream | nn.Module,
    batches: Sequence[Tensor],
    *,
    wants: frozenset[str] | set[str] = frozenset(),
    cache: Path | None = None,
    needed: Callable[[int], bool] = lambda index: True,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[LayerStats]:
    """Statistics of each decoder layer in order, then of the head's input.

    Args:
        stream: the model, or an nn.Module as :class:`ModuleStream` takes it.
        batches: token ids int64 [B, T], without padding.
        wants: of :data:`WANTS`.
        cache: folder that keeps the statistics, by a digest of model, tokens and `wants`; what it
            has is read instead of computed.
        needed: layers (index) that are wanted; others are passed through, and not yielded.
        progress: called with (layers done, layers in all).

    Raises:
        CalibrationError: no tokens, an unknown statistic, or activations that are not finite
            (naming layer and site).
    """
    if isinstance(stream, nn.Module):
        stream = ModuleStream(stream)
    if unknown := set(wants) - set(WANTS):
        raise CalibrationError(
            f"calibration: expected statistics of {', '.join(WANTS)}, got {sorted(unknown)}"
        )
    tokens = sum(b.numel() for b in batches)
    if tokens == 0:
        raise CalibrationError("calibration: expected tokens, got none")
    folder = None if cache is None else Path(cache) / _key(stream, batches, wants)
    total = stream.layers + 1
    wanted = [i for i in range(total) if needed(i)]
    missing = [i for i in wanted if folder is None or not _file(folder, i).is_file()]
    last = max(missing, default=-1)
    hidden = [stream.embed(b) for b in batches] if last >= 0 else []
    for i in range(total):
        if i <= last:
            found = _pass(stream, i, hidden, _Collector(tokens, wants) if i in missing else None)
        if i in missing and folder is not None:
            _save(_file(folder, i), found)
        if i in wanted:
            yield found if i in missing else _load(_file(folder, i), i)
            found = None  # statistics are large: the caller's are the only ones
        if progress:
            progress(i + 1, total)


def _pass(
    stream: Stream, i: int, hidden: list[Tensor], collector: _Collector | None
) -> LayerStats | None:
    """Move all hidden states through layer i in place, looking on with the collector."""
    if i == stream.layers:
        for h in hidden if collector else ():
            collector.see(HEAD, stream.head_input(h))
        return collector and collector.finish(i)
    layer = stream.layer(i)
    hooks = collector.hook(layer) if collector else []
    try:
        for b, h in enumerate(hidden):
            hidden[b] = stream.run(layer, h)
    finally:
        for hook in hooks:
            hook.remove()
    return collector and collector.finish(i)


class _Collector:
    """Sums over the batches of one layer."""

    def __init__(self, tokens: int, wants: frozenset[str] | set[str]):
        self.tokens, self.wants = tokens, wants
        step = tokens / min(tokens, ROWS)
        self.picks = torch.tensor([math.floor(s * step) for s in range(min(tokens, ROWS))])
        self.sums: dict[str, dict[str, Any]] = {}
        self.key_radius: Tensor | None = None

    def hook(self, layer: nn.Module) -> list:
        """Look at the inputs of all sites, and at the keys."""
        hooks = []
        for site, names in SITES.items():
            first = layer.get_submodule(names[0])
            hooks.append(
                first.register_forward_pre_hook(lambda _, args, site=site: self.see(site, args[0]))
            )
        attention = layer.self_attn
        keys = getattr(attention, "k_norm", None) or attention.k_proj
        D = attention.head_dim
        hooks.append(keys.register_forward_hook(lambda _, args, k: self._see_keys(k, D)))
        return hooks

    def see(self, site: str, x: Tensor) -> None:
        """Add the inputs x [B, T, K] of a site."""
        x = x.reshape(-1, x.shape[-1])
        x = x if x.dtype == torch.float64 else x.float()
        s = self.sums.setdefault(
            site, {"seen": 0, "amax": x.new_zeros(x.shape[1]), "sum": 0, "squares": 0, "rows": []}
        )
        s["amax"] = torch.maximum(s["amax"], x.abs().amax(0))
        s["sum"] = s["sum"] + x.double().sum(0)
        s["squares"] = s["squares"] + x.double().square().sum(0)
        inside = (self.picks >= s["seen"]) & (self.picks < s["seen"] + len(x))
        s["rows"].append(x[(self.picks[inside] - s["seen"]).to(x.device)])
        s["seen"] += len(x)
        if "hessian" in self.wants:
            if "hessian" not in s:
                s["hessian"] = x.new_zeros(x.shape[1], x.shape[1])
            s["hessian"].addmm_(x.T, x)

    def _see_keys(self, k: Tensor, D: int) -> None:
        pairs = k.reshape(-1, k.shape[-1] if k.dim() == 3 else k.shape[-2] * D)
        pairs = pairs.view(len(pairs), -1, 2, D // 2).float()
        radius = pairs.square().sum(2).sqrt().amax(0)
        seen = self.key_radius
        self.key_radius = radius if seen is None else torch.maximum(seen, radius)

    def finish(self, index: int) -> LayerStats:
        """The sums as statistics. Raises CalibrationError where they are not finite."""
        sites = {}
        for site, s in self.sums.items():
            if not torch.isfinite(s["amax"]).all():
                raise CalibrationError(
                    f"calibration: layer {index}: expected finite activations, got an infinity or "
                    f"a NaN in what {', '.join(SITES.get(site, (site,)))} read"
                )
            H = s.get("hessian")
            sites[site] = Stats(
                tokens=self.tokens,
                amax=s["amax"],
                mean=(s["sum"] / self.tokens).to(s["amax"]),
                moment=(s["squares"] / self.tokens).to(s["amax"]),
                rows=torch.cat(s["rows"]),
                hessian=None if H is None else H.div_(self.tokens),
            )
        return LayerStats(index, sites, self.key_radius)


def digest_of(batches: Sequence[Tensor]) -> str:
    """A digest of token ids."""
    digest = hashlib.sha256()
    for b in batches:
        digest.update(str(tuple(b.shape)).encode())
        digest.update(b.to(torch.int64).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _key(stream: Stream, batches: Sequence[Tensor], wants: frozenset[str] | set[str]) -> str:
    parts = f"{CACHE_VERSION} {sorted(wants)} {stream.identity()} {digest_of(batches)}"
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def _file(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:05d}.safetensors"


def _save(file: Path, stats: LayerStats) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {} if stats.key_radius is None else {"key_radius": stats.key_radius}
    for site, s in stats.sites.items():
        tensors |= {f"{site}.{k}": t.contiguous() for k, t in s.tensors().items()}
        tensors[f"{site}.tokens"] = torch.tensor(s.tokens)
    temporary = file.with_suffix(".tmp")
    save_file({k: t.cpu() for k, t in tensors.items()}, temporary)
    temporary.replace(file)


def _load(file: Path, index: int) -> LayerStats:
    tensors = load_file(file)
    stats = LayerStats(index, key_radius=tensors.pop("key_radius", None))
    for site in dict.fromkeys(name.split(".")[0] for name in tensors):
        fields = {k.split(".")[1]: t for k, t in tensors.items() if k.split(".")[0] == site}
        stats.sites[site] = Stats(**{**fields, "tokens": int(fields["tokens"])})
    return stats
