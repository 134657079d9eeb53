"""The pages: every example runs, every link leads somewhere, every op and dialect has its section."""

import contextlib
import importlib
import inspect
import io
import lzma
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgen import compat, ops, presets
from fastgen.__main__ import main
from fastgen.train.config import PRESETS

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
# Commands that are shown and not run: what they install or change is the reader's machine.
SHOWN = ("make", "pip", "git", "source")
# What a page's commands find in the folder that they run in: an original checkpoint.
FILES = {"docs/checkpoints.md": {"shapenetcars128-64.pkl": "eg3d_cars128_tiny.pkl.xz"}}


def blocks(page: str) -> list[tuple[str, str, int]]:
    """Language, text and first line of each fenced block."""
    found, language, text, first = [], None, [], 0
    for number, line in enumerate(TEXTS[page].splitlines(), 1):
        if language is None and line.startswith("```"):
            language, text, first = line[3:].strip(), [], number + 1
        elif language is not None and line == "```":
            found.append((language, "\n".join(text) + "\n", first))
            language = None
        else:
            text.append(line)
    assert language is None, f"{page}: a block is not closed"
    return found


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)


def headings(page: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a page's examples run, as if it were the script's; what they install and import is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    modules, grad = set(sys.modules), torch.is_grad_enabled()
    yield tmp_path
    compat.uninstall()
    torch.set_grad_enabled(grad)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page, folder):
    for name, packed in FILES.get(page, {}).items():
        (folder / name).write_bytes(lzma.decompress((ROOT / "tests" / "data" / packed).read_bytes()))
    names = {"__name__": "example"}
    for language, text, first in blocks(page):
        assert language in ("python", "bash", "text"), f"{page}:{first}: a block of {language or 'nothing'}"
        if language == "python":
            # Lines as they are counted in the page.
            code = compile("\n" * (first - 1) + text, page, "exec")
            importlib.invalidate_caches()
            with contextlib.redirect_stdout(io.StringIO()) as said:
                exec(code, names)
            lines = iter(said.getvalue().splitlines())
            for wanted in re.findall(r"^ *print\(.*\)  # (.+)$", text, re.MULTILINE):
                assert wanted in lines, f"{page}:{first}: {wanted!r} is not printed, but {said.getvalue()!r}"
        elif language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                run(line, f"{page}:{first}")


def run(line: str, where: str):
    """A line of the shell, as the reader types it."""
    words = shlex.split(line, comments=True)
    settings = [word for word in words if re.match(r"[A-Z_]+=", word)]
    command, *arguments = words[len(settings) :] or ["source"]
    if command == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets), f"{where}: {line}"
    elif command in ("fastgen", "python"):
        if command == "fastgen" and not settings:
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    code = main(arguments)
                except SystemExit as end:
                    code = end.code
        else:
            start = [sys.executable] if command == "python" else [sys.executable, "-m", "fastgen"]
            settings = dict(setting.split("=", 1) for setting in settings)
            environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
            done = subprocess.run([*start, *arguments], env=environment, capture_output=True, text=True)
            code = done.returncode or not done.stdout
        assert not code, f"{where}: {line}"
    else:
        assert command in SHOWN, f"{where}: {line}"


def anchors(page: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(page)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^()\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(str(file.resolve().relative_to(ROOT))), f"{page}: {target}"


def test_readme_names_every_page():
    for page in PAGES[1:]:
        assert f"({page})" in TEXTS["README.md"], page


def test_every_op_and_dialect_has_its_section():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    for page, names in (("docs/ops.md", functions), ("docs/drop-in.md", set(compat.DIALECTS))):
        found = {word for heading in headings(page) for word in re.findall(r"\w+", heading)}
        assert names <= found, names - found


@pytest.mark.parametrize("name", [n for n in ops.__all__ if inspect.isfunction(getattr(ops, n))])
def test_help_names_every_argument(name):
    function = getattr(ops, name)
    text = inspect.getdoc(function)
    missing = [p for p in inspect.signature(function).parameters if not re.search(rf"\b{p}\b", text)]
    assert not missing and (name == "fma" or "[N" in text or "taps" in text or "any shape" in text)


def test_pictures_are_what_the_script_draws(tmp_path):
    drawn = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["draw"](tmp_path)
    kept = sorted((ROOT / "docs").glob("ops_*.png"))
    assert [path.name for path in kept] == sorted(path.name for path in drawn)
    for new, old in zip(sorted(drawn), kept, strict=True):
        # Letters differ from one matplotlib to the next.
        a, b = (Image.open(path).convert("L").resize((64, 16), Image.Resampling.BOX) for path in (new, old))
        difference = sum(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) / len(a.tobytes())
        assert difference < 8, f"{old.name} is not what is drawn now"
        assert old.stat().st_size < 150_000
        assert f"({old.name})" in TEXTS["docs/ops.md"]


def test_messages_that_are_explained_are_those_of_the_code():
    sources = [path for part in ("fastgen", "train") for path in (ROOT / part).rglob("*.py")]
    code = "\n".join(path.read_text() for path in [*sources, ROOT / "setup.py"])
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a text that goes on in the next line
    own = prose("docs/troubleshooting.md").split("## fastgen's own messages")[1]
    found = re.findall(r"^### `(.+)`$", own, re.MULTILINE)
    assert len(found) > 15
    for message in found:
        for part in message.split("…"):
            assert part.strip() in code, (message, part)


def test_presets_are_listed_as_they_are():
    for name, preset in presets.PRESETS.items():
        row = f"| `{name}` | {preset.resolution} | {preset.r1_gamma:g} | {preset.camera.radius:g}, "
        assert row in TEXTS["docs/distillation.md"], row
        assert PRESETS[name].r1_gamma == preset.r1_gamma and PRESETS[name].camera in (name, "auto")
        spread = {"gaussian": "normal, {:g} and {:g}", "uniform": "uniform, within {:g} and {:g}"}[
            preset.camera.kind
        ]
        spread = spread.format(preset.camera.azimuth_spread, preset.camera.polar_spread)
        assert f"{row}{spread} |" in TEXTS["docs/distillation.md"] or preset.camera.azimuth_spread > 3


def test_tests_that_are_named_exist():
    named = {name for text in TEXTS.values() for name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)}
    assert named
    for file, function in named:
        assert re.search(rf"^ *def {function}\(", (ROOT / file).read_text(), re.MULTILINE), (file, function)
