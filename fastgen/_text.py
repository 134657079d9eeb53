"""What commands print: tables, and errors in one line."""

from __future__ import annotations

import sys


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns of text under their heads and a rule."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def complain(command: str, message: str):
    """Print an error of `fastgen COMMAND` on stderr, in one line."""
    # A file's name or its content may hold anything.
    line = "".join(letter for letter in " ".join(message.split()) if letter.isprintable())
    print(f"fastgen {command}".rstrip() + f": {line}", file=sys.stderr)
