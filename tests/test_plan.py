"""``tessella plan``, and the cost model behind it."""

import pytest

from command import one_object, refused, run
from tessella import _native
from tessella.bench import ceilings, predict

needs_native = pytest.mark.skipif(_native._C is None, reason="needs compiled kernels")


@pytest.mark.parametrize(
    "args",
    [
        ["plan"],
        ["plan", "gemm", "1", "2"],
        ["plan", "gemm", "0", "64", "64"],
        ["plan", "gemm", "1", "64", "64", "--scheme", "int3"],
        ["plan", "gemm", "1", "64", "64", "--arch", "z80"],
        ["plan", "gemm", "1", "64", "64", "--isa", "mmx"],
    ],
    ids=" ".join,
)
def test_wrong_usage(args):
    assert run(*args).exit_code == 2


@needs_native
@pytest.mark.parametrize("M", [1, 4, 16, 64, 512])
@pytest.mark.parametrize("isa", ["avx512vnni", "avxvnni", "avx2"])
@pytest.mark.parametrize("T", [1, 2, 64])
def test_plan(M, isa, T):
    args = (M, 4096, 4096, "--threads", T, "--isa", isa, "--arch", "zen5", "--json")
    answer = one_object(run("plan", "gemm", *args).stdout)
    plan = answer["plan"]
    assert plan["kernel"].startswith(f"w4ax_gemm.{isa}.") and plan["chunk_rows"] <= M
    assert 0 < plan["roofline_us"] < plan["us"] and 0 < plan["roofline_frac"] < 1
    assert plan["bound"] == ("memory" if plan["memory_us"] >= plan["compute_us"] else "compute")
    assert answer["problem"]["threads"] == T


@needs_native
def test_predictions_grow_with_work_and_shrink_with_threads():
    def us(M, N=4096, threads=1):
        problem = predict.Gemm(M, N, 4096, threads=threads)
        return predict.gemm(problem, ceilings.of("zen5", threads)).us

    times = [us(M) for M in (1, 16, 64, 256, 1024)]
    assert times == sorted(times)
    assert us(256, 8192) > us(256) and us(256, threads=2) < us(256)


@needs_native
def test_plan_of_this_machine():
    supported = _native._C.cpu_isa()["supported"]
    done = run("plan", "gemm", 4, 256, 256, "--isa", supported[-1])
    assert done.exit_code == 0 and f"w4ax_gemm.{supported[-1]}." in done.stdout
    assert _native._C.cpu_isa()["best"] == supported[0]  # the cap is gone again


def test_plan_refuses_what_it_does_not_know():
    refused(
        run("plan", "gemm", 1, 64, 64, "--arch", "zen5", "--isa", "scalar"), "avx512vnni", "zen5"
    )
    missing = {"avx512vnni", "avxvnni"} - set(
        _native._C.cpu_isa()["supported"] if _native._C else ()
    )
    for isa in missing:
        refused(run("plan", "gemm", 1, 64, 64, "--isa", isa), "--arch zen5", isa)
