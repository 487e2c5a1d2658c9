"""Writes the generated blocks of the Markdown files: schemas, commands, measured tables.

A block is everything between ``<!-- generated: KIND ARGUMENT -->`` and ``<!-- end generated -->``:

* ``schema OP``: the declared schema of an op (tessella.ops)
* ``commands``: the commands of the command line with their first help line
* ``bench FILE``: the records of a results file below bench/results

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
    r"(?P<open><!-- generated: (?P<kind>\w+)(?: (?P<arg>\S+))? -->\n).*?"
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
    from tessella.cli import app

    rows = ["| command | does |", "|---|---|"]
    for c in app.registered_commands:
        name = c.name or c.callback.__name__.replace("_", "-")
        does = (c.help or c.callback.__doc__ or "").strip().splitlines()[0]
        rows.append(f"| `tessella {name}` | {does} |")
    return "\n".join(rows)


def bench(path: str, read: Read) -> str:
    """A table of the records in bench/results/<path>: time, roofline, ratio to each baseline."""
    records = json.loads(read(f"bench/results/{path}"))
    keys = list(dict.fromkeys(k for r in records for k in r["case"]))
    rivals = list(dict.fromkeys(b for r in records for b in r["baselines"]))
    head = ["kernel", *keys, "us", "of roofline", *(f"vs {b}" for b in rivals)]
    rows = [head, ["---"] * len(head)]
    for r in records:
        ratios = [
            f"{r['baselines'][b] / r['us']:.2f}x" if r["baselines"].get(b) else "" for b in rivals
        ]
        share = f"{r['roofline_frac']:.0%}" if r.get("roofline_frac") else ""
        case = [str(r["case"].get(k, "")) for k in keys]
        rows.append([r["kernel"], *case, f"{r['us']:.2f}", share, *ratios])
    made = {(r["device"], r["torch"], r["commit"], r["date"]) for r in records}
    source = "; ".join(f"{d}, torch {t}, commit {c}, {day}" for d, t, c, day in sorted(made))
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{table}\n\nMeasured on {source}."


KINDS: dict[str, Callable] = {"schema": schema, "commands": commands, "bench": bench}


def main() -> None:
    """Rewrite the blocks of every Markdown file at the root and in docs/."""
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        old = path.read_text()
        new = render(old, lambda name: (ROOT / name).read_text())
        if new != old:
            path.write_text(new)
            print(path.relative_to(ROOT), file=sys.stderr)


if __name__ == "__main__":
    main()
