"""Benchmarks of the family kv4."""

FAMILY = "kv4"


def test_kv4(benchmark, call):
    benchmark(call)
