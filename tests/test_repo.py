"""The shape of the repository: every rule of tests/repo holds, and every rule can fail."""

import pytest
import torch

from repo import RULES, Tree, cxx
from repo.tree import load, tracked_files
from tessella.ops._register import SCHEMAS

BAD = [(name, i) for name, r in RULES.items() for i in range(len(r.bad))]


@pytest.fixture(scope="module")
def tree() -> Tree:
    return load(SCHEMAS)


@pytest.mark.parametrize("name", RULES)
def test_the_repository_keeps(name: str, tree: Tree):
    found = list(RULES[name].check(tree))
    assert not found, f"{RULES[name].check.__doc__}\n" + "\n".join(found)


@pytest.mark.parametrize("name, example", BAD)
def test_rule_reports_a_violation(name: str, example: int):
    rule = RULES[name]
    found = list(rule.check(rule.bad[example]))
    assert found and all(":" in line for line in found)


@pytest.mark.parametrize("name", RULES)
def test_rule_accepts_what_is_right(name: str):
    assert list(RULES[name].check(RULES[name].good)) == []
    assert RULES[name].bad, "a rule without a bad example may be one that cannot fail"
    assert RULES[name].check.__doc__


def test_the_rules_see_the_repository(tree: Tree):
    assert {"pyproject.toml", "tests/test_repo.py", "python/tessella/formats.py"} <= set(tree.files)
    assert set(tree.files) == set(tracked_files())
    assert list(tree.matching(r"csrc/.*\.cpp")) and tree.schemas


def test_a_walk_finds_sources_only(tmp_path):
    """An unpacked source distribution has no git: the rules then read every source file."""
    for name in ("a/b.py", "build/x.py", ".git/config", ".venv1/c.py", "a/__pycache__/d.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert tracked_files(tmp_path) == ["a/b.py"]


def missing_kernels(op: str) -> set[str]:
    """Which of the reference and the fake kernel a qualified op lacks."""
    kernels = {"reference": "CompositeExplicitAutograd", "fake": "Meta"}
    return {
        what
        for what, key in kernels.items()
        if not torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
    }


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_op_has_a_reference_and_a_fake(name: str):
    assert missing_kernels(f"tessella::{name}") == set()
    tags = getattr(torch.ops.tessella, name).default.tags
    assert torch.Tag.pt2_compliant_tag in tags


def test_a_missing_kernel_is_noticed():
    lib = torch.library.Library("tessella_repo_test", "DEF")
    lib.define("bare(Tensor x) -> Tensor")
    lib.define("half(Tensor x) -> Tensor")
    lib.impl("half", lambda x: x.clone(), "CompositeExplicitAutograd")
    assert missing_kernels("tessella_repo_test::bare") == {"reference", "fake"}
    assert missing_kernels("tessella_repo_test::half") == {"fake"}


CXX_SCAN = [
    ("int f() { return 1; }", ["f"]),
    ("namespace a::b { inline namespace c { void f() {} } }", ["f"]),
    ("struct S : T<int> { S() : a{1}, b(2) {\n} int a, b; };", ["S"]),
    ("struct alignas(16) S { void f() const noexcept {} };", ["f"]),
    (
        "template <class T, int N = (1 > 0)> struct S { T f(int x = {}) { if (x) {} } };",
        ["f"],
    ),
    ("template <class T> class X; template <> void f<X<int>>(int) {}", ["f<X<int>>"]),
    ("constexpr int a[] = {1, 2}; int b{3}; enum E { x };", []),
    ("const auto k = make([](int x) { return x; }, {1});", ["make"]),
    ("auto f = [](auto x) { return x; };", ["auto f = [](auto x) { return x; "]),
    ("void f(A a = {}, B b = [](int) { return 1; }) { }", ["f", "f"]),
    ("bool operator==(A a, B b) { return true; }", ["operator=="]),
    ("struct { int x; } anonymous; union U { int i; float f; };", []),
    ("// void f() {\n/* { */ const char* s = \"{\"; char c = '{'; int big = 1'000'000;", []),
    ('auto s = R"--({ " )" )--"; void g() { auto t = u8R"({)"; }', ["g"]),
    ("#define OPEN(x) \\\n  { x\nvoid f() {}", ["f"]),
]


@pytest.mark.parametrize("code, names", CXX_SCAN)
def test_cxx_functions_are_found(code: str, names: list[str]):
    assert [block.name for block in cxx.functions(code)] == names


@pytest.mark.parametrize(
    "code, lines",
    [
        ("void f()\n{\n}\n", 3),
        ("int x;\n\n\n// why\ntemplate <class T>\nvoid f(T t,\n       int b) {\n  t();\n}\n", 5),
        ("struct S {\n  S()\n      : a{1},\n        b{2} {\n    f();\n  }\n};", 5),
    ],
)
def test_cxx_function_length(code: str, lines: int):
    assert [block.lines for block in cxx.functions(code)] == [lines]


@pytest.mark.parametrize(
    "code", ["void f() {", "}", "int x = (1;", "#if A\nvoid f() {\n#else\nint g() {\n#endif\n}"]
)
def test_cxx_unbalanced_braces_are_refused(code: str):
    with pytest.raises(cxx.UnbalancedError):
        list(cxx.functions(code))
