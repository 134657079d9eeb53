"""What every test can rely on: the checkout is importable, results repeat, skipped GPU tests are counted."""

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from fastgen import _backends  # noqa: E402

_deselected = 0


def pytest_collection_modifyitems(config, items):
    global _deselected
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    _deselected = len(gpu)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)


def pytest_terminal_summary(terminalreporter):
    if not torch.cuda.is_available():
        terminalreporter.write_line(f"{_deselected} tests marked gpu did not run: no CUDA device")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# What ops on CPU tensors can run on here.
CPU_BACKENDS = ["reference", *(["cpu"] if _backends.status()["cpu"][0] else [])]


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    from fastgen import backend

    with backend(request.param):
        yield request.param
