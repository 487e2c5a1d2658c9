"""Timers of the benches: rotation, batches, interleaving. Nothing here asserts a time."""

import pytest

from tessella.bench import timing


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def test_summary_of_samples():
    t = timing.summarise([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (t.us, t.best_us, t.samples) == (3.0, 1.0, 5)
    assert t.spread == pytest.approx((4.5 - 1.5) / 3.0)
    assert timing.summarise([7.0]) == timing.Timing(7.0, 7.0, 0.0, 1)


@pytest.mark.parametrize(
    "each, cache, copies",
    [(1 << 20, 32 << 20, 64), (33 << 20, 32 << 20, 2), (200 << 20, 32 << 20, 2), (0, 1 << 20, 64)],
)
def test_rotation_leaves_nothing_cached(each, cache, copies):
    n = timing.rotations(each, cache)
    assert n == copies
    assert n == 64 or n * each >= 2 * cache


def test_last_level_cache_is_plausible():
    assert 32 << 20 <= timing.last_level_cache_bytes() <= 4 << 30


def test_samples_fit_the_budget():
    counts = timing.sample_counts(
        {"fast": 1e-6, "medium": 0.5, "slow": 4.0, "hopeless": 60.0}, reps=30, budget_s=40
    )
    assert counts == {"fast": 30, "medium": 20, "slow": timing.FEWEST}


@pytest.fixture
def one_call_a_sample(monkeypatch):
    monkeypatch.setattr(timing, "MOST_CALLS", 1)


def test_short_calls_are_timed_in_batches(monkeypatch):
    monkeypatch.setattr(timing, "MOST_CALLS", 5)
    monkeypatch.setattr(timing, "SAMPLE_S", 1e9)
    calls = []
    assert timing.time_cpu({"a": calls.append}, reps=3)["a"].samples == 3
    assert calls == list(range(2 + 3 * 5))  # two to warm up
    slow = []
    monkeypatch.setattr(timing, "SAMPLE_S", 0.0)
    timing.time_cpu({"a": slow.append}, reps=3)
    assert slow == list(range(2 + 3))


def test_calls_are_interleaved_and_rotate(one_call_a_sample):
    log = []
    calls = {name: (lambda i, name=name: log.append((name, i))) for name in "abc"}
    times = timing.time_cpu(calls, reps=6)
    assert {t.samples for t in times.values()} == {6}
    rounds = log[6:]  # after two warm-up calls of each
    for i in range(6):
        assert {name for name, _ in rounds[3 * i : 3 * i + 3]} == set("abc")
    for name in "abc":
        assert [i for n, i in log if n == name] == list(range(8))
    orders = {tuple(n for n, _ in rounds[3 * i : 3 * i + 3]) for i in range(6)}
    assert len(orders) > 1


def test_a_hopeless_call_is_left_out_after_one_try():
    calls = []
    assert timing.time_cpu({"a": calls.append}, most_s=0.0) == {}
    assert calls == [0]


def test_the_first_run_of_a_long_call_counts(monkeypatch, one_call_a_sample):
    monkeypatch.setattr(timing, "LONG_S", 0.0)
    calls = []
    assert timing.time_cpu({"a": calls.append}, reps=4)["a"].samples == 4
    assert calls == [0, 1, 2, 3]
