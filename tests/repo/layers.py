"""Rules over the imports of python/tessella: who may know whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import PurePosixPath

from repo.tree import Tree, rule

_BASE = {
    "_version",
    "formats",
    "formats_kv",
    "formats_mla",
    "layout",
    "layout_kv",
    "layout_mla",
}
_ALGORITHM = _BASE | {"ref"}
_RUNTIME = _ALGORITHM | {"_native", "ops", "tuned"}
_MODELS = _RUNTIME | {"quant", "mla", "kv"}

MAY_IMPORT: dict[str, set[str]] = {
    "_version": set(),
    "_native": set(),
    "_C": set(),
    "_ops": set(),
    "formats": set(),
    "formats_kv": {"formats"},
    "formats_mla": {"formats"},
    "layout": {"formats"},
    "layout_kv": {"formats_kv"},
    "layout_mla": {"formats_mla"},
    "tuned": {"_native"},
    "ref": _BASE - {"_version"},
    "ops": _ALGORITHM - {"_version"} | {"_native", "tuned"},
    "quant": _ALGORITHM,
    "mla": _ALGORITHM,
    "kv": _RUNTIME | {"quant"},
    "testing": _RUNTIME,
    "bench": _MODELS | {"models", "integrations", "testing"},
    "models": _MODELS,
    "data": set(),
    "integrations": _MODELS | {"", "models", "data"},
    "cli": _MODELS | {"", "models", "data", "integrations", "testing", "bench"},
    "": _RUNTIME | {"integrations"},
    "__main__": {"cli"},
}
"""What each part of the package may import, besides itself; "" is tessella/__init__.py."""

ONLY_IN: dict[str, set[str]] = {
    "transformers": {"integrations", "bench"},  # bench: as the rival it measures
    "vllm": {"integrations"},
    "accelerate": {"integrations"},
    "typer": {"cli"},
    "click": {"cli"},
    "rich": {"cli"},
    "huggingface_hub": {"models", "integrations"},
}
"""Third-party packages that only some parts may import."""

PACKAGE = r"python/tessella/.*\.py"


def unit(path: str) -> str:
    """The part of the package a file belongs to: its first name below tessella."""
    first = PurePosixPath(path).relative_to("python/tessella").parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: str, text: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, wherever it stands, importlib's included."""
    package = PurePosixPath(path).relative_to("python").parent.parts
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "tessella":
                yield from ((node.lineno, f"tessella.{a.name}") for a in node.names)
            else:
                yield node.lineno, module
        elif isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func).rpartition(".")[2]
            target = node.args[0]
            if name in ("import_module", "__import__") and isinstance(target, ast.Constant):
                yield node.lineno, str(target.value)


def _target(module: str) -> str | None:
    """The part of the package that a module name means; None for other packages."""
    top, _, rest = module.partition(".")
    if top != "tessella":
        return None
    part = rest.partition(".")[0]
    return part if part in MAY_IMPORT else ""


_P = "python/tessella"


@rule(
    bad=[
        {f"{_P}/ops/act_quant.py": "from tessella.cli import main\n"},
        {f"{_P}/ref/act_quant.py": "def f():\n    from tessella import ops\n"},
        {f"{_P}/ref/act_quant.py": "from ..ops import act_quant\n"},
        {f"{_P}/quant/rtn.py": "import tessella.ops.w4ax_gemm as g\n"},
        {f"{_P}/formats.py": "from tessella import layout\n"},
        {f"{_P}/models/linear.py": "from tessella.integrations import hf\n"},
        {f"{_P}/models/linear.py": "importlib.import_module('tessella.cli')\n"},
        {f"{_P}/ops/x.py": "from tessella import W4Weight\n"},
        {f"{_P}/newpart/x.py": "import torch\n"},
    ],
    good={
        f"{_P}/cli/demo.py": "from tessella import __version__, ops\nfrom tessella.cli import x\n",
        f"{_P}/ops/__init__.py": "from tessella.ops.act_quant import act_quant\n",
        f"{_P}/ref/act_quant.py": "from .w4ax_gemm import f\nfrom ..formats import W4Weight\n",
        f"{_P}/__init__.py": "from tessella import _native\nfrom tessella.ops import x\n",
    },
)
def package_layers(tree: Tree) -> Iterator[str]:
    """Nothing imports the command line; algorithms know formats, not kernels; and so on."""
    for path, text in tree.matching(PACKAGE):
        here = unit(path)
        if here not in MAY_IMPORT:
            yield f"{path}: part {here!r} has no place in the layers"
            continue
        for line, module in imports(path, text):
            target = _target(module)
            if target is not None and target != here and target not in MAY_IMPORT[here]:
                yield f"{path}:{line}: {here or 'tessella'} may not import {module}"


