"""Reads text for calibration and evaluation: .txt, .jsonl, and .xz of either.

* ``.txt``: UTF-8; documents are separated by NUL bytes, a file without any is one document.
* ``.jsonl``: one JSON object a line, its document under the key ``"text"``; blank lines are
  skipped.
* ``.txt.xz``, ``.jsonl.xz``: the same, compressed.

Text is kept as it is (line ends included) except that a byte-order mark at the start of the file
and empty documents are dropped.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path

FORMATS = (".txt", ".jsonl", ".txt.xz", ".jsonl.xz")
"""Recognised endings of a file name."""


class TextError(ValueError):
    """A text file that cannot be used; the message names it and says why."""


def read_documents(path: str | Path) -> list[str]:
    """The documents of a text file, in order, none of them empty.

    Raises:
        TextError: missing or unreadable file, another ending than :data:`FORMATS`, damaged
            compression, text that is not UTF-8, a JSON line that is no object with a string
            under ``"text"``, or a file without any text.
    """
    path = Path(path)
    ending = "".join(path.suffixes[-2:]) if path.suffix == ".xz" else path.suffix
    if ending not in FORMATS:
        raise TextError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    text = _decode(path, _read_bytes(path))
    if ending.startswith(".jsonl"):
        documents = [_document(path, n, line) for n, line in _json_lines(text)]
    else:
        documents = text.split("\0")
    documents = [d for d in documents if d]
    if not documents:
        raise TextError(f"{path}: holds no text")
    return documents


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """(line number from 1, line) of a .jsonl or .jsonl.xz file, without blank lines.

    Raises TextError: as :func:`read_documents`.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.xz")):
        raise TextError(f"{path}: expected a name that ends in .jsonl or .jsonl.xz")
    lines = _json_lines(_decode(path, _read_bytes(path)))
    if not lines:
        raise TextError(f"{path}: holds no text")
    return lines


def _read_bytes(path: Path) -> bytes:
    """The file's content, decompressed."""
    try:
        raw = path.read_bytes()
        return lzma.decompress(raw, lzma.FORMAT_XZ) if path.suffix == ".xz" else raw
    except lzma.LZMAError as e:
        raise TextError(f"{path}: damaged or truncated .xz file ({e})") from e
    except OSError as e:
        raise TextError(f"{path}: {e.strerror}") from e


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise TextError(f"{path}: not UTF-8 text: {e.reason} at byte {e.start}") from e


def _json_lines(text: str) -> list[tuple[int, str]]:
    """(line number from 1, line) of every line that is not blank.

    Split on newlines alone: JSON allows characters inside a string that str.splitlines()
    takes for line ends.
    """
    return [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def _document(path: Path, number: int, line: str) -> str:
    """The document of one JSON line."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as e:
        raise TextError(f"{path}:{number}: not JSON: {e.msg} at column {e.colno}") from e
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        got = f"keys {sorted(record)[:8]}" if isinstance(record, dict) else type(record).__name__
        raise TextError(f'{path}:{number}: expected an object with a string "text", got {got}')
    try:
        record["text"].encode()
    except UnicodeEncodeError as e:  # JSON can spell half a surrogate pair, UTF-8 cannot
        raise TextError(f"{path}:{number}: text is not Unicode: {e.reason}") from e
    return record["text"]
