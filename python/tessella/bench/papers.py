"""What five papers say, beside what is measured here: one row a number, made from results files.

A row whose results file does not exist says what is missing, and fills itself once it is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from tessella.models.serving import SHAPES, Row, Setting, plan

Record = dict[str, Any]

GEMM, CHAIN = "h200/w4ax_gemm.json", "h200/w4ax_chain.json"
ATTENTION, SERVE = "h200/msm.json", "h200/serve.json"
CPU_GEMM, CPU_ATTENTION, CPU_E2E = "cpu/w4ax_gemm.json", "cpu/msm.json", "cpu/e2e.json"
RECIPES, LAYER, KV = "accuracy/recipes.json", "accuracy/fmpq_layer.json", "accuracy/kv.json"
MLA = "accuracy/mla.json"

MEASURED, PREDICTED, NOT = "measured", "predicted", "not reproducible here"
PENDING = "not measured yet"


class Results:
    """Results files below bench/results by path; a file that does not exist has no records."""

    def __init__(self, read: Callable[[str], str]):
        self._read = read

    def __call__(self, path: str, **case: Any) -> list[Record]:
        """Records whose case (or fields, where there is no case) has these values.

        A value may be a tuple of those that are wanted.
        """
        try:
            records = json.loads(self._read(f"bench/results/{path}"))
        except (KeyError, FileNotFoundError):
            return []

        def fits(r: Record) -> bool:
            found = r.get("case", r)
            return all(
                found.get(k) in (v if isinstance(v, tuple) else (v,)) for k, v in case.items()
            )

        return [r for r in records if fits(r)]


@dataclass(frozen=True)
class Ours:
    """What stands beside a paper's number; `file` None: nothing was measured."""

    status: str
    text: str
    file: str | None = None


@dataclass(frozen=True)
class Claim:
    """A number of a paper, what it is a number of, and how ours is found."""

    paper: str
    number: str
    of: str
    ours: Callable[[Results], Ours]


def speedup(records: list[Record], baseline: str) -> float | None:
    """Geometric mean of a baseline's time over ours; None without records that have it."""
    ratios = [r["baselines"][baseline] / r["us"] for r in records if r["baselines"].get(baseline)]
    return geometric_mean(ratios) if ratios else None


def _missing(file: str, why: str = "") -> Ours:
    return Ours(PENDING, f"{why}no `{file}`")


def _comet_kernel(results: Results) -> Ours:
    batches = (16, 32, 64, 128, 256)
    records = results(GEMM, scheme="twolevel", act="int8", M=batches)
    mean = speedup(records, "cublas_bf16")
    if mean is None:
        return _missing(GEMM)
    each = [speedup([r for r in records if r["case"]["M"] == M], "cublas_bf16") for M in batches]
    parts = ", ".join(f"{M}: {x:.2f}x" for M, x in zip(batches, each) if x)
    return Ours(
        MEASURED,
        f"**{mean:.2f}x** over cuBLAS bf16, geometric mean over the same batches and twelve "
        f"linears ({parts}); H200, INT8 activations: Hopper has no INT4 tensor core, so INT4 "
        "blocks would save it traffic only",
        GEMM,
    )


def _serving(baselines: tuple[str, ...], rig: str) -> Callable[[Results], Ours]:
    """Tokens/s of the best 4-bit recipe over a baseline recipe, at the same model and lengths."""

    def ours(results: Results) -> Ours:
        cases: dict[tuple, dict[str, float]] = {}
        for r in results(SERVE):
            of = cases.setdefault((r["model_shape"], r["in"], r["out"]), {})
            of[r["recipe"]] = max(of.get(r["recipe"], 0.0), r["tok_s"])
        ratios = []
        for (shape, *_), of in cases.items():
            rivals = [v for k, v in of.items() if k in baselines]
            own = [v for k, v in of.items() if k.startswith(("w4a8", "w4ax"))]
            if rivals and own:
                ratios.append(f"{max(own) / max(rivals):.2f}x ({shape})")
        if ratios:
            against = " or ".join(baselines)
            return Ours(MEASURED, f"{', '.join(ratios)} over {against}, same engine, H200", SERVE)
        return _nearest_serving(results, rig)

    return ours


def _nearest_serving(results: Results, rig: str) -> Ours:
    """What comes closest while no serving run is on record: a block's linears, a CPU's decoding."""
    parts = []
    of_block = results(CHAIN, model="llama3-8b", scheme="twolevel", M=(16, 64))
    block = speedup(of_block, "cublas_bf16")
    if block is not None:
        parts.append(
            f"linears and norms of a Llama-3-8B block, H200, M 16 to 64: {block:.2f}x bf16"
        )
    decode = results(CPU_E2E, phase="decode", recipe="w4a8kv4")
    if (cpu := speedup(decode, "transformers_bf16")) is not None:
        parts.append(
            f"decoding a Llama-3.2-1B shape on two CPU cores: {cpu:.2f}x transformers bf16"
        )
    nearest = f"; nearest: {'; '.join(parts)}" if parts else ""
    files = f"{CHAIN}, {CPU_E2E}" if len(parts) == 2 else None
    return Ours(NOT, f"{rig}; no {SERVE} yet{nearest}", files)