@rule(
    bad=[
        {f"{_P}/models/convert.py": "import transformers\n"},
        {f"{_P}/cli/demo.py": "def f():\n    from transformers import AutoTokenizer\n"},
        {f"{_P}/integrations/hf.py": "import rich.progress\n"},
        {f"{_P}/quant/rtn.py": "importlib.import_module('vllm.config')\n"},
    ],
    good={
        f"{_P}/integrations/hf.py": "from transformers.x import y\n",
        f"{_P}/cli/demo.py": "import rich\nimport typer\n",
    },
)
def frameworks_stay_outside(tree: Tree) -> Iterator[str]:
    """Model frameworks only in integrations/ (and in bench/), terminals only in cli/."""
    for path, text in tree.matching(PACKAGE):
        for line, module in imports(path, text):
            if unit(path) not in ONLY_IN.get(top := module.partition(".")[0], {unit(path)}):
                yield f"{path}:{line}: only {' and '.join(sorted(ONLY_IN[top]))} may import {top}"


@rule(
    bad=[
        {f"{_P}/quant/rtn.py": "y = torch.ops.tessella.w4_pack(x)\n"},
        {f"{_P}/mla/absorb.py": "from torch import ops\n"},
        {f"{_P}/integrations/hf.py": "y = torch.ops.tessella.act_quant(x)\n"},
    ],
    good={
        f"{_P}/ops/act_quant.py": "y = torch.ops.tessella.act_quant(x)\n",
        f"{_P}/models/linear.py": "y = torch.ops.tessella.act_quant(x)\n",
        f"{_P}/quant/rtn.py": '"""torch.ops is not used here."""\n',
    },
)
def kernels_are_called_through_ops(tree: Tree) -> Iterator[str]:
    """Algorithms and integrations never spell torch.ops.

    ops/ does by trade, models/ in the hot path of a layer, bench/ to time no more than the op, and
    testing/ and cli/ to ask what exists.
    """
    for path, text in tree.matching(PACKAGE):
        if unit(path) in ("ops", "models", "bench", "testing", "cli"):
            continue
        for node in ast.walk(ast.parse(text)):
            spelled = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops"
            named = isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.ops")
            if spelled or (named and any(a.name in ("ops", "tessella") for a in node.names)):
                yield f"{path}:{node.lineno}: calls torch.ops; use tessella.ops"


@rule(
    bad=[
        {f"{_P}/quant/rtn.py": "def quantize(w): pass\n"},
        {f"{_P}/quant/rtn.py": '"""M."""\nclass Recipe:\n    x: int\n'},
        {f"{_P}/models/linear.py": '"""M."""\nclass L:\n    """D."""\n    def pack(self): pass\n'},
        {f"{_P}/models/linear.py": "x = 1\n"},
    ],
    good={
        f"{_P}/ops/a.py": '"""M."""\ndef _ref(): pass\ndef f():\n    """D."""\n'
        '    def g(): pass\nclass L:\n    """D."""\n    def __len__(self): pass\n'
        'class M(L):\n    """D."""\n    def forward(self, x): pass\n',
        f"{_P}/cli/__init__.py": "",
    },
)
def public_names_are_documented(tree: Tree) -> Iterator[str]:
    """A module, and everything public in it, has a docstring."""
    for path, text in tree.matching(PACKAGE):
        module = ast.parse(text)
        if module.body and ast.get_docstring(module) is None:
            yield f"{path}: no module docstring"
        for node in _public(module):
            if not ast.get_docstring(node):
                yield f"{path}:{node.lineno}: {node.name} has no docstring"


def _public(scope: ast.Module | ast.ClassDef) -> Iterator[ast.AST]:
    """Public definitions of a module; the methods of a subclass keep their base's contract."""
    for node in scope.body:
        if isinstance(node, _DEFINITIONS) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef) and not node.bases:
                yield from _public(node)


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
