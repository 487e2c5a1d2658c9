"""PagedKVCache: attention through its pages is dense attention on what the codec keeps."""

from __future__ import annotations

import random

import pytest
import torch

from tessella.kv.cache import CacheFullError, CacheShape, PagedKVCache
from tessella.kv.step import tree_bits

L, J, H, D, Z = 2, 2, 4, 32, 16
SHAPE = CacheShape(L, J, D, torch.float32)
CODECS = (
    "fp32",
    "fp8",
    "int8",
    "kv4",
    "kv4-g16",
    "k4v2-hadamard",
    "kv4-kivi",
    "kv4-kivi-hadamard",
    "kv4-kivi-mean",
    "kv4-mean",
    "kv4-deco16",
)
TOLERANCE = {"fp32": 1e-4}


class Tokens:
    """Random keys, values and queries of a sequence: what a model would compute, by layer."""

    def __init__(self, rng: torch.Generator, n: int, like: Tokens | None = None, shared: int = 0):
        self.q = torch.randn(L, n, H, D, generator=rng)
        self.k = torch.randn(L, n, J, D, generator=rng) + torch.linspace(-2, 2, D)
        self.v = torch.randn(L, n, J, D, generator=rng)
        if like is not None:
            for mine, theirs in ((self.k, like.k), (self.v, like.v), (self.q, like.q)):
                mine[:, :shared] = theirs[:, :shared]


