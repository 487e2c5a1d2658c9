"""Benchmarks of the family act_quant."""

FAMILY = "act_quant"


def test_act_quant(benchmark, call):
    benchmark(call)
