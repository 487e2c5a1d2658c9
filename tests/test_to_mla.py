"""Conversion to latents: exact where it claims to be, refused where it cannot be done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import tiny
from command import answer_of, refused, run
from tessella.integrations import hf
from tessella.integrations.windows import TooShortError, spread
from tessella.mla import attend
from tessella.mla import attention as forms
from tessella.mla.decoder import advance, moments
from tessella.mla.folds import Search
from tessella.mla.frequencies import frequencies, settings
from tessella.mla.lowrank import allocate, components, hadamard
from tessella.mla.rotate import energy_kept, pair_moments, rotation
from tessella.mla.shape import Heads, MLAError, collapse_of, folds_of
from tessella.models.checkpoint import Checkpoint
from tessella.models.errors import ConversionError
from tessella.models.latent import CheckpointDecoder
from tessella.models.to_mla import Options, to_mla
from tiny import contents

HEADS = Heads(H=6, J=3, D=16)
HIDDEN, T = 40, 21


def angles(T: int = T, D: int = HEADS.D) -> forms.Angles:
    turned = torch.outer(
        torch.arange(T).double(), frequencies({"rope_type": "default", "rope_theta": 1e3}, D)
    )
    return turned.cos(), turned.sin()


def layer(heads: Heads = HEADS, bias: bool = True) -> forms.GQA:
    g = torch.Generator().manual_seed(3)

    def make(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64) / HIDDEN**0.5

    q, kv = heads.H * heads.D, heads.width
    b = {f"{n}_bias": make(w) for n, w in (("q", q), ("k", kv), ("v", kv), ("o", HIDDEN))}
    return forms.GQA(
        heads,
        make(q, HIDDEN),
        make(kv, HIDDEN),
        make(kv, HIDDEN),
        make(HIDDEN, q),
        **(b if bias else {}),
    )


X = torch.randn(2, T, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def gathered(gqa: forms.GQA) -> torch.Tensor:
    kv = gqa.keys_values(X).flatten(0, 1)
    return kv.T @ kv


def turned(gqa: forms.GQA, collapse: int, fold: int) -> torch.Tensor:
    W = gqa.heads.width
    return rotation(pair_moments(gathered(gqa)[:W, :W], gqa.heads), gqa.heads, collapse, fold)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize("fold", [1, 2, 8])
@pytest.mark.parametrize("collapse", [1, 2, 4])
def test_rotations_are_orthogonal(collapse, fold):
    if fold % collapse:
        with pytest.raises(MLAError, match=rf"multiple of the collapse {collapse} .*got {fold}"):
            turned(layer(), collapse, fold)
        return
    q = turned(layer(), collapse, fold)
    assert same(q @ q.T, torch.eye(HEADS.width, dtype=torch.float64))


def test_rorope_is_exact_before_dropping():
    """Scores of rotated keys and queries, with RoPE on every channel, are the original's."""
    gqa, (cos, sin) = layer(), angles()
    rotated = turned(gqa, 1, 1)
    J, D, W = HEADS.J, HEADS.D, HEADS.width
    k = torch.nn.functional.linear(X, gqa.k, gqa.k_bias)
    q = torch.nn.functional.linear(X, gqa.q, gqa.q_bias).unflatten(-1, (-1, D))
    # channels (kept pairs, then per band the other heads' pairs): each pair's frequency
    pairs = torch.cat((torch.arange(D // 2), torch.arange(D // 2).repeat_interleave(J - 1)))

    def rope(x):
        return attend.rotate_pairs(x, cos[:, pairs], sin[:, pairs])

    for h in range(HEADS.H):
        merged = torch.zeros(*X.shape[:2], W, dtype=torch.float64)
        merged[..., HEADS.group(h)] = q[:, :, h]
        got = rope(merged @ rotated.T) @ rope(k @ rotated.T).transpose(1, 2)
        theirs = k[..., HEADS.group(h)].unsqueeze(2)
        expected = forms._rotate_halves(q[:, :, h : h + 1], (cos, sin))[
            :, :, 0
        ] @ forms._rotate_halves(theirs, (cos, sin))[:, :, 0].transpose(1, 2)
        assert same(got, expected)


def test_one_head_keeps_everything():
    """With one key/value head and no collapse no channel loses its RoPE: nothing is lost."""
    heads = Heads(4, 1, 16)
    gqa = layer(heads)
    q = rotation(pair_moments(gathered(gqa)[:16, :16], heads), heads, 1, 1)
    got = forms.partial_rope(gqa, q, 16).run(X, angles())
    assert same(got, gqa.run(X, angles()))
    parts = components(gathered(gqa), q, 16)
    full = forms.to_latent(gqa, q, 16, parts, 16)
    assert same(full.run(X, angles()), got)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("collapse, fold", [(1, 1), (1, 4), (2, 2), (2, 8), (4, 4)])
def test_full_rank_is_the_model_with_partial_rope(collapse, fold, bias):
    gqa, rope = layer(bias=bias), HEADS.D // collapse
    q = turned(gqa, collapse, fold)
    expected = forms.partial_rope(gqa, q, rope).run(X, angles())
    parts = components(gathered(gqa), q, rope)
    rank = 2 * HEADS.width - rope
    full = forms.to_latent(gqa, q, rope, parts, rank)
    assert same(full.run(X, angles()), expected)
    spread_out = forms.to_latent(gqa, q, rope, parts, rank, spread=True)
    assert not same(spread_out.kv_a, full.kv_a, 0.1)
    assert same(spread_out.run(X, angles()), expected)


@pytest.mark.parametrize("rank", [8, 24, 60])
def test_hadamard_and_absorption_change_nothing(rank):
    gqa = layer()
    q = turned(gqa, 2, 4)
    parts = components(gathered(gqa), q, 8)
    plain, spread_out = (forms.to_latent(gqa, q, 8, parts, rank, s) for s in (False, True))
    assert same(spread_out.run(X, angles()), plain.run(X, angles()))
    lin, a, D = torch.nn.functional.linear, angles(), HEADS.D
    heads = lin(X, plain.q, plain.q_bias).unflatten(-1, (-1, D + 8)).transpose(1, 2)
    latent, k_rope = lin(X, plain.kv_a, plain.kv_a_bias).tensor_split([-8], -1)
    cos, sin = (t[:, ::2] for t in a)
    out = attend.absorbed(
        heads[..., :D],
        attend.rotate_pairs(heads[..., D:], cos, sin),
        latent,
        attend.rotate_pairs(k_rope, cos, sin),
        plain.kv_b,
        (D + 8) ** -0.5,
        attend.causal(T, T),
    )
    got = lin(out.transpose(1, 2).flatten(2), plain.o, plain.o_bias)
    assert same(got, plain.run(X, a))


def test_more_rank_is_closer():
    gqa = layer()
    q = turned(gqa, 2, 4)
    parts = components(gathered(gqa), q, 8)
    expected = forms.partial_rope(gqa, q, 8).run(X, angles())
    errors = [
        (forms.to_latent(gqa, q, 8, parts, r).run(X, angles()) - expected).norm()
        for r in (4, 16, 32, 64)
    ]
    assert errors == sorted(errors, reverse=True)


def test_rotation_gathers_energy():
    gqa = layer()
    W = HEADS.width
    m = gathered(gqa)[:W, :W]
    kept = [energy_kept(m, turned(gqa, 1, f), 16) for f in (1, 2, 4, 8)]
    assert kept == sorted(kept) and kept[0] > 1 / HEADS.J
    assert energy_kept(m, turned(gqa, 1, 1), W) == pytest.approx(1)


@pytest.mark.parametrize("n", [1, 2, 6, 64, 96, 192, 448])
def test_spread_is_orthogonal_and_even(n):
    h = hadamard(n)
    assert same(h @ h.T, torch.eye(n, dtype=torch.float64))
    assert h.abs().max() <= 1.5 * n**-0.5


def test_allocation_keeps_the_mean_and_prefers_flat_spectra():
    steep, flat = torch.logspace(0, -12, 256), torch.ones(256)
    ranks = allocate([steep, flat, steep], 128, 32, 256)
    assert sum(ranks) == 3 * 128 and ranks[1] > ranks[0] and all(r % 32 == 0 for r in ranks)
    assert allocate([flat, flat], 300, 64, 100) == [64, 64]


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_frequencies_are_transformers(kind):
    config = tiny.LlamaConfig(
        head_dim=32,
        rope_parameters={
            "rope_type": kind,
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    )
    mine = frequencies(settings(config.to_dict()), 32)
    if kind == "default":
        expected = 5e5 ** -(torch.arange(0, 32, 2) / 32)
    else:
        expected, _ = ROPE_INIT_FUNCTIONS[kind](config)
    torch.testing.assert_close(mine.float(), expected)
    # a narrower head uses every c-th of them
    torch.testing.assert_close(frequencies(settings(config.to_dict()), 8), mine[::4])


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    for arch in tiny.ARCHITECTURES:
        extra = {"sliding_window": 9} if arch == "mistral" else {}
        tiny.save(root / arch, arch, sharded=arch == "qwen2", **extra)
    return {arch: root / arch for arch in tiny.ARCHITECTURES}


IDS = torch.randint(0, tiny.VOCAB, (12, 32), generator=torch.Generator().manual_seed(2))
FULL = 2 * 128 - 32


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2"])
def test_decoder_is_transformers_model(sources, arch):
    decoder = CheckpointDecoder(Checkpoint.open(sources[arch]))
    model, _ = hf.load(sources[arch], dtype=torch.float32)
    h = decoder.embed(IDS)
    for i in range(decoder.count):
        h = advance(decoder, i, h)
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits
    torch.testing.assert_close(decoder.head(h), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2"])
def test_converted_checkpoint_is_the_partial_model(sources, arch, tmp_path):
    """What transformers computes at full rank is what the decoder computes with partial RoPE."""
    options = Options(FULL, 32, 4, balance=False)
    report = to_mla(sources[arch], tmp_path / "out", options, IDS[:8], IDS[8:])
    model, _ = hf.load(tmp_path / "out", dtype=torch.float32)
    decoder = CheckpointDecoder(Checkpoint.open(sources[arch]))
    h = start = decoder.embed(IDS[8:])
    entering = decoder.embed(IDS[:8])
    for i in range(decoder.count):
        gqa = decoder.layer(i).attention.to(torch.float64)
        m = moments(decoder, i, entering)
        q = rotation(pair_moments(m[:128, :128], decoder.heads), decoder.heads, 2, 4)
        h = advance(decoder, i, h, forms.partial_rope(gqa, q, 32).to(torch.float32))
        entering = advance(decoder, i, entering)
    assert not torch.equal(h, start)
    with torch.inference_mode():
        got, expected = model(input_ids=IDS[8:]).logits, decoder.head(h)
    assert (got - expected).norm() < 0.02 * expected.norm()  # weights in bf16
    bands = ((2, 2, 4, 8, 16), (4,) * 8)  # the second is what fold 4 is
    same_fold = to_mla(
        sources[arch],
        tmp_path / "bands",
        Options(FULL, 32, (4, bands[1]), balance=False),
        IDS[:8],
        IDS[8:],
    )
    assert same_fold.kl == report.kl and same_fold.folds == [4, bands[1]]
    wide = Options(FULL, 32, bands, balance=False)
    assert to_mla(sources[arch], tmp_path / "wide", wide, IDS[:8], IDS[8:]).kl != report.kl
    assert report.folds == [4, 4] and report.bytes_per_token == 2 * 2 * (FULL + 32)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["sliding_window"] == (9 if arch == "mistral" else None)
    assert config["attention_bias"] == (arch == "qwen2")
    assert (tmp_path / "out/LICENSE").exists()


def test_adaptive_folds_are_the_greedy_ones(sources):
    """Every choice is the best of its trials, which all keep what was chosen before."""
    decoder = CheckpointDecoder(Checkpoint.open(sources["llama"]))
    folds = folds_of(decoder.heads, 2)

    def candidate(i, fold):
        m = moments(decoder, i, decoder.embed(IDS[:8]))[:128, :128]
        q = rotation(pair_moments(m, decoder.heads), decoder.heads, 2, fold)
        return forms.partial_rope(decoder.layer(i).attention.to(torch.float64), q, 32)

    search = Search(decoder, IDS[8:], candidate)
    found = search.adaptive(folds)
    assert len(search.trials) == len(folds) * decoder.count
    last, first = search.trials[: len(folds)], search.trials[len(folds) :]
    assert found[1] == min(last, key=lambda t: t.divergence).folds[0]
    assert {t.folds for t in first} == {(f, found[1]) for f in folds}
    assert found[0] == min(first, key=lambda t: t.divergence).folds[0]
    assert search.adaptive(folds, known=[found[1]]) == found


def test_interrupted_conversions_resume_to_the_same_bytes(sources, tmp_path):
    for fold, stages in (
        ("adaptive", (("folds", 10), ("layers", 1))),
        ("bands", (("statistics", 1),)),
    ):
        check_resume(sources["qwen2"], tmp_path / fold, fold, stages)


def check_resume(source, tmp_path, fold, stages):
    options = Options(64, 32, fold, hadamard=True, layer_ranks=True)
    tmp_path.mkdir()
    whole = to_mla(source, tmp_path / "whole", options, IDS[:8], IDS[8:])
    for stage, at in stages:
        out = tmp_path / f"{stage}"

        def stop(step, stage=stage, at=at):
            if (step.stage, step.done) == (stage, at):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            to_mla(source, out, options, IDS[:8], IDS[8:], progress=stop)
        assert not out.exists()
        again = to_mla(source, out, options, IDS[:8], IDS[8:], resume=True)
        assert again.folds == whole.folds
        assert fold == "bands" or len(again.trials) < len(whole.trials)
        assert contents(out) == contents(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        to_mla(source, tmp_path / "x", options, IDS[:8], IDS[8:], progress=stop)
    with pytest.raises(ConversionError, match="another options"):
        to_mla(source, tmp_path / "x", Options(96, 32), IDS[:8], IDS[8:], resume=True)


@pytest.mark.parametrize(
    "options, message",
    [
        (Options(225, 32), r"rank: expected 1 to 224, the 256 channels .* less .*32; got 225"),
        (Options(64, 32, 3), r"fold: expected a multiple of the collapse 2 .*such as 2, 4.*got 3"),
        (Options(64, 32, 1), r"multiple of the collapse 2 .*got 1"),
        (Options(64, 32, 64), r"divides 32.*got 64"),
        (Options(64, 32, (4, (2, 6, 8))), r"fold: expected bands of .* collapse 2 .*add up to 16"),
        (Options(64, 32, (4, (3, 29))), r"fold: expected bands of multiples of the collapse 2"),
        (Options(64, 32, (4, 4, 4)), r"fold: expected 1 or 2 numbers, got 3"),
        (Options(64, 48), r"rope: expected head_dim / 1, 2 or 4 = 64, 32, 16 .*got 48"),
        (Options(64, 32, "best"), r"fold: expected a number.*got 'best'"),
    ],
)
def test_options_out_of_range(sources, tmp_path, options, message):
    with pytest.raises(ConversionError, match=message):
        to_mla(sources["llama"], tmp_path / "out", options, IDS[:8], IDS[8:])
    assert list(tmp_path.iterdir()) == []


def test_unfit_sources(sources, tmp_path):
    def convert(path, cal=IDS[:8]):
        return to_mla(path, tmp_path / "out", Options(64, 32, 4), cal, IDS[8:])

    with pytest.raises(ConversionError, match=r"Qwen3ForCausalLM.*norms between the projections"):
        convert(sources["qwen3"])
    with pytest.raises(ConversionError, match=r"at least 256 tokens.*gives 224"):
        convert(sources["llama"], IDS[:7])
    copy = Path(shutil.copytree(sources["llama"], tmp_path / "nan"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = torch.nan
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"layers.1.self_attn.k_proj.*got 1 of 32768 NaN"):
        convert(copy)
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = 0
    tensors["model.layers.0.input_layernorm.weight"][:] = 3e38  # finite, its products are not
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"layer 0: moments.*got \d+ of 65536 NaN"):
        convert(copy)
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"rope_type of default, linear, llama3.*'yarn'"):
        convert(copy)


def test_windows_are_disjoint_and_even():
    windows = torch.arange(40).view(20, 2)
    a, b = spread(windows, [6, 2], "text")
    assert len(a) == 6 and len(b) == 2
    assert not set(a[:, 0].tolist()) & set(b[:, 0].tolist())
    assert a[-1, 0] > 25 and b[-1, 0] > 15
    a, b = spread(windows, [60, 20], "text")
    assert len(a) == 15 and len(b) == 5
    with pytest.raises(TooShortError, match=r"at least 2 windows of 2 tokens, the text gives 1"):
        spread(windows[:1], [6, 2], "text")
    assert collapse_of(HEADS, 4) == 4


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    words = torch.randint(0, 90, (4, 400), generator=torch.Generator().manual_seed(5))
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text("\0".join(" ".join(f"w{int(i)}" for i in row) for row in words))
    return path


def test_command(sources, text, tmp_path):
    common = ("--calib", text, "--ctx", 32, "--calib-tokens", 512, "--select-tokens", 128)
    args = ("to-mla", sources["llama"], tmp_path / "mla", "--rank", 96, *common)
    answer = answer_of(run(*args, "--json"))
    assert {"ppl_before", "folds", "bytes_per_token"} <= answer.keys()
    assert len(answer["folds"]) == 2 and answer["bytes_per_token"] == 2 * 2 * (96 + 32)
    shown = run(
        *args[:2], tmp_path / "two", *args[3:], "--fold", "4,2", "--hadamard", "--layer-ranks"
    )
    assert shown.exit_code == 0 and "key energy" in shown.stdout
    scored = answer_of(
        run(
            "eval",
            tmp_path / "mla",
            "--text",
            text,
            "--ref",
            sources["llama"],
            "--json",
            "--limit-tokens",
            200,
            "--ctx",
            64,
        )
    )
    assert 0 < scored["kl"] < 2
    refused(run("to-mla", sources["llama"], tmp_path / "x", *common, "--rank", 250), "224", "250")
    refused(run("to-mla", sources["llama"], tmp_path / "x", *common, "--fold", "x"), "adaptive")
    refused(run("to-mla", tmp_path / "mla", tmp_path / "x", *common), "latent attention already")
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w3")
    refused(run("to-mla", sources["llama"], tmp_path / "x", "--calib", short), "windows of 1024")
    assert not (tmp_path / "x").exists()
