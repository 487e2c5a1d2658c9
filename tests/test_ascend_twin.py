"""The emulator of AscendC: its instructions, its rules, and itself under sanitizers."""

from __future__ import annotations

import re
import subprocess

import pytest

from ascend_twin import ROOT, build

TESTS = sorted(
    name
    for path in (ROOT / "ascend/twin/tests").glob("*.cpp")
    for name in re.findall(r"^TEST\((\w+)\)", path.read_text(), re.M)
)


def run(folder, *names: str) -> subprocess.CompletedProcess:
    """Run some of the tests that are written in C++, or all."""
    return subprocess.run([folder / "twin_tests", *names], capture_output=True, text=True)


@pytest.mark.parametrize("name", TESTS)
def test_twin(name: str):
    done = run(build("twin_tests"), name)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_list_of_tests_is_that_of_the_program():
    assert sorted(run(build("twin_tests"), "--list").stdout.split()) == TESTS
    assert run(build("twin_tests"), "no_such_test").returncode != 0


RULES = [
    "align",
    "bounds",
    "capacity",
    "deadlock",
    "field",
    "flag",
    "hazard",
    "overflow",
    "overlap",
    "path",
    "queue",
    "type",
    "uninitialised",
]


def test_every_rule_is_broken_by_a_test():
    """The rules that machine.h names are those that the twin raises, and each has a test."""
    twin = ROOT / "ascend/twin"
    header = (twin / "include/twin/machine.h").read_text()
    named = re.search(r"its name is one of: ([\w,\s/]+)\.", header)[1]
    assert re.findall(r"\w+", named.replace("//", "")) == RULES
    sources = [p.read_text() for p in (*twin.glob("include/twin/*.h"), *twin.glob("src/*.cpp"))]
    raised = set()
    for text in sources:
        raised |= set(re.findall(r'(?:Finding|fail)\(\s*"(\w+)"', text))
        for either in re.findall(r'rule = .*"(\w+)" : "(\w+)"', text):
            raised |= set(either)
        raised |= set(re.findall(r'rule_? = "(\w+)"', text))
    assert raised == set(RULES)
    tests = "\n".join(p.read_text() for p in (twin / "tests").glob("*.cpp"))
    broken = set(re.findall(r'(?:run_broken|broken)\(\s*"(\w+)"', tests))
    assert broken == set(RULES)


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_the_twin_itself_under_sanitizers(sanitize: str):
    done = run(build("twin_tests", sanitize))
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
