"""Throw-away repositories, and nothing left of them."""

import sys
from pathlib import Path

import pytest

from fastgen import compat


@pytest.fixture(autouse=True)
def clean(tmp_path):
    path = list(sys.path)
    yield
    compat.uninstall()
    sys.path[:] = path
    inside = [
        name
        for name, module in sys.modules.items()
        if any(
            str(place).startswith(str(tmp_path))
            for place in (vars(module).get("__file__"), *(vars(module).get("__path__") or ()))
        )
    ]
    for name in inside:
        del sys.modules[name]
    assert not [finder for finder in sys.meta_path if type(finder).__module__ == "fastgen.compat"]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Writes files, {name: text}, of a repository whose folder has a space in it, and puts it on the path."""

    def write(files: dict[str, str]) -> Path:
        root = tmp_path / "a repository"
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        monkeypatch.syspath_prepend(str(root))
        return root

    return write
