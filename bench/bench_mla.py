"""Benchmarks of the family mla."""

FAMILY = "mla"


def test_mla(benchmark, call):
    benchmark(call)
