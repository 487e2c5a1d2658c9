"""Rules over csrc/: the path of anything can be guessed, and torch stops at the entry points."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from repo import cxx
from repo.budgets import CXX
from repo.tree import Tree, rule

FAMILIES = {"act_quant", "w4ax_gemm", "msm", "kv4", "mla"}
PRIMITIVES = {"core", "layout", "cpu", "cuda"}
ROLES = re.compile(
    r"op\.cpp|params\.h|check\.h|plan\.(h|cpp)|kernels\.h|pack\.(h|cpp)"
    r"|cpu\.(cpp|inl)|cuda\.cu|tasks\.cuh|sm\d+[a-z]?(_\w+)?\.(cu|cuh)|plan_sm\d+\.(h|cpp)"
    r"|README\.md"
)
TOP = {"module.cpp", "ops_module.c", "families.h"}
"""The entry points of the two Python modules, _C and _ops, and the list of every kernel."""


@rule(
    bad=[
        {"csrc/act_quant/launcher.cpp": ""},
        {"csrc/act_quant/detail/op.cpp": ""},
        {"csrc/softmax/op.cpp": ""},
        {"csrc/register.cpp": ""},
        {"csrc/core/impl/hd.h": ""},
        {"csrc/cpu/kernel.cu": ""},
    ],
    good={
        "csrc/act_quant/sm90.cuh": "",
        "csrc/core/hd.h": "",
        "csrc/cuda/ptx.cuh": "",
        "csrc/module.cpp": "",
        "csrc/w4ax_gemm/pack.cpp": "",
    },
)
def role_words(tree: Tree) -> Iterator[str]:
    """Folder = family, file = role, suffix = backend; both sets of words are closed."""
    for path in sorted(tree.files):
        top, *parts = PurePosixPath(path).parts
        if top != "csrc":
            continue
        if len(parts) == 1:
            known = parts[0] in TOP
        elif len(parts) != 2:
            known = False
        elif parts[0] in PRIMITIVES:
            device = parts[0] == "cuda"
            kinds = {".h", ".cuh"} if device else {".h", ".cpp", ".inl"}
            known = PurePosixPath(path).suffix in kinds
        else:
            known = parts[0] in FAMILIES and ROLES.fullmatch(parts[1]) is not None
        if not known:
            yield f"{path}: not a family of {sorted(FAMILIES)} with a known role"


@rule(
    bad=[
        {"csrc/act_quant/op.cpp": "", "python/tessella/ops/act_quant.py": ""},
        {"csrc/act_quant/op.cpp": "", "tests/test_act_quant.py": ""},
        {"csrc/mla/op.cpp": "", "python/tessella/ops/mla.py": "", "tests/test_mla.py": ""},
        {"python/tessella/ref/matmul.py": ""},
        {"python/tessella/ops/utils_.py": ""},
    ],
    good={
        "csrc/mla/op.cpp": "",
        "python/tessella/ops/mla.py": "",
        "python/tessella/ref/mla.py": "",
        "python/tessella/ops/_register.py": "",
        "tests/test_mla.py": "",
        "python/tessella/bench/mla.py": "",
        "python/tessella/bench/timing.py": "",
    },
)
def families_are_complete(tree: Tree) -> Iterator[str]:
    """A family in csrc/ has its op, reference, test and bench; ops/ and ref/ hold only families."""
    built = {PurePosixPath(p).parts[1] for p in tree.files if p.startswith("csrc/")} & FAMILIES
    package = tuple(f"python/tessella/{part}/{{}}.py" for part in ("ops", "ref", "bench"))
    for family in sorted(built):
        for path in (k.format(family) for k in (*package, "tests/test_{}.py")):
            if path not in tree.files:
                yield f"{path}: missing, csrc/{family} exists"
    for path in sorted(tree.files):
        m = re.fullmatch(r"python/tessella/(?:ops|ref)/([a-z]\w*)\.py", path)
        if m and m[1] not in FAMILIES:
            yield f"{path}: not a family of {sorted(FAMILIES)}"


@rule(
    bad=[
        {"csrc/act_quant/op.cpp": "#ifdef TESSELLA_WITH_CUDA\n#endif\n"},
        {"csrc/act_quant/cpu.inl": "  # if X\n# endif\n"},
        {"csrc/layout/w4.h": "#ifndef W4_H\n#endif\n"},
    ],
    good={
        "csrc/core/hd.h": "#pragma once\n#if defined(__CUDACC__)\n#endif\n",
        "csrc/cuda/mma.cuh": "#pragma once\n#if 1\n#endif\n",
        "csrc/act_quant/op.cpp": "// #if in a comment\n/*\n#if\n*/\n",
    },
)
def conditionals_stay_below(tree: Tree) -> Iterator[str]:
    """`#if` only in core/, cpu/ and cuda/: families choose by registry and template."""
    for path, text in tree.matching(CXX):
        if re.match(r"csrc/(core|cpu|cuda)/", path):
            continue
        for line, directive in cxx.directives(text):
            if re.match(r"#\s*(if|elif)", directive):
                yield f"{path}:{line}: {directive.splitlines()[0]}"


PER_ISA = re.compile(r"csrc/\w+/\w+\.inl|csrc/cpu/(vec_\w+|foreach_isa)\.h")
"""What cpu/foreach_isa.h compiles once per instruction set, and it itself."""


@rule(
    bad=[
        {"csrc/core/a.h": "int x;\n"},
        {"csrc/a/sm90.cuh": "// #pragma once\n"},
        {"csrc/a/cpu.inl": "#pragma once\n"},
        {"csrc/cpu/vec_avx2.h": "#pragma once\n"},
    ],
    good={"csrc/core/a.h": "// why\n#pragma once\n", "csrc/a/cpu.inl": "", "csrc/cpu/vec_x.h": ""},
)
def pragma_once(tree: Tree) -> Iterator[str]:
    """A header says `#pragma once`; what is compiled once per instruction set must not."""
    for path, text in tree.matching(r"(csrc|ascend)/.*\.(h|cuh|inl)"):
        once = any(d.split() == ["#pragma", "once"] for _, d in cxx.directives(text))
        if once and PER_ISA.fullmatch(path):
            yield f"{path}: `#pragma once`, but it is included for every instruction set"
        elif not once and not PER_ISA.fullmatch(path):
            yield f"{path}: no `#pragma once`"


MAY_SEE_TORCH = re.compile(
    r"csrc/\w+/(op\.cpp|check\.h)|csrc/core/(check|stream|tensor)\.h|csrc/cpu/parallel\.h"
    r"|ascend/host/(check\.h|twin_op\.cpp|npu_op\.cpp)"
)
STABLE = re.compile(r"torch/(csrc/stable|headeronly|csrc/inductor/aoti_torch/c)/")
OF_ONE_TORCH = "ascend/host/npu_op.cpp"
"""The entry that torch_npu, which has no stable ABI, ties to one torch; it is built apart."""


@rule(
    bad=[
        {"csrc/act_quant/cpu.cpp": "#include <torch/csrc/stable/tensor.h>\n"},
        {"csrc/core/registry.h": '#include "torch/headeronly/core/ScalarType.h"\n'},
        {"csrc/act_quant/op.cpp": "#include <ATen/ATen.h>\n"},
        {"csrc/act_quant/op.cpp": "#include <torch/library.h>\n"},
        {"csrc/act_quant/op.cpp": "#include <c10/util/Half.h>\n"},
        {"ascend/host/twin.cpp": "#include <torch/csrc/stable/tensor.h>\n"},
        {"ascend/host/twin_op.cpp": "#include <ATen/ATen.h>\n"},
    ],
    good={
        "csrc/act_quant/op.cpp": "#include <torch/csrc/stable/library.h>\n// <ATen/x.h>\n",
        "ascend/host/npu_op.cpp": "#include <ATen/ATen.h>\n",
    },
)
def torch_stops_at_the_entry(tree: Tree) -> Iterator[str]:
    """Only entry points see torch, and of torch only the stable ABI."""
    for path, text in tree.matching(CXX):
        for line, name, _ in cxx.includes(text):
            if not re.match(r"(torch|ATen|c10|caffe2)/", name):
                continue
            if not MAY_SEE_TORCH.fullmatch(path):
                yield f"{path}:{line}: includes {name}"
            elif not STABLE.match(name) and path != OF_ONE_TORCH:
                yield f"{path}:{line}: {name} is not of the stable ABI"


def _resolve(tree: Tree, path: str, name: str) -> str | None:
    """The file of this repository that `#include "name"` in `path` means, if there is one."""
    roots = ("csrc", "ascend", "ascend/twin/include")
    for candidate in (str(PurePosixPath(path).parent / name), *(f"{r}/{name}" for r in roots)):
        if candidate in tree.files:
            return candidate
    return None


def reachable(tree: Tree, path: str) -> dict[str, str]:
    """Every header that `path` includes, directly or not -> the file that includes it first."""
    found: dict[str, str] = {}
    todo = [path]
    texts = dict(tree.matching(CXX))
    while todo:
        here = todo.pop()
        for _, name, _ in cxx.includes(texts.get(here, "")):
            target = _resolve(tree, here, name) or name
            if target not in found:
                found[target] = here
                todo.append(target)
    return found


@rule(
    bad=[
        {"csrc/a/cuda.cu": '#include "core/x.h"\n', "csrc/core/x.h": "#include <torch/t.h>\n"},
        {"csrc/a/plan.cpp": '#include "plan.h"\n', "csrc/a/plan.h": '#include "core/check.h"\n',
         "csrc/core/check.h": "#include <torch/csrc/stable/tensor.h>\n"},
        {"csrc/module.cpp": "#include <torch/csrc/stable/tensor.h>\n"},
        {"csrc/a/plan_sm90.cpp": "#include <torch/csrc/stable/tensor.h>\n"},
    ],
    good={
        "csrc/a/cuda.cu": '#include "core/hd.h"\n',
        "csrc/core/hd.h": "#include <cstdint>\n",
        "csrc/a/op.cpp": "#include <torch/csrc/stable/tensor.h>\n",
    },
)  # fmt: skip
def device_and_plan_never_see_torch(tree: Tree) -> Iterator[str]:
    """nvcc files, planners, layouts and _C reach no torch header, by whatever path."""
    for path, _ in tree.matching(
        r".*\.cuh?|csrc/\w+/(plan\w*\.cpp|params\.h)|csrc/layout/.*|csrc/module\.cpp"
        r"|ascend/(tiling|kernels|twin)/.*"
    ):
        for header, via in reachable(tree, path).items():
            if re.match(r"(torch|ATen|c10)/", header):
                yield f"{path}: reaches {header} through {via}"


MAY_INCLUDE = {
    "core": {"core", "cpu", "families.h"},
    "layout": {"layout", "core"},
    "cpu": {"cpu", "core", "layout"},
    "cuda": {"cuda", "core", "layout"},
    **{f: {f, "core", "layout", "cpu", "cuda"} for f in FAMILIES},
    "tiling": {"tiling"},
    "kernels": {"kernels", "tiling", "twin"},
    "twin": {"twin", "core"},
    "host": {"host", "tiling", "twin", "core", "layout", "act_quant", "w4ax_gemm"},
}
"""By folder, the last four below ascend/.

