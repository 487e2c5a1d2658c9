"""pytest-benchmark over the cases of ``tessella bench``: a benchmark for every call of a case.

    pytest bench/bench_*.py --benchmark-enable                     quick cases
    pytest bench/bench_*.py --benchmark-enable --full -k "M=16"    cases of the published records

It gives pytest-benchmark's statistics, histograms and comparison of runs. The published records
come from ``tessella bench``, which times the calls of a case in turn.
"""

from itertools import count

import pytest
import torch

from tessella.bench import families
from tessella.bench.suite import Selection


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="full cases instead of quick ones")
    parser.addoption("--bench-threads", type=int, default=1, help="threads of every case")


def pytest_generate_tests(metafunc):
    """A module's FAMILY gives its cases and the calls in them; nothing is built yet."""
    family = families.load(metafunc.module.FAMILY, "cpu")
    threads = metafunc.config.getoption("--bench-threads")
    cases = family.cases(not metafunc.config.getoption("--full"))
    parameters = [
        pytest.param(
            (family, case | {"threads": threads}, name),
            id=f"{' '.join(f'{k}={v}' for k, v in case.items())} {name}",
        )
        for case in cases
        for name in family.calls
    ]
    metafunc.parametrize("call", parameters, indirect=True)


@pytest.fixture
def call(request, benchmark):
    """One call of a case, which rotates over its buffers; skips a rival that is not installed."""
    family, case, name = request.param
    before = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    prepared = family.prepare(case, Selection())
    calls = {s.name: s.call for s in prepared.subjects}
    calls |= {**prepared.rivals, **prepared.apart}
    if name not in calls:
        pytest.skip(f"{name}: {prepared.absent[name]}")
    benchmark.group = f"{family.name} {' '.join(f'{k}={v}' for k, v in case.items())}"
    numbers = count()
    yield lambda: calls[name](next(numbers))
    torch.set_num_threads(before)
