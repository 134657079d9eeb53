"""What commands print: tables, and errors in one line."""

from __future__ import annotations

import re
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


def one_line(box: str) -> str:
    """What tyro says in a box, without the box, the hints on help, and class names."""
    title, *lines = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯]", "", box).splitlines()
    # Where the output isn't UTF-8, the box has no sides, and a rule under its title.
    lines = [line.replace("│", " ").rstrip()[2:] for line in lines]
    lines = lines[not lines[0].strip("-") :]
    rule = next((i for i, line in enumerate(lines) if line and not line.strip("─-")), len(lines))
    what, more = " ".join(line.strip() for line in lines[:rule]), lines[rule:]
    # Options are indented, and their descriptions more so.
    if "Required options" in title:
        what = "missing " + ", ".join(line.split()[0] for line in lines[:rule] if re.match(r" {4}\S", line))
    meant = [line.split()[0] for line in more if line.startswith("    --") and "meant" in box]
    what = re.sub(r"^Error parsing ([A-Z][a-z]\w*|action): (TrainConfig: )?", "", what)
    what += f"; perhaps you meant {' or '.join(dict.fromkeys(meant))}" if meant else ""
    return what + "".join(f". {line}" for line in more if line.startswith("Available"))