def dense(codec, q, k, v, seen: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt D) v of rows q over all of k, v as the codec keeps them."""
    k, v = codec.roundtrip(k, v, Z)
    k, v = (t.repeat_interleave(H // J, 1) for t in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * D**-0.5
    p = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
    return torch.einsum("hts,shd->thd", p, v)


def causal(new: int, total: int) -> torch.Tensor:
    return torch.ones(new, total, dtype=torch.bool).tril(total - new)


def run(step, parts: list[tuple[Tokens, range]], **how) -> torch.Tensor:
    """Attention outputs [L, T, H, D] of a step over the named tokens of each sequence."""
    outs = []
    for layer in range(L):
        q, k, v = (
            torch.cat([getattr(t, name)[layer, list(span)] for t, span in parts]) for name in "qkv"
        )
        outs.append(step.attend(layer, q, k, v, scale=D**-0.5, **how))
    return torch.stack(outs)


def expected(codec, parts: list[tuple[Tokens, range]]) -> torch.Tensor:
    outs = []
    for layer in range(L):
        rows = [
            dense(
                codec,
                t.q[layer, list(span)],
                t.k[layer, : span.stop],
                t.v[layer, : span.stop],
                causal(len(span), span.stop),
            )
            for t, span in parts
        ]
        outs.append(torch.cat(rows))
    return torch.stack(outs)


def close(got: torch.Tensor, want: torch.Tensor, codec: str) -> None:
    """Kernels keep queries and probabilities of coded pages in 8 bits."""
    error = float((got - want).norm() / want.norm().clamp_min(1e-9))
    assert error < TOLERANCE.get(codec, 0.02), error


@pytest.mark.parametrize("codec", CODECS)
def test_prefill_chunks_and_decode_in_one_batch(codec: str, rng):
    cache = PagedKVCache(SHAPE, codec, pages=80, page_size=Z)
    lengths = (300, 40, 1, 270)
    sequences = [(Tokens(rng, n), cache.open()) for n in lengths]
    done = [0] * 4
    for counts in ((30, 39, 1, 255), (0, 1, 0, 1), (260, 0, 0, 13), (10, 0, 0, 1)):
        parts = [(t, range(a, a + n)) for (t, _), a, n in zip(sequences, done, counts, strict=True)]
        step = cache.step([h for _, h in sequences], list(counts))
        close(run(step, parts), expected(cache.codec, parts), codec)
        done = [a + n for a, n in zip(done, counts, strict=True)]
    assert [cache.length(h) for _, h in sequences] == done == list(lengths)
    cache.clear()
    assert cache.main.table.pool.free == 80
    assert cache.young is None or cache.young.table.pool.free == len(cache.young.table.pool.holders)


@pytest.mark.parametrize("codec", ["kv4-mean", "kv4-deco16", "kv4-mean-hadamard"])
def test_a_fitted_codec_codes_a_sequence_once_it_has_its_tokens(codec: str, rng):
    cache = PagedKVCache(SHAPE, codec, pages=40, page_size=Z)
    t, h = Tokens(rng, 300), cache.open()
    exact = PagedKVCache(SHAPE, "fp32", pages=40, page_size=Z)
    e = exact.open()
    for start, stop in ((0, 200), (200, 255)):
        parts = [(t, range(start, stop))]
        young = run(cache.step([h], [stop - start]), parts)
        plain = run(exact.step([e], [stop - start]), parts)
        assert torch.equal(young, plain)
    assert cache.main.table.pool.free == 40
    parts = [(t, range(255, 256))]
    close(run(cache.step([h], [1]), parts), expected(cache.codec, parts), codec)
    parts = [(t, range(256, 300))]
    close(run(cache.step([h], [44]), parts), expected(cache.codec, parts), codec)
    assert cache.young.table.pool.free == len(cache.young.table.pool.holders)


@pytest.mark.parametrize("codec", CODECS)
def test_forks_go_their_own_ways(codec: str, rng):
    cache = PagedKVCache(SHAPE, codec, pages=80, page_size=Z)
    t, h = Tokens(rng, 330), cache.open()
    other = Tokens(rng, 330, t, 300)
    run(cache.step([h], [300]), [(t, range(300))])
    fork = cache.fork(h)
    taken = cache.main.table.pool.free
    parts = [(t, range(300, 310)), (other, range(300, 317))]
    close(run(cache.step([h, fork], [10, 17]), parts), expected(cache.codec, parts), codec)
    assert taken - cache.main.table.pool.free == 3  # a copy of the last page, and a new one each
    cache.free(h)
    parts = [(other, range(317, 330))]
    close(run(cache.step([fork], [13]), parts), expected(cache.codec, parts), codec)


@pytest.mark.parametrize("codec", [c for c in CODECS if "kivi" not in c])
def test_truncation(codec: str, rng):
    cache = PagedKVCache(SHAPE, codec, pages=40, page_size=Z)
    t, h = Tokens(rng, 320), cache.open()
    run(cache.step([h], [320]), [(t, range(320))])
    again = Tokens(rng, 320, t, 290)
    cache.truncate(h, 290)
    parts = [(again, range(290, 320))]
    close(run(cache.step([h], [30]), parts), expected(cache.codec, parts), codec)


def test_truncation_into_a_page_of_channels(rng):
    """The keys of the page come back as they were coded, and are coded again with new ones."""
    cache = PagedKVCache(SHAPE, "int8-kivi", pages=40, page_size=Z)
    t, h = Tokens(rng, 64), cache.open()
    run(cache.step([h], [60]), [(t, range(60))])
    again = Tokens(rng, 64, t, 37)
    cache.truncate(h, 37)
    parts = [(again, range(37, 64))]
    close(run(cache.step([h], [27]), parts), expected(cache.codec, parts), "int8-kivi")


@pytest.mark.parametrize("codec", ["fp32", "fp8", "int8", "kv4"])
def test_prompts_share_prefixes_to_the_token(codec: str, rng):
    cache = PagedKVCache(SHAPE, codec, pages=40, page_size=Z)
    t, ids = Tokens(rng, 50), list(range(100, 150))
    first = cache.open(ids)
    run(cache.step([first], [50]), [(t, range(50))])
    cache.publish(first, ids)
    cache.free(first)
    other = Tokens(rng, 60, t, 41)
    second = cache.open([*ids[:41], *range(19)])
    assert cache.length(second) == 41
    parts = [(other, range(41, 60))]
    close(run(cache.step([second], [19]), parts), expected(cache.codec, parts), codec)
    third = cache.open(ids)
    assert cache.length(third) == 49  # the page that was cut is still whole for others
    parts = [(t, range(49, 50))]
    close(run(cache.step([third], [1]), parts), expected(cache.codec, parts), codec)


@pytest.mark.parametrize("codec", ["kv4-kivi", "kv4-deco16"])
def test_codecs_that_share_no_prefixes(codec: str, rng):
    cache = PagedKVCache(SHAPE, codec, pages=40, page_size=Z)
    t, ids = Tokens(rng, 280), list(range(280))
    h = cache.open(ids)
    run(cache.step([h], [280]), [(t, range(280))])
    cache.publish(h, ids)
    assert cache.length(cache.open(ids)) == 0


def random_tree(rng: torch.Generator, n: int) -> torch.Tensor:
    """Each node sees its ancestors and itself."""
    seen = torch.eye(n, dtype=torch.bool)
    for i in range(1, n):
        seen[i] |= seen[int(torch.randint(0, i, (1,), generator=rng))]
    return seen


@pytest.mark.parametrize("codec", ["fp32", "fp8", "int8", "kv4", "kv4-hadamard"])
@pytest.mark.parametrize("n", [1, 7, 70])
def test_a_tree_beside_prefill_and_decode(codec: str, n: int, rng):
    cache = PagedKVCache(SHAPE, codec, pages=60, page_size=Z)
    t, a = Tokens(rng, 200), cache.open()
    u, b = Tokens(rng, 200), cache.open()
    run(cache.step([a, b], [37, 90]), [(t, range(37)), (u, range(90))])
    tree = random_tree(rng, n)
    c, w = cache.open(), Tokens(rng, 25)
    step = cache.step([b, a, c], [1, n, 25], [None, tree, None])
    parts = [(u, range(90, 91)), (t, range(37, 37 + n)), (w, range(25))]
    got = run(step, parts)
    want = expected(cache.codec, parts)
    seen = torch.cat([torch.ones(n, 37, dtype=torch.bool), tree], 1)
    for layer in range(L):
        rows = dense(
            cache.codec, t.q[layer, 37 : 37 + n], t.k[layer, : 37 + n], t.v[layer, : 37 + n], seen
        )
        want[layer, 1 : 1 + n] = rows
    close(got, want, codec)
    path = [int(i) for i in tree[n - 1].nonzero()]
    step.keep(1, path)
    assert cache.length(a) == 37 + len(path)
    kept = Tokens(rng, 38 + len(path), t, 37)
    for name in "kv":
        getattr(kept, name)[:, 37:-1] = getattr(t, name)[:, [37 + i for i in path]]
    parts = [(kept, range(37 + len(path), 38 + len(path)))]
    close(run(cache.step([a], [1]), parts), expected(cache.codec, parts), codec)


def test_bits_of_a_tree():
    tree = torch.ones(70, 70, dtype=torch.bool).tril()
    bits = tree_bits(tree)
    assert bits.shape == (70, 2) and bits.dtype == torch.int64
    assert bits[0].tolist() == [1, 0]
    assert bits[63].tolist() == [-1, 0]
    assert bits[65].tolist() == [-1, 3]
    assert tree_bits(tree[:2, :2], 3).tolist() == [[1, 0, 0], [3, 0, 0]]


@pytest.mark.parametrize("window", [5, 40])
def test_a_sliding_window(window: int, rng):
    cache = PagedKVCache(SHAPE, "fp32", pages=10, page_size=Z)
    t, h = Tokens(rng, 60), cache.open()
    run(cache.step([h], [50]), [(t, range(50))], window=window)
    got = run(cache.step([h], [10]), [(t, range(50, 60))], window=window)
    seen = causal(10, 60) & ~causal(10, 60).roll(-window, 1).tril(50 - window)
    at = torch.arange(50, 60)[:, None]
    seen = (torch.arange(60) <= at) & (torch.arange(60) > at - window)
    for layer in range(L):
        want = dense(cache.codec, t.q[layer, 50:], t.k[layer], t.v[layer], seen)
        close(got[layer], want, "fp32")


def test_pages_are_added_when_the_cache_may_grow(rng):
    cache = PagedKVCache(SHAPE, "kv4", pages=1, page_size=Z, grows=True)
    t, h = Tokens(rng, 100), cache.open()
    for start, stop in ((0, 10), (10, 70), (70, 100)):
        parts = [(t, range(start, stop))]
        got = run(cache.step([h], [stop - start]), parts)
        close(got, expected(cache.codec, parts), "kv4")
    assert len(cache.main.table.pool.holders) >= 7


@pytest.mark.parametrize("codec", ["fp32", "fp8", "kv4", "kv4-deco16"])
def test_a_full_cache_says_so_and_changes_nothing(codec: str, rng):
    cache = PagedKVCache(SHAPE, codec, pages=20, page_size=Z, sequences=2)
    t, a, b = Tokens(rng, 400), cache.open(), cache.open()
    run(cache.step([a], [300]), [(t, range(300))])
    before = [x.clone() for x in memory(cache)]
    with pytest.raises(CacheFullError, match="kv cache: full"):
        cache.step([a, b], [1, 300])
    assert all(torch.equal(x, y) for x, y in zip(before, memory(cache), strict=True))
    assert cache.length(a) == 300 and cache.length(b) == 0
    parts = [(t, range(300, 310))]
    close(run(cache.step([a], [10]), parts), expected(cache.codec, parts), codec)
    if cache.has_rows:
        with pytest.raises(CacheFullError, match="at most 2 sequences"):
            cache.open()


def memory(cache: PagedKVCache) -> list[torch.Tensor]:
    """The pages, as bytes."""
    stores = [s for s in (cache.main, cache.young) if s is not None]
    tensors = [x.pages if hasattr(x, "pages") else x.blob for s in stores for x in s.layers]
    return [t.view(torch.uint8) for t in tensors]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"k": (5, J, 16)}, r"k: expected torch.float32 \(5, 2, 32\), got .*\(5, 2, 16\)"),
        ({"v": (5, 1, D)}, r"v: expected .*got torch.float32 \(5, 1, 32\)"),
        ({"q": (5, 3, D)}, r"q: expected \[5, a multiple of 2, 32\], got \(5, 3, 32\)"),
        ({"q": (5, H, 64)}, "q: expected"),
        ({"k": (4, J, D)}, "k: expected"),
        ({"dtype": torch.bfloat16}, "k: expected torch.float32"),
    ],
)
def test_mismatched_tensors_are_refused_before_anything_is_written(change, words: str):
    cache = PagedKVCache(SHAPE, "kv4", pages=4, page_size=Z)
    step = cache.step([cache.open()], [5])
    before = [x.clone() for x in memory(cache)]
    shapes = {"q": (5, H, D), "k": (5, J, D), "v": (5, J, D), **change}
    dtype = shapes.pop("dtype", torch.float32)
    q, k, v = (torch.zeros(shapes[name], dtype=dtype) for name in "qkv")
    with pytest.raises(ValueError, match=words):
        step.attend(0, q, k, v, scale=1.0)
    assert all(torch.equal(x, y) for x, y in zip(before, memory(cache), strict=True))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: PagedKVCache(SHAPE, "kv5", pages=4), "expected bf16, fp16"),
        (lambda: PagedKVCache(SHAPE, "kv4-g48", pages=4), "multiple of 48, got D=32"),
        (lambda: PagedKVCache(SHAPE, "kv4-deco64", pages=4), "blocks of 64, got D=32"),
        (lambda: PagedKVCache(SHAPE, "kv4", pages=4, page_size=20), "multiple of 16 in 16..256"),
        (lambda: PagedKVCache(SHAPE, "kv4", pages=4, version=2), "version: expected 1, got 2"),
    ],
)
def test_caches_that_cannot_be(make, words: str):
    with pytest.raises(ValueError, match=words):
        make()


def test_bad_trees_and_sequences():
    cache = PagedKVCache(SHAPE, "kv4", pages=4, page_size=Z)
    h = cache.open()
    with pytest.raises(ValueError, match=r"tree: expected torch.bool \(3, 3\) for 3 tokens"):
        cache.step([h], [3], [torch.eye(4, dtype=torch.bool)])
    with pytest.raises(ValueError, match="live sequence, got 99"):
        cache.step([h, 99], [1, 1])
    assert cache.length(h) == 0
    step = cache.step([h], [20], [torch.ones(20, 20, dtype=torch.bool).tril()])
    q = torch.zeros(20, H, D)
    with pytest.raises(ValueError, match="no sliding window shorter"):
        step.attend(0, q, q[:, :J], q[:, :J], scale=1.0, window=8)
    fitted = PagedKVCache(SHAPE, "kv4-deco", pages=4, page_size=Z)
    step = fitted.step([fitted.open()], [2], [torch.ones(2, 2, dtype=torch.bool).tril()])
    with pytest.raises(ValueError, match="codes each token by itself, got kv4-deco"):
        step.keep(0, [0])


@pytest.mark.parametrize("codec, seed, operations", [("fp32", 1, 120), ("kv4", 2, 120)])
def test_random_operations_do_not_mix_sequences(codec: str, seed: int, operations: int):
    play(codec, seed, operations)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["fp32", "fp8", "int8", "kv4", "kv4-hadamard"])
def test_many_random_operations_do_not_mix_sequences(codec: str):
    play(codec, 3, 2000)


def play(codec: str, seed: int, operations: int) -> None:
    """Random steps, forks, cuts, frees and shared prompts; every output is checked."""
    rng, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    cache = PagedKVCache(SHAPE, codec, pages=30, page_size=Z)
    live: dict[int, tuple[Tokens, list[int]]] = {}
    book: list[tuple[Tokens, list[int]]] = []
    refused = reused = 0
    for _ in range(operations):
        kind = draw.choice(["step"] * 5 + ["open", "open", "fork", "truncate", "free"])
        if kind == "open" or not live:
            t, ids = Tokens(rng, 120), [draw.randrange(10**6) for _ in range(120)]
            if book and draw.random() < 0.6:
                old, old_ids = draw.choice(book)
                n = draw.randint(0, len(old_ids))
                t, ids = Tokens(rng, 120, old, n), [*old_ids[:n], *ids[n:]]
            h = cache.open(ids)
            reused += cache.length(h)
            live[h] = (t, ids)
            continue
        h = draw.choice(list(live))
        t, ids = live[h]
        n = cache.length(h)
        if kind == "fork" and len(live) < 6:
            live[cache.fork(h)] = (Tokens(rng, 120, t, n), [*ids[:n], *map(hash, "x" * (120 - n))])
        elif kind == "truncate":
            n = draw.randint(0, n)
            cache.truncate(h, n)
            live[h] = (Tokens(rng, 120, t, n), [*ids[:n], *(draw.random() for _ in range(n, 120))])
        elif kind == "free":
            if n:
                cache.publish(h, ids[:n])
                book.append((t, ids[:n]))
            cache.free(h)
            del live[h]
        else:
            chosen = draw.sample(list(live), draw.randint(1, len(live)))
            counts = [min(draw.choice((1, 1, 3, 17, 40)), 120 - cache.length(c)) for c in chosen]
            spans = [range(cache.length(c), cache.length(c) + m) for c, m in zip(chosen, counts)]
            parts = [(live[c][0], s) for c, s in zip(chosen, spans, strict=True)]
            try:
                step = cache.step(chosen, counts)
            except CacheFullError:
                refused += 1
                cache.free(h)
                del live[h]
                continue
            if step.tokens:
                close(run(step, parts), expected(cache.codec, parts), codec)
    assert refused and reused
    cache.clear()
    assert cache.main.table.pool.free == 30
