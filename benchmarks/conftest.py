"""What the benchmarks share: how memory is kept, the routes, this machine's peaks, and what a row says.

A route is how a user may get the result: fastgen, plain PyTorch operations (the reference backend), or those
under torch.compile. On a CPU all run twice: `--memory kept` as after fastgen.keep_memory(), and `--memory
returned` as the C library has it, which gives large blocks back to the system and pays for them again; only
there can the peak memory of a call be told. On a GPU Triton's kernels have a route of their own where CUDA
C++ is built too.
"""

import ctypes
import time
from pathlib import Path

import pytest
import torch

import fastgen
from fastgen import _backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUTES = ("fastgen", "pytorch", "torch.compile")
if DEVICE == "cuda" and _backends.compiled("cuda") and _backends.has_triton():
    ROUTES = (*ROUTES, "triton")
# Calls that a round times together: on a GPU one alone is shorter than the wait for its end.
REPEAT = 10 if DEVICE == "cuda" else 1
_rehearses = False
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    if config.getoption("--memory") == "returned":
        dropped = [item for item in items if "torch.compile" in item.nodeid]
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


def _seconds(function, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        synchronise()
        start = time.perf_counter()
        function()
        synchronise()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def synchronise():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.fixture(scope="session")
def peaks(memory) -> dict[str, float]:
    """bytes/s of a copy between warm buffers, FLOP/s of a bare channels-last convolution in each dtype."""
    x = torch.randn(128, 512, 512, device=DEVICE)
    y = torch.empty_like(x)
    found = {"bytes": 2 * x.nbytes / _seconds(lambda: y.copy_(x))}
    for name, dtype in DTYPES.items():
        image = torch.randn(1, 128, 256, 256, device=DEVICE, dtype=dtype)
        image = image.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(128, 128, 3, 3, device=DEVICE, dtype=dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)
        seconds = _seconds(lambda i=image, w=weight: torch.nn.functional.conv2d(i, w, padding=1))
        found[name] = 2 * 9 * 128 * image.numel() / seconds
    return found


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def peak_bytes(function) -> int | None:
    """What a call needs beyond what it is given, its result included; None where that cannot be told."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    fastgen.empty_workspace()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    except (AttributeError, OSError):
        return None
    before = _resident("VmRSS")
    function()
    return _resident("VmHWM") - before


@pytest.fixture
def measure(benchmark, memory, peaks):
    """measure(timed, op=, shape=, dtype=, route=, bytes=, flop=): time a call, and say what it is."""

    def run(timed, rounds: int, *, op, shape, dtype, route, bytes, flop, layout="contiguous"):
        def call():
            for _ in range(REPEAT):
                timed()
            synchronise()

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
            floor=max(bytes / peaks["bytes"], flop / peaks[dtype]),
            peak=peak_bytes(timed) if memory == "returned" or DEVICE == "cuda" else None,
        )
        benchmark.pedantic(call, rounds=1 if _rehearses else rounds, warmup_rounds=1)

    return run
