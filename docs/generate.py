"""Writes the generated blocks of the Markdown files: schemas, commands, measured tables.

A block is everything between ``<!-- generated: KIND ARGUMENT -->`` and ``<!-- end generated -->``:

* ``schema OP``: the declared schema of an op (tessella.ops)
* ``commands``: the commands of the command line with their first help line
* ``summary FILE [KEY=VALUE...]``, ``detail FILE [KEY=VALUE...]``: tables of a results file below
  bench/results, of all records or of those whose case has these values
* ``accuracy FILE``: the evaluations in a results file below bench/results/accuracy
* ``choice MODEL``: every recipe on a model, with accuracy, bytes and speed
* ``layers``: recipes on wide synthetic layers
* ``papers``: numbers of the papers beside those of the results files
* ``latents FILE``: the same of models with latent attention

``python docs/generate.py`` rewrites them in place; tests/test_repo.py fails when one is stale.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?P<open><!-- generated: (?P<kind>\w+)(?: (?P<arg>[^>]+?))? -->\n).*?"
    r"(?P<close><!-- end generated -->)",
    re.S,
)

Read = Callable[[str], str]


def render(text: str, read: Read) -> str:
    """`text` with every generated block made anew; `read` gives the text of a repository file.

    Raises KeyError naming a kind of block, op or file that does not exist.
    """

    def block(m: re.Match) -> str:
        made = KINDS[m["kind"]](m["arg"], read)
        return f"{m['open']}\n{made.strip()}\n\n{m['close']}"

    return BLOCK.sub(block, text)


def schema(op: str, read: Read) -> str:
    """A code block with the schema of an op, broken at commas to fit 100 columns."""
    from tessella.ops._register import SCHEMAS

    text = f"tessella::{SCHEMAS[op]}"
    glued = re.sub(r"(?<!,) (?!-)", "\xa0", text)  # break after a comma or before the arrow
    lines = textwrap.wrap(glued, 96, subsequent_indent="    ")
    return "```\n" + "\n".join(lines).replace("\xa0", " ") + "\n```"


def commands(_: None, read: Read) -> str:
    """A table of the commands and the first line of their help."""
    from typer.main import get_command

    from tessella.cli import app

    rows = ["| command | does |", "|---|---|"]
    for name, command in get_command(app).commands.items():
        does = (command.help or "").strip().splitlines()[0]
        rows.append(f"| `tessella {name}` | {does} |")
    return "\n".join(rows)


def summary(arg: str, read: Read) -> str:
    """Records of bench/results/<path>, geometric means over shapes where there are many."""
    return _table("summary", arg, read)


def detail(arg: str, read: Read) -> str:
    """Records of bench/results/<path>, one row each."""
    return _table("detail", arg, read)


def accuracy(path: str, read: Read) -> str:
    """The evaluations of bench/results/accuracy/<path>, one row each."""
    from tessella.bench import accuracy

    return accuracy.markdown(json.loads(read(f"bench/results/accuracy/{path}")))


def choice(model: str, read: Read) -> str:
    """Recipes on a model; a model without records says so."""
    from tessella.bench import choice
    from tessella.bench.papers import Results

    table = choice.table(Results(read), model)
    return table.markdown() if table.rows else f"No evaluations of {model} are on record."


def layers(_: None, read: Read) -> str:
    """Recipes on wide synthetic layers; none on record says so."""
    from tessella.bench import accuracy
    from tessella.bench.papers import LAYER, Results

    found = Results(read)(LAYER)
    return accuracy.layers_markdown(found) if found else "None is on record."


def papers(_: None, read: Read) -> str:
    """What five papers say beside what is measured here; files that are missing say so."""
    from tessella.bench import papers

    return papers.markdown(read)


def latents(path: str, read: Read) -> str:
    """The evaluations of models with latent attention in bench/results/accuracy/<path>."""
    from tessella.bench import accuracy

    return accuracy.latents_markdown(json.loads(read(f"bench/results/accuracy/{path}")))


def _table(kind: str, arg: str, read: Read) -> str:
    from tessella.bench import tables
    from tessella.bench.suite import Selection

    path, *filters = arg.split()
    selection = Selection(filters)
    records = [r for r in json.loads(read(f"bench/results/{path}")) if selection(r["case"])]
    if not records:
        raise KeyError(arg)
    return f"{getattr(tables, kind)(records, path).markdown()}\n\n{tables.source(records)}."


KINDS: dict[str, Callable] = {
    f.__name__: f
    for f in (schema, commands, summary, detail, accuracy, choice, latents, layers, papers)
}


def main() -> None:
    """Rewrite the blocks of every Markdown file at the root, in docs/ and of the kernels."""
    for path in [p for g in ("*.md", "docs/*.md", "csrc/*/*.md") for p in ROOT.glob(g)]:
        old = path.read_text()
        new = render(old, lambda name: (ROOT / name).read_text())
        if new != old:
            path.write_text(new)
            print(path.relative_to(ROOT), file=sys.stderr)


if __name__ == "__main__":
    main()
