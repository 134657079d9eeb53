"""What every test can rely on: the checkout is importable, results repeat, skipped GPU tests are counted."""

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import fastgen  # noqa: E402
from fastgen import _backends  # noqa: E402

_deselected = 0


def pytest_collection_modifyitems(config, items):
    global _deselected
    if torch.cuda.is_available():
        return
    missing = ["gpu"] if _backends.is_interpreted() else ["gpu", "triton"]
    left_out = {item for item in items if any(map(item.get_closest_marker, missing))}
    _deselected = len(left_out)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


# Of several processes (pytest-xdist) each collects all tests, and the one that reports collects none.
def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["deselected"] = _deselected


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    global _deselected
    _deselected = getattr(node, "workeroutput", {}).get("deselected", _deselected)


def pytest_terminal_summary(terminalreporter):
    if not torch.cuda.is_available():
        terminalreporter.write_line(f"{_deselected} tests marked gpu or triton did not run: no CUDA device")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Where ops run here: CPU tensors on the reference, and on what the dispatcher prefers; CUDA tensors.
TARGETS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("auto", "cpu"), id="cpu" if _backends.status()["cpu"][0] else "fallback"),
    pytest.param(("auto", "cuda"), id="cuda", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
]
if _backends.compiled("cuda-host"):
    TARGETS.append(pytest.param(("cuda-host", "cpu"), id="cuda-host"))
if _backends.is_interpreted():
    TARGETS[3] = pytest.param(("triton", "cpu"), id="triton")


@pytest.fixture(params=TARGETS)
def device(request):
    """A device, within the backend to be tested on it."""
    backend, device = request.param
    with fastgen.backend(backend):
        yield device


@pytest.fixture
def poisoned():
    """New memory is full of NaN, so that what an op forgets to write is seen."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


def pytest_generate_tests(metafunc):
    """Tests of an op's class take `case`, `few` (the first two), `dtype` and `error` from the class."""
    checks = metafunc.cls
    if not hasattr(checks, "cases"):
        return
    lists = {"case": checks.cases, "few": checks.cases[:2]}
    for name, cases in lists.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, cases, ids=[case.name for case in cases])
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", checks.dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))
    if "error" in metafunc.fixturenames:
        metafunc.parametrize("error", checks.errors, ids=range(len(checks.errors)))
