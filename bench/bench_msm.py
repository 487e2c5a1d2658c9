"""Benchmarks of the family msm."""

FAMILY = "msm"


def test_msm(benchmark, call):
    benchmark(call)
