"""Just enough C++ reading for the rules: no parser, but nothing that a string can fool."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""(?P<comment> //(?:\\.|[^\\\n])* | /\*.*?\*/ )
    | (?P<raw> (?:u8|u|U|L)?R"(?P<tag>[^()\\\s]{0,16})\( .*? \)(?P=tag)" )
    | (?P<literal> "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])+' )
    | (?P<word> \.?\d(?:[eEpP][+-]|'[\w]|[\w.])* | [A-Za-z_]\w* )""",
    re.S | re.X,
)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:\\\n|[^\n])*", re.M)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.M)


class UnbalancedError(ValueError):
    """Braces do not match: `line: reason`."""


@dataclass(frozen=True)
class Block:
    """A function or macro: its first line, its number of lines, and how it is introduced."""

    name: str
    line: int
    lines: int


def _blank(match: re.Match) -> str:
    return re.sub(r"[^\n]", " ", match.group(0))


def strip_comments(text: str) -> str:
    """The text with comments blanked out, every line and column where it was."""
    return _TOKEN.sub(lambda m: _blank(m) if m["comment"] else m.group(0), text)


def strip(text: str) -> str:
    """The text with comments and the contents of literals blanked out."""
    return _TOKEN.sub(lambda m: m.group(0) if m["word"] else _blank(m), text)


def includes(text: str) -> Iterator[tuple[int, str, bool]]:
    """(line, path, whether in angle brackets) of every include directive."""
    code = strip_comments(text)
    for m in _INCLUDE.finditer(code):
        yield code.count("\n", 0, m.start()) + 1, m[2], m[1] == "<"


def directives(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every preprocessor directive, continuation lines included."""
    code = strip(text)
    for m in _DIRECTIVE.finditer(code):
        yield code.count("\n", 0, m.start()) + 1, m.group(0).strip()


def macros(text: str) -> Iterator[Block]:
    """Every `#define`."""
    for line, directive in directives(text):
        if m := re.match(r"#\s*define\s+(\w+)", directive):
            yield Block(f"#define {m[1]}", line, directive.count("\n") + 1)


def functions(text: str) -> Iterator[Block]:
    """Every function defined at namespace or class scope, lambdas bound there included.

    A brace at that scope opens a scope of its own (namespace, class), a function body (what
    comes before it has a parameter list) or an initialiser. Raises UnbalancedError.
    """
    code = _DIRECTIVE.sub(_blank, strip(text))
    kinds: list[str] = []  # what every open brace is: "scope", "function" or "other"
    parens = header_at = 0
    block: Block | None = None  # the last function that ended; a constructor may go on after it
    start = 0
    for m in re.finditer(r"[{}();]|\b(?:public|private|protected)\s*:", code):
        at, mark = m.start(), m.group(0)
        outside = all(k == "scope" for k in kinds)
        if mark == "{":
            kind = "other"
            if outside:
                header = code[header_at:at]
                kind = _kind(header, parens)
                if block and re.match(r"\s*(,|$)", header):  # `S() : a{1}, b{2} {`
                    kind = "function"
                else:
                    if block:
                        yield block
                    block, start = None, at - len(header.lstrip())
            kinds.append(kind)
        elif mark == "}":
            if not kinds:
                raise UnbalancedError(f"{_line(code, at)}: a closing brace too many")
            ended = kinds.pop()
            outside = all(k == "scope" for k in kinds)
            if ended == "function":
                lines = code.count("\n", start, at) + 1
                block = Block(_name(code[start:at]), _line(code, start), lines)
        elif mark in "()" and outside:
            parens += 1 if mark == "(" else -1
        if outside and parens == 0 and mark not in "()":
            header_at = m.end()
    if kinds or parens:
        open_ = f"{len(kinds)} braces and {parens} parentheses"
        raise UnbalancedError(f"{_line(code, len(code))}: {open_} left open at the end")
    if block:
        yield block


def _line(code: str, at: int) -> int:
    return code.count("\n", 0, at) + 1


def _kind(header: str, parens: int) -> str:
    """What a brace at namespace or class scope opens, from the text before it."""
    header = _untemplated(_ATTRIBUTE.sub(" ", header))
    if parens:  # a lambda that is passed to a call, or a default argument
        return "function" if re.search(r"[)\]]\s*(mutable\s*)?$", header) else "other"
    if re.match(r"\s*(inline\s+)?namespace\b|\s*extern\s*$", header):
        return "scope"
    if "(" in header:
        return "function"
    return "scope" if re.match(r"\s*(typedef\s+)?(class|struct|union)\b", header) else "other"


_ATTRIBUTE = re.compile(r"\b(alignas|__attribute__|__align__)\s*(\((?:[^()]|\([^()]*\))*\))")


def _untemplated(header: str) -> str:
    """A declaration without its template parameter lists."""
    while m := re.match(r"\s*template\s*<", header):
        header = header[_close(header, m.end()) :]
    return header


def _name(code: str) -> str:
    """The identifier before the parameter list, or else the first line."""
    m = re.search(r"([\w:~]+(?:<[^()]*>)?|operator\S+)\s*\(", _untemplated(code))
    return m[1] if m else code.split("\n")[0]


def _close(code: str, at: int) -> int:
    """Where the angle bracket that was opened just before `at` ends."""
    depth, parens = 1, 0
    for m in re.finditer(r"->|[<>()]", code[at:]):
        mark = m.group(0)
        parens += {"(": 1, ")": -1}.get(mark, 0)
        if parens == 0 and mark in "<>":
            depth += 1 if mark == "<" else -1
            if depth == 0:
                return at + m.end()
    return len(code)


def templates(text: str) -> Iterator[tuple[int, int]]:
    """(line, number of parameters) of every template parameter list."""
    code = strip(text)
    for m in re.finditer(r"\btemplate\s*<", code):
        params = code[m.end() : _close(code, m.end()) - 1]
        while (flat := re.sub(r"<[^<>]*>|\([^()]*\)", "", params)) != params:
            params = flat
        yield code.count("\n", 0, m.start()) + 1, params.count(",") + 1 if params.strip() else 0
