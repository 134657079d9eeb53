"""What a measurement is made of: times, peaks of the machine and of memory.

It needs PyTorch alone, and of fastgen only what every version has: benchmarks load it by its path, so that
two commits are measured by the same code.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def synchronise():
    """Wait for the GPU where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], repeat: int = 1) -> float:
    """Wall time of a call, of so many that are timed together."""
    synchronise()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    synchronise()
    return (time.perf_counter() - start) / repeat


def peaks(device: torch.device) -> dict[str, float]:
    """bytes/s of a copy between warm buffers, FLOP/s of a bare channels-last convolution in each dtype.

    On a CPU in a process of its own, where the C library keeps memory: what fetches its result's pages anew
    is no peak.
    """
    if device.type == "cuda":
        return _peaks(device)
    kept = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": str(64 << 20)}
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['_print_peaks'](int(sys.argv[2]))"
    command = [sys.executable, "-c", code, __file__, str(torch.get_num_threads())]
    return json.loads(subprocess.check_output(command, env=os.environ | kept, text=True))


def _print_peaks(threads: int):
    torch.set_num_threads(threads)
    print(json.dumps(_peaks(torch.device("cpu"))))


def _peaks(device: torch.device) -> dict[str, float]:
    together = 20 if device.type == "cuda" else 1  # alone one is shorter there than the wait for its end

    def best(call: Callable[[], object]) -> float:
        return min([seconds(call, together) for _ in range(24)][4:])

    x = torch.randn(128, 512, 512, device=device)
    y = torch.empty_like(x)
    found = {"bytes": 2 * x.nbytes / best(lambda: y.copy_(x))}
    for name, dtype in DTYPES.items():
        image = torch.randn(1, 128, 256, 256, device=device, dtype=dtype)
        image = image.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(128, 128, 3, 3, device=device, dtype=dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            taken = best(lambda i=image, w=weight: torch.nn.functional.conv2d(i, w, padding=1))
        found[name] = 2 * 9 * 128 * image.numel() / taken
    return found


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """What a call needs beyond what it is given, its result included; None where that cannot be told. On a
    CPU only before keep_memory()."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    import fastgen

    fastgen.empty_workspace()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    except (AttributeError, OSError):
        return None
    before = _status("self/status", "VmRSS")
    call()
    return _status("self/status", "VmHWM") - before


def free_bytes(device: torch.device) -> float:
    """Memory that is still to be had."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    try:
        return _status("meminfo", "MemAvailable")
    except (OSError, StopIteration):
        return float("inf")


def _status(file: str, key: str) -> int:
    lines = (Path("/proc") / file).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