def _dequantisation(results: Results) -> Ours:
    found = [r for r in results(GEMM, scheme="twolevel") if "dequant_share" in r["extra"]]
    if found:
        costs = [r["extra"]["dequant_share"] for r in found]
        of = sorted(r["case"]["M"] for r in found)
        below = "; below 0 %, reading half the bytes saves more than decoding costs"
        return Ours(
            MEASURED,
            f"{min(costs):.0%} to {max(costs):.0%} of the kernel's time, against the same kernel "
            f"on pre-widened weights, {len(costs)} cases of M = {of[0]} to {of[-1]}, two-level"
            f"{below if min(costs) < 0 else ''}; H200",
            GEMM,
        )
    shares = [r["roofline_frac"] for r in results(GEMM, scheme="twolevel", act="int8", M=8192)]
    if not shares:
        return _missing(GEMM)
    loss = 1 - geometric_mean(shares)
    return Ours(
        PREDICTED,
        f"at most {loss:.0%}: that is what 8192 tokens lose of the INT8 rate measured alone, for "
        "all reasons; the loop on pre-widened weights, which tells them apart, is not on record",
        GEMM,
    )


def _xy_gemm(results: Results) -> Ours:
    own = speedup(results(CPU_GEMM, scheme="twolevel", act="int8", isa="avx512vnni"), "torch_bf16")
    nearest = (
        f"; the same plans on two CPU cores: {own:.2f}x torch's bf16 linear over M = 1 to 512"
        if own
        else ""
    )
    rig = "no Ascend NPU here: kernels ran on a host emulator only, which tells no time"
    return Ours(NOT, rig + nearest, CPU_GEMM if own else None)


def _xy_attention(results: Results) -> Ours:
    parts = []
    for file, device, name in (
        (ATTENTION, "H200", None),
        (CPU_ATTENTION, "two CPU cores", "torch_folded_bf16"),
    ):
        records = results(file)
        rivals = sorted({b for r in records for b in r["baselines"]})
        found = [(b, speedup(records, b)) for b in rivals if name in (None, b)]
        parts += [f"{x:.2f}x {b} on {device}" for b, x in found if x]
        if parts:
            break
    rig = "no Ascend NPU here"
    if not parts:
        return Ours(NOT, f"{rig}; no {ATTENTION} yet")
    gpu = "" if file == ATTENTION else f" (no {ATTENTION} yet)"
    return Ours(
        NOT, f"{rig}; the same kernel family, all cases on record: {', '.join(parts)}{gpu}", file
    )


def _comet_share(results: Results) -> Ours:
    parts, files = [], []
    wide = [r for r in results(LAYER) if r["recipe"] == "w4ax" and r["K"] >= 4096]
    if wide:
        shares = [r["w4a4_fraction"] for r in wide]
        errors = [r["error"] for r in wide]
        plain = [r["error"] for r in results(LAYER) if r["recipe"] == "w4a4" and r["K"] >= 4096]
        parts.append(
            f"{min(shares):.0%} to {max(shares):.0%} on synthetic layers of K = 4096 and more "
            f"(output error at most {max(errors):.1%}; all INT4: {max(plain):.0%})"
        )
        files.append(LAYER)
    real = [r for r in results(RECIPES) if r["recipe"].startswith("w4ax") and r["w4a4_fraction"]]
    if real:
        shares = [r["w4a4_fraction"] for r in real]
        parts.append(f"{min(shares):.0%} to {max(shares):.0%} on the models of the recipe table")
        files.append(RECIPES)
    if not parts:
        return _missing(RECIPES)
    return Ours(MEASURED, "; ".join(parts), ", ".join(files))


def _deco_memory(results: Results) -> Ours:
    codecs = {
        r["kv"]: r
        for r in results(KV, recipe="bf16")
        if r["kv"] in ("bf16", "kv4-deco", "kv4-hadamard")
    }
    if len(codecs) < 3:
        return _missing(KV)
    whole = codecs["bf16"]["cache_bytes_per_token"]
    parts = [
        f"{1 - codecs[c]['cache_bytes_per_token'] / whole:.1%} with `{c}` (perplexity "
        f"x{codecs[c]['ppl_ratio']:.4f})"
        for c in ("kv4-deco", "kv4-hadamard")
    ]
    scales = "scales and zeros of each token included, which the paper leaves out"
    return Ours(MEASURED, f"{', '.join(parts)}; {scales}", KV)


