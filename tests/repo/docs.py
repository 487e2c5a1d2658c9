"""Rules over the documentation: it says what the code does, or the build fails."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from repo.tree import ROOT, Tree, rule

MARKDOWN = r"[A-Z]+\.md|docs/.*\.md|(csrc|bench|python)/.*\.md"
_FENCED = re.compile(r"^```.*?^```", re.S | re.M)


def _generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@rule(
    bad=[
        {"docs/ops.md": "<!-- generated: schema act_quant -->\nold\n<!-- end generated -->\n"},
        {"docs/ops.md": "<!-- generated: schema no_such_op -->\n<!-- end generated -->\n"},
        {"README.md": "<!-- generated: weather -->\n<!-- end generated -->\n"},
        {"README.md": "<!-- generated: detail h200/none.json -->\n<!-- end generated -->\n"},
        {"README.md": "<!-- generated: commands -->\nno end\n"},
    ],
    good={"README.md": "no block\n"},  # a fresh one is in every page of this repository
)
def generated_blocks_are_fresh(tree: Tree) -> Iterator[str]:
    """What is marked as generated is what docs/generate.py makes now."""
    generate = _generator()
    texts = dict(tree.matching(rf"{MARKDOWN}|bench/results/.*"))
    for path, text in tree.matching(MARKDOWN):
        opened = text.count("<!-- generated:")
        if opened != len(generate.BLOCK.findall(text)):
            yield f"{path}: a generated block is malformed or has no end"
        try:
            fresh = generate.render(text, texts.__getitem__) == text
        except KeyError as e:
            yield f"{path}: a generated block names {e}, which does not exist"
        else:
            if not fresh:
                yield f"{path}: stale; run python docs/generate.py"


@rule(
    bad=[
        Tree({"docs/ops.md": "", "tests/test_a.py": "foo"}, {"foo": "foo() -> ()"}),
        Tree({"docs/ops.md": "# foo_out\nfoo\n"}, {"foo": "foo() -> ()"}),
        Tree({"docs/ops.md": "## `foo`\nno schema\n"}, {"foo": "foo() -> ()"}),
        Tree({"docs/ops.md": "## `foo`\n<!-- generated: schema foo -->\n## `gone`\n"}, {}),
    ],
    good=Tree(
        {"docs/ops.md": "## `foo`\n<!-- generated: schema foo -->\n"}, {"foo": "foo() -> ()"}
    ),
)
def ops_are_documented(tree: Tree) -> Iterator[str]:
    """docs/ops.md has a section with the schema of every op, and of no other."""
    text = dict(tree.matching(r"docs/ops\.md")).get("docs/ops.md", "")
    sections = set(re.findall(r"^#+ `(\w+)`", text, re.M))
    shown = set(re.findall(r"<!-- generated: schema (\w+) -->", text))
    for name in tree.schemas:
        if name not in sections:
            yield f"docs/ops.md: no section `{name}`"
        if name not in shown:
            yield f"docs/ops.md: no generated schema of {name}"
    for name in sorted((sections | shown) - set(tree.schemas)):
        yield f"docs/ops.md: `{name}` is not an op"


@rule(
    bad=[
        Tree({"tests/test_a.py": "food = 1"}, {"foo": ""}),
        Tree({"tests/repo/a.py": "foo()"}, {"foo": ""}),
    ],
    good=Tree({"tests/test_a.py": "torch.ops.tessella.foo(x)"}, {"foo": ""}),
)
def ops_are_tested(tree: Tree) -> Iterator[str]:
    """A test names every op."""
    tests = "\n".join(text for _, text in tree.matching(r"tests/test_\w+\.py"))
    for name in tree.schemas:
        if not re.search(rf"\b{name}\b", tests):
            yield f"tests: no test mentions {name}"


def _anchors(text: str) -> set[str]:
    """The anchors that the headings of a page get."""
    heads = re.findall(r"^#+ (.*)$", _FENCED.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}


@rule(
    bad=[
        {"README.md": "[ops](docs/none.md)\n"},
        {"docs/ops.md": "[up](../README.md#nowhere)\n", "README.md": "# Here\n"},
        {"README.md": "# A\n[b](#b)\n"},
    ],
    good={
        "README.md": "# A `b`: c\n[x](docs/ops.md) [y](#a-b-c) [z](https://example.org) [d](docs)\n"
        "```\n[not](a-link.md)\n```\n",
        "docs/ops.md": "",
    },
)
def links_lead_somewhere(tree: Tree) -> Iterator[str]:
    """A relative link names a file of the repository and a heading in it."""
    pages = dict(tree.matching(MARKDOWN))
    folders = {str(f) for p in tree.files for f in PurePosixPath(p).parents}
    for path, text in pages.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", _FENCED.sub("", text)):
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            parts: list[str] = []
            for part in (PurePosixPath(path).parent / name).parts if name else (path,):
                parts = parts[:-1] if part == ".." else [*parts, part]
            target = "/".join(parts)
            if target not in tree.files and target not in folders:
                yield f"{path}: link to {link}, which does not exist"
            elif anchor and target in pages and anchor not in _anchors(pages[target]):
                yield f"{path}: link to {link}, no such heading"


_SETTING = re.compile(
    r"""(?:environ(?:\.get)?[\[(]\s*|getenv\(|\bread\()["'](TESSELLA_\w+)|\$ENV\{(TESSELLA_\w+)\}"""
)


@rule(
    bad=[
        {"README.md": "", "python/tessella/a.py": "os.environ.get('TESSELLA_A', '')"},
        {"README.md": "`TESSELLA_AB`", "csrc/core/env.cpp": 'std::getenv("TESSELLA_A")'},
        {"README.md": "", "CMakeLists.txt": "set(X $ENV{TESSELLA_A})"},
        {"README.md": "`TESSELLA_GONE=1`", "python/tessella/a.py": ""},
    ],
    good={
        "README.md": "| `TESSELLA_A=1` | `TESSELLA_B` |",
        "csrc/core/env.cpp": 'read("TESSELLA_A"); TESSELLA_WITH_CUDA',
        "_backend/b.py": 'os.environ["TESSELLA_B"]',
    },
)
def settings_are_documented(tree: Tree) -> Iterator[str]:
    """README lists the environment variables that are read, and no others."""
    readme = dict(tree.matching(r"README\.md")).get("README.md", "")
    listed = set(re.findall(r"\bTESSELLA_\w+", readme))
    used: dict[str, str] = {}
    for path, text in tree.matching(r"(python|csrc|_backend)/.*|CMakeLists\.txt"):
        used |= dict.fromkeys((a or b for a, b in _SETTING.findall(text)), path)
    for name in sorted(set(used) - listed):
        yield f"{used[name]}: reads {name}, which README.md does not list"
    for name in sorted(listed - set(used)):
        yield f"README.md: lists {name}, which nothing reads"
