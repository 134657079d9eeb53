"""What the benchmarks share: how memory is kept, the routes, this machine's peaks, and what a row says.

A route is how a user may get the result: fastgen, plain PyTorch operations (the reference backend), or those
under torch.compile. On a CPU all run twice: `--memory kept` as after fastgen.keep_memory(), and `--memory
returned` as the C library has it, which gives large blocks back to the system and pays for them again; only
there can the peak memory of a call be told. On a GPU Triton's kernels have a route of their own where CUDA
C++ is built too.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

import fastgen
from fastgen import _backends

# This checkout's, whatever fastgen is measured.
_file = Path(__file__).parents[1] / "fastgen" / "_timing.py"
_spec = importlib.util.spec_from_file_location("timing", _file)
timing = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(timing)
DTYPES = timing.DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUTES = ("fastgen", "pytorch", "torch.compile")
if DEVICE == "cuda" and _backends.compiled("cuda") and _backends.has_triton():
    ROUTES = (*ROUTES, "triton")
# Calls that a round times together: on a GPU one alone is shorter than the wait for its end.
REPEAT = 10 if DEVICE == "cuda" else 1
_rehearses = False


def pytest_addoption(parser):
    parser.addoption("--memory", choices=("kept", "returned"), default="kept")
    parser.addoption(
        "--rehearse", action="store_true", help="tiny, by Triton's interpreter: times mean nothing"
    )


def pytest_configure(config):
    global _rehearses
    _rehearses = config.getoption("--rehearse")


def scaled(size: int) -> int:
    """A size of a benchmark, or one that an interpreter can do."""
    return max(size // 16, 4) if _rehearses else size


def pytest_collection_modifyitems(config, items):
    """Leave out what is measured where freed memory is treated otherwise."""
    returned = config.getoption("--memory") == "returned"

    def is_elsewhere(item) -> bool:
        parameters = item.callspec.params
        # Of images, a route says how memory is treated; on a GPU it is treated in one way.
        route = getattr(parameters.get("case"), "route", None)
        if route is not None:
            return DEVICE == "cpu" and (route in ("plain", "returned")) != returned
        return returned and parameters.get("route") == "torch.compile"

    dropped = [item for item in items if is_elsewhere(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


@pytest.fixture(scope="session", autouse=True)
def memory(pytestconfig):
    kind = pytestconfig.getoption("--memory")
    if kind == "kept":
        fastgen.keep_memory()
    return kind


def on_route(route: str, function):
    """The function on a route."""
    backend = "reference"
    if route == "fastgen":
        backend = "triton" if _rehearses else "auto"
    elif route == "triton":
        backend = route
    elif route == "torch.compile":
        torch.compiler.reset()  # nothing that an earlier case compiled, no more general shapes because of it
        function = torch.compile(function, dynamic=False)

    def run(*args):
        with fastgen.backend(backend):
            return function(*args)

    return run


def derivative(run, inputs, *others):
    """The result of run(inputs, *others), and a function that makes the gradients of the inputs."""
    inputs = [x.requires_grad_() for x in inputs]
    result = run(inputs, *others)
    dy = torch.randn_like(result)
    return result, lambda: torch.autograd.grad(result, inputs, dy, retain_graph=True)


def require_finite(results):
    for x in results if isinstance(results, tuple) else [results]:
        assert x is None or x.isfinite().all(), "not finite, not timed"


@pytest.fixture(scope="session")
def peaks(memory) -> dict[str, float]:
    return timing.peaks(torch.device(DEVICE))


@pytest.fixture
def measure(benchmark, memory, peaks):
    """measure(timed, op=, shape=, dtype=, route=, bytes=, flop=): time a call, and say what it is. What it
    returns has to be finite."""

    def run(timed, rounds: int, *, op, shape, dtype, route, bytes, flop, layout="contiguous"):
        def call():
            for _ in range(REPEAT):
                timed()
            timing.synchronise()

        require_finite(timed())
        call()
        benchmark.extra_info.update(
            op=op,
            shape=shape,
            dtype=dtype,
            layout=layout,
            route=route,
            memory=memory,
            repeat=REPEAT,
            device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            bytes=bytes,
            flop=flop,
            floor=max(bytes / peaks["bytes"], flop / peaks.get(dtype, peaks["bfloat16"])),
            peak=timing.peak_bytes(timed, torch.device(DEVICE))
            if memory == "returned" or DEVICE == "cuda"
            else None,
        )
        benchmark.pedantic(call, rounds=1 if _rehearses else rounds, warmup_rounds=1)

    return run