core/ knows the list of all kernels by name only, to check TESSELLA_FORCE.
"""
for _family in ("kv4", "mla"):
    MAY_INCLUDE[_family] |= {"msm"}  # both are sources of the one attention meta-kernel
MAY_INCLUDE["w4ax_gemm"] |= {"act_quant"}  # w4ax_linear quantises and multiplies in one op


@rule(
    bad=[
        {"csrc/layout/a.h": '#include "cpu/isa.h"\n', "csrc/cpu/isa.h": ""},
        {"csrc/cpu/a.h": '#include "act_quant/params.h"\n', "csrc/act_quant/params.h": ""},
        {"csrc/act_quant/op.cpp": '#include "../w4ax_gemm/plan.h"\n', "csrc/w4ax_gemm/plan.h": ""},
        {"csrc/act_quant/op.cpp": '#include "act_quant/missing.h"\n'},
    ],
    good={
        "csrc/kv4/op.cpp": '#include "msm/plan.h"\n#include "params.h"\n#include <cstdint>\n',
        "csrc/msm/plan.h": "",
        "csrc/kv4/params.h": "",
    },
)
def csrc_layers(tree: Tree) -> Iterator[str]:
    """Primitives know no family, and a family knows no other but the one it plugs into."""
    for path, text in tree.matching(rf"(?!csrc/[^/]*$){CXX}"):
        here = PurePosixPath(path).parts[1]
        for line, name, angled in cxx.includes(text):
            if angled:
                continue
            plain = re.sub(r"^(\.\./)+", "", name)
            target = _resolve(tree, path, name) or _resolve(tree, path, plain)
            if target is None:
                yield f"{path}:{line}: {name} does not exist"
            elif PurePosixPath(target).parts[1] not in MAY_INCLUDE.get(here, {here}):
                yield f"{path}:{line}: {here} may not include {target}"


ASCEND = re.compile(
    r"(CMakeLists\.txt|npu\.cmake|(tiling|kernels)/\w+\.(h|cpp)|host/\w+\.(h|cpp|py)"
    r"|twin/include/(kernel_operator\.h|twin/\w+\.h)|twin/(src|tests)/\w+\.(h|cpp))"
)


@rule(
    bad=[
        {"ascend/softmax.cpp": ""},
        {"ascend/kernels/detail/a.h": ""},
        {"ascend/kernels/a.py": ""},
        {"ascend/twin/include/acl.h": ""},
    ],
    good={
        "ascend/kernels/act_quant.cpp": "",
        "ascend/tiling/plan.cpp": "",
        "ascend/twin/include/kernel_operator.h": "",
        "ascend/twin/src/core.cpp": "",
    },
)
def ascend_folders(tree: Tree) -> Iterator[str]:
    """ascend/ has kernels, their tiling, the host side, and the emulator; nothing beside."""
    for path in sorted(tree.files):
        if path.startswith("ascend/") and not ASCEND.fullmatch(path.removeprefix("ascend/")):
            yield f"{path}: not one of the folders and kinds of ascend/"


@rule(
    bad=[
        {"ascend/kernels/a.cpp": "#include <vector>\n"},
        {"ascend/kernels/a.cpp": '#include "twin/machine.h"\n'},
        {"ascend/kernels/a.h": "int twin::core();\n"},
        {"ascend/kernels/a.h": "std::max(1, 2);\n"},
    ],
    good={
        "ascend/kernels/a.cpp": '#include "kernel_operator.h"\n#include "../tiling/t.h"\n'
        '#include "b.h"\n// std::vector of twin::core\n',
    },
)
def kernels_are_written_for_the_device(tree: Tree) -> Iterator[str]:
    """A kernel knows AscendC by its own header only: no emulator, no standard library."""
    for path, text in tree.matching(r"ascend/kernels/.*\.(h|cpp)"):
        for line, name, angled in cxx.includes(text):
            if angled or not re.fullmatch(r"(\.\./tiling/)?\w+\.h", name):
                yield f"{path}:{line}: a kernel may not include {name}"
        for number, line in enumerate(cxx.strip(text).split("\n"), 1):
            if m := re.search(r"\b(std|twin)::\w+", line):
                yield f"{path}:{number}: {m.group(0)} does not exist on the device"


@rule(
    bad=[{"CMakeLists.txt": "add_compile_options(-march=native)\n"}, {"x.cmake": "-mtune=native"}],
    good={"CMakeLists.txt": "add_compile_options(-O3)\n"},
)
def built_for_every_machine(tree: Tree) -> Iterator[str]:
    """The instruction set is chosen at run time; a build runs on any machine of its kind."""
    for path, text in tree.matching(r"(.*/)?CMakeLists\.txt|.*\.(cmake|toml)|_backend/.*"):
        for number, line in enumerate(text.split("\n"), 1):
            if re.search(r"-m(arch|tune|cpu)=native", line):
                yield f"{path}:{number}: {line.strip()}"
