"""The command line, `fastgen COMMAND`, or `python -m fastgen COMMAND`.

Wrong input ends in one line on stderr and exit code 2; FASTGEN_DEBUG=1 shows the traceback instead.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro

import fastgen
from fastgen._backends import BackendError
from fastgen._text import complain, one_line
from fastgen.commands import Bench, Convert, Demo, Evaluate, Export, Info, Patch, Render, Train
from fastgen.info import is_out_of_memory
from fastgen.train.config import PRESETS, TrainConfig
from fastgen.train.data_cli import Data

COMMANDS = (
    *("info", "convert", "render", "export", "train", "demo", "evaluate", "bench", "patch"),
    *("data check", "data toy", "data"),
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        command = _parse(argv)
        if not isinstance(command, Info | Bench):  # which measures with and without
            fastgen.keep_memory()
        command.run()
    except BrokenPipeError:
        # The reader, such as `head`, has had enough; nothing more can be written, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return _complain(argv, "interrupted", 130)
    except (OSError, ValueError, FloatingPointError, RuntimeError) as error:
        known = not isinstance(error, RuntimeError) or isinstance(error, BackendError)
        known = known or is_out_of_memory(error)
        if os.environ.get("FASTGEN_DEBUG") or not known:
            raise
        named = isinstance(error, OSError) and error.filename is not None and error.strerror
        return _complain(argv, f"{error.filename}: {error.strerror}" if named else str(error))
    return 0


def _preset(argv: list[str]) -> Train:
    """The options of `fastgen train` before the command line changes them: those of its preset, or of
    the run that it resumes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", default="auto")
    parser.add_argument("--teacher", default=TrainConfig.teacher)
    parser.add_argument("--out", default=TrainConfig.out)
    parser.add_argument("--resume", action="store_true")
    with contextlib.suppress(argparse.ArgumentError):
        given, _ = parser.parse_known_args(argv)
        if given.resume and argv[0] == "train":
            from fastgen.train.run import read_config

            if (kept := read_config(Path(given.out))) is not None:
                return Train(**dataclasses.asdict(kept) | {"out": given.out})
        name = ("toy" if given.teacher == "toy" else "paper") if given.preset == "auto" else given.preset
        if name in PRESETS:
            return Train(**dataclasses.asdict(PRESETS[name]))
    # 'paper', or an unknown name, which tyro refuses.
    return Train()


def _parse(argv: list[str]):
    """The command of a command line. Exits, as argparse does, on --help and on wrong input."""
    train = Annotated[Train, tyro.conf.subcommand("train", default=_preset(argv))]
    # What follows the script is the script's.
    own = argv.index("--run") + 2 if argv[:1] == ["patch"] and "--run" in argv else len(argv)
    said = io.StringIO()
    try:
        # tyro draws a box of several lines; what it says is told in one.
        with contextlib.redirect_stderr(said):
            command = tyro.cli(
                Info | Convert | Render | Export | train | Demo | Evaluate | Bench | Patch | Data,
                prog="fastgen",
                args=argv[:own],
                description="Fast 3D-aware image generation: NeRF-GANs, and students distilled from them.",
            )
        return dataclasses.replace(command, arguments=tuple(argv[own:])) if own < len(argv) else command
    except SystemExit as end:
        if not end.code:
            raise
        sys.exit(_complain(argv, one_line(said.getvalue())))


def _complain(argv: list[str], message: str, code: int = 2) -> int:
    command = next((known for known in COMMANDS if argv[: len(known.split())] == known.split()), "")
    complain(command, message.removeprefix("TrainConfig: "))
    return code


if __name__ == "__main__":
    sys.exit(main())
