"""Benchmarks of the family w4ax_gemm."""

FAMILY = "w4ax_gemm"


def test_w4ax_gemm(benchmark, call):
    benchmark(call)
