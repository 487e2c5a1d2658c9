"""Text from a causal language model, streamed and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import TextStreamer


class GenerationError(ValueError):
    """A request that the model cannot serve; the message says what it allows."""


@dataclass(frozen=True)
class Generation:
    """A completion and how long it took."""

    text: str
    """The new text, without the prompt and special tokens."""
    token_ids: list[int]
    """The new tokens, an end-of-sequence token included."""
    prompt_tokens: int
    prefill_seconds: float
    """From the prompt entering the model to the first new token."""
    decode_seconds: float
    """From the first new token to the last."""
    steps: int | None = None
    """Passes of the model, when several tokens may come of one."""

    @property
    def tokens(self) -> int:
        """New tokens."""
        return len(self.token_ids)

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens a second, until the first new token was there."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def tok_s(self) -> float | None:
        """Tokens a second after the first one; None if there was no second."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 else None


def generate(
    model: nn.Module,
    tokenizer,
    prompt: str,
    *,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_at_eos: bool = True,
    kv: str | None = None,
    speculate: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Complete one prompt with ``model.generate``.

    Args:
        model, tokenizer: any Hugging Face causal LM.
        prompt: text; tokenised as the tokenizer does by default.
        chat: make the prompt a user's message in the tokenizer's chat template.
        max_new_tokens: at least 1.
        temperature: 0 takes the likeliest token each time; else softmax(logits / temperature)
            is sampled.
        top_p: sample among the likeliest tokens that hold this share of the probability, (0, 1].
        seed: of the sampling, which leaves torch's global generators as they were.
        stop_at_eos: False generates exactly `max_new_tokens` (for timing).
        kv: codec of a paged cache, a name of :mod:`tessella.quant.kv`; None: what the checkpoint
            was converted for, else a cache of plain tensors; "none": plain tensors.
        speculate: tokens drafted for each step from what the text repeats, and verified as a tree
            in one pass (:mod:`tessella.integrations.runner`); the text is that of temperature 0.
            Settings of ``generation_config.json`` other than its end tokens are not used then.
        on_text: called with each piece of new text as soon as it is final.

    Settings not named here (repetition penalty, for one) come from the checkpoint's
    ``generation_config.json``.

    Raises:
        GenerationError: argument out of range, a prompt without tokens, one that does not fit
            the model's positions with the new tokens, or no chat template.
    """
    _check(max_new_tokens, temperature, top_p)
    ids_1S = _encode(tokenizer, prompt, chat).to(model.device)
    _check_room(model, ids_1S.shape[1], max_new_tokens)
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    if not stop_at_eos:
        sampling["eos_token_id"] = None
    if speculate and temperature > 0:
        raise GenerationError(f"generate: speculate: expected temperature 0, got {temperature}")
    streamer = _TimedStreamer(tokenizer, on_text)
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        if speculate:
            eos = _end_ids(model) if stop_at_eos else frozenset()
            steps = _speculate(model, ids_1S, max_new_tokens, kv, speculate, eos, streamer)
        else:
            steps = None
            model.generate(
                ids_1S,
                attention_mask=torch.ones_like(ids_1S),
                max_new_tokens=max_new_tokens,
                pad_token_id=_pad_id(model, tokenizer),
                past_key_values=_cache(model, kv),
                streamer=streamer,
                **sampling,
            )
    start, first, last = streamer.times[0], streamer.times[1], streamer.times[-1]
    return Generation(
        text=tokenizer.decode(streamer.ids, skip_special_tokens=True),
        token_ids=streamer.ids,
        prompt_tokens=ids_1S.shape[1],
        prefill_seconds=first - start,
        decode_seconds=last - first,
        steps=steps,
    )


def _speculate(
    model: nn.Module,
    ids_1S: Tensor,
    max_new_tokens: int,
    kv: str | None,
    drafts: int,
    eos: frozenset[int],
    streamer: _TimedStreamer,
) -> int:
    """Generate through the runner; the number of its steps."""
    from tessella.integrations.runner import Runner

    room = ids_1S.shape[1] + max_new_tokens + drafts
    runner = Runner(model, codec=kv, tokens=room, speculate=drafts, eos=eos, sequences=1)
    streamer.put(ids_1S)
    prompt = ids_1S[0].tolist()
    runner.submit(prompt, max_new_tokens, lambda token: streamer.put(torch.tensor([token])))
    steps = runner.run().steps
    streamer.end()
    return steps


def _end_ids(model: nn.Module) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    return frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])


class _TimedStreamer(TextStreamer):
    """Notes when tokens arrive: `times` has the prompt's hand-over, then one entry a token."""

    def __init__(self, tokenizer, on_text: Callable[[str], None] | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.times: list[float] = []
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > 1:
            self.ids.extend(value.flatten().tolist())
        if self.on_text is not None:
            super().put(value)

    def end(self) -> None:
        if self.on_text is not None:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)


def _encode(tokenizer, prompt: str, chat: bool) -> Tensor:
    """Token ids int64 [1, S] of the prompt."""
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise GenerationError("generate: chat: this tokenizer has no chat template")
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids_1S = encoded["input_ids"]
    if ids_1S.shape[1] == 0:
        raise GenerationError("generate: prompt: expected at least one token, got none")
    return ids_1S.long()


def _check(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise GenerationError(f"generate: max_new_tokens: expected >= 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise GenerationError(f"generate: temperature: expected >= 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise GenerationError(f"generate: top_p: expected within (0, 1], got {top_p}")


def _check_room(model: nn.Module, prompt_tokens: int, max_new_tokens: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and prompt_tokens + max_new_tokens > positions:
        raise GenerationError(
            f"generate: prompt of {prompt_tokens} tokens and {max_new_tokens} new ones: "
            f"expected at most the model's {positions} positions"
        )


def _cache(model: nn.Module, kv: str | None = None):
    """Paged if there is a codec; else one that grows in place for a converted model, else None."""
    from tessella.integrations import attention
    from tessella.integrations.cache import growing_cache
    from tessella.integrations.paged import checkpoint_codec, paged_cache

    codec = kv or checkpoint_codec(model)
    if codec and codec != "none":
        return paged_cache(model, codec)

    ours = getattr(model.config, "_attn_implementation", None) == attention.NAME
    return growing_cache(model.config) if ours else None


def _pad_id(model: nn.Module, tokenizer) -> int:
    """Never seen in a batch of one, but generate() warns without it."""
    eos = model.generation_config.eos_token_id
    eos = eos[0] if isinstance(eos, list) else eos
    return next((i for i in (tokenizer.pad_token_id, eos) if i is not None), 0)
