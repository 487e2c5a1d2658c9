"""Benchmarks of the family e2e."""

FAMILY = "e2e"


def test_e2e(benchmark, call):
    benchmark(call)
