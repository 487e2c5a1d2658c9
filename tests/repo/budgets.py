"""Budgets: what fits on a screen or two can be understood in one reading."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from repo import cxx
from repo.text import WRITTEN
from repo.tree import Tree, rule

MAX_LINES = 500
MAX_BODY_LINES = 700
MAX_FUNCTION_LINES = 80
MAX_COLUMNS = 100
MAX_TEMPLATE_PARAMS = 6

BODY = r"(.*/)?(cpu\.inl|sm\d+[a-z]?\.cuh)"
CXX = r"(csrc|ascend)/.*\.(h|cpp|c|inl|cu|cuh)"
PYTHON = r".*\.py"
CODE = rf"{CXX}|{PYTHON}|(.*/)?CMakeLists\.txt|.*\.(cmake|toml|yaml|sh)|\.ci/.*"


@rule(
    bad=[
        {"csrc/act_quant/op.cpp": "\n" * 501},
        {"csrc/act_quant/cpu.inl": "\n" * 701},
        {"tests/test_a.py": "\n" * 501},
        {"docs/ops.md": "\n" * 501},
    ],
    good={"csrc/x/sm90.cuh": "\n" * 700, "python/tessella/data/m/tokenizer.json": "\n" * 9999},
)
def file_lines(tree: Tree) -> Iterator[str]:
    """A file has at most 500 lines; a kernel body (cpu.inl, sm*.cuh) at most 700."""
    bodies = {path for path, _ in tree.matching(BODY)}
    for path, text in tree.matching(rf"(?!bench/results/){WRITTEN}"):
        limit = MAX_BODY_LINES if path in bodies else MAX_LINES
        if (lines := text.count("\n")) > limit:
            yield f"{path}: {lines} lines, over {limit}"


@rule(
    bad=[{"a.py": "x" * 101 + "\n"}, {"csrc/core/hd.h": "x" * 101}, {"CMakeLists.txt": "x" * 101}],
    good={"a.py": "é" * 100 + "\n", "README.md": "x" * 400},
)
def line_columns(tree: Tree) -> Iterator[str]:
    """A line of code has at most 100 columns."""
    for path, text in tree.matching(CODE):
        for number, line in enumerate(text.split("\n"), 1):
            if len(line) > MAX_COLUMNS:
                yield f"{path}:{number}: {len(line)} columns, over {MAX_COLUMNS}"


@rule(
    bad=[
        {"a.py": "def f():\n" + "    x = 1\n" * 80},
        {"a.py": "class C:\n    async def f(self):\n" + "        x = 1\n" * 80},
    ],
    good={"a.py": "class C:\n" + "    def f(self): pass\n" * 90 + "def g():\n" + "  x = 1\n" * 79},
)
def python_function_lines(tree: Tree) -> Iterator[str]:
    """A Python function, docstring included, has at most 80 lines."""
    for path, text in tree.matching(PYTHON):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    yield f"{path}:{node.lineno}: {node.name}: {lines} lines"


_LONG = "  x = '{';  // }\n" * 79 + "}\n"


@rule(
    bad=[
        {"csrc/a/op.cpp": "void f() {\n" + _LONG},
        {"csrc/a/op.cpp": 'namespace t {\nextern "C" {\n void f(int a = 3) {\n' + _LONG + "}}\n"},
        {"csrc/a/op.cpp": "struct S {\n  template <class T> auto f() -> int {\n" + _LONG + "};"},
        {"csrc/a/op.cpp": "constexpr auto f = [](int x) {\n" + _LONG.replace("}\n", "};\n")},
        {"csrc/a/op.cpp": "#define F(x) \\\n" + "  x; \\\n" * 80 + "\n"},
        {"csrc/a/op.cpp": "void f() {\n"},
        {"csrc/a/op.cpp": "}\n"},
        {"csrc/core/a.h": "#if A\nvoid f() {\n#else\nvoid g() {\n#endif\n}\n"},
    ],
    good={
        "csrc/a/op.cpp": "namespace t {\n"
        "struct S {\n" + "  int f() { return 1'000; }\n" * 90 + "};\n"
        "constexpr int kTable[] = {\n" + "  1,\n" * 90 + "};\n"
        'const char* a = R"x({{{ // " )" )x"; /* { */ char b = \'"\';\n'
        "void f() {\n" + _LONG.split("\n", 1)[1] + "enum class E { a, b };\n}\n",
    },
)
def cxx_function_lines(tree: Tree) -> Iterator[str]:
    """A C++ function or macro has at most 80 lines; braces balance in every `#if` branch."""
    for path, text in tree.matching(CXX):
        try:
            blocks = [*cxx.functions(text), *cxx.macros(text)]
        except cxx.UnbalancedError as e:
            yield f"{path}:{e}"
            continue
        for block in blocks:
            if block.lines > MAX_FUNCTION_LINES:
                yield f"{path}:{block.line}: {block.name}: {block.lines} lines"


@rule(
    bad=[{"csrc/a/sm90.cuh": "template <int A, int B, class C, class D, bool E, int F, int G>\n"}],
    good={
        "csrc/a/sm90.cuh": "template <int A, class B = X<1, 2, 3>, int C, int D, int E, int F>\n"
    },
)
def template_params(tree: Tree) -> Iterator[str]:
    """At most 6 template parameters; more travel in a Tile struct."""
    for path, text in tree.matching(CXX):
        for line, params in cxx.templates(text):
            if params > MAX_TEMPLATE_PARAMS:
                yield f"{path}:{line}: {params} template parameters"