def _mla_folds(results: Results) -> Ours:
    """What layers of their own folds, or bands, take off the loss of the best fold for all."""
    original = {r["model"]: r["ppl"] for r in results(MLA) if not r.get("latent")}
    losses: dict[
        tuple, dict[str, float]
    ] = {}  # by balanced or not: balancing is no choice of folds
    for r in results(MLA, kv=None):
        latent = r.get("latent")
        if not latent or latent["hadamard"] or latent["healed"] or latent["ranks"]:
            continue
        kind = latent["fold"] if latent["fold"] in ("adaptive", "bands") else "fixed"
        loss = r["ppl"] - original[r["model"]]
        balanced = bool(latent.get("balance"))
        # what is balanced has to beat the single folds of both kinds
        for group in {balanced, True} if kind == "fixed" else {balanced}:
            key = (r["model"], int(latent["rank"]), latent["rope"], group)
            of = losses.setdefault(key, {})
            of[kind] = min(of.get(kind, loss), loss)
    parts = [
        f"{kind} {round(100 - 100 * of[kind] / of['fixed']) + 0} % ({model}, {rank} + {rope})"
        for (model, rank, rope, _), of in losses.items()
        for kind in ("bands", "adaptive")
        if {kind, "fixed"} <= of.keys()
    ]
    if not parts:
        return _missing(MLA, "the papers' models are not here, small ones will do: ")
    return Ours(
        MEASURED,
        f"{', '.join(parts)} of the perplexity that the best single fold loses, on text that the "
        "choice never saw",
        MLA,
    )


def _mla_concurrency(results: Results) -> Ours:
    def of(name: str, **setting: Any) -> Row:
        return {r.cache: r for r in plan(SHAPES[name], Setting(**setting))}["mla-bf16"]

    small = of("openpangu-7b", base_sequences=95, max_seqs=256)
    large = of("qwen2.5-14b", base_sequences=55, max_seqs=256)
    return Ours(
        PREDICTED,
        f"{small.ratio:.2f}x: memory is enough for {small.fit} sequences, the engine's limit of "
        f"256 caps them; 14B: {large.ratio:.2f}x, what else took memory there is not published "
        "(`tessella plan serving`; no Ascend A3 here)",
    )


def _not(why: str) -> Callable[[Results], Ours]:
    return lambda results: Ours(NOT, why)


_A100 = "no A100 nor TensorRT-LLM here"

CLAIMS = (
    Claim(
        "COMET", "2.88x", "GEMM over cuBLAS fp16, batch 16 to 256, 75 % W4A4, A100", _comet_kernel
    ),
    Claim(
        "COMET",
        "2.02x",
        "tokens/s over TensorRT-LLM W4A16, 1024 in, 512 out, A100",
        _serving(("w4a16",), _A100),
    ),
    Claim("COMET", "84 %", "least share of the GEMM volume in W4A4", _comet_share),
    Claim(
        "QServe",
        "1.2-3.5x",
        "tokens/s over the best TensorRT-LLM, A100 and L40S",
        _serving(("bf16", "w4a16", "w8a8", "fp8"), "no A100, L40S nor TensorRT-LLM here"),
    ),
    Claim(
        "QServe",
        "20-90 %",
        "of a main loop's time goes to dequantisation in W4A16/W4A4 kernels",
        _dequantisation,
    ),
    Claim("XY-Serve", "14.6 %", "GEMM faster than torch-npu's linear, Ascend 910B", _xy_gemm),
    Claim("XY-Serve", "21.5 %", "attention faster than torch-npu's, 910B", _xy_attention),
    Claim(
        "XY-Serve",
        "89 %",
        "more requests a second, end to end, vLLM on 910B",
        _serving(("bf16",), "no Ascend NPU here"),
    ),
    Claim("DecoQuant", "75 %", "less cache memory with 4-bit codes", _deco_memory),
    Claim("YouZhi", "35 %", "lower perplexity after conversion: adaptive folds", _mla_folds),
    Claim("YouZhi", "2.69x / 2.43x", "requests at once, 7B and 14B, Ascend A3", _mla_concurrency),
    Claim(
        "YouZhi",
        "12.3 % / 7.0 %",
        "better on finance benchmarks, 7B and 14B, after training",
        _not("trained on data that was not published, on models of 7B and 14B"),
    ),
)
"""Every number that the papers' abstracts state, and COMET's share of W4A4."""


def markdown(read: Callable[[str], str]) -> str:
    """The table; `read` gives the text of a repository file, or raises KeyError."""
    results = Results(read)
    lines = ["| paper | says | of what | status | here | from |", "|---|---|---|---|---|---|"]
    for claim in CLAIMS:
        ours = claim.ours(results)
        files = ", ".join(f"`{f}`" for f in (ours.file or "").split(", ") if f)
        cells = (claim.paper, claim.number, claim.of, ours.status, ours.text, files)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
