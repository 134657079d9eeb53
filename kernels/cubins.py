"""What the compiler makes of every kernel, without a GPU: `python -m fastgen.kernels.cubins`.

Launchers are called with tensors of the CPU while Triton compiles for a GPU that is not there and launches
nothing. So what is compiled is what users run: the same signatures, the same multiples of 16, and every
configuration of the kernels that are tuned. For each the table has registers a thread, bytes of stack (spilled
registers), bytes of shared memory, and which matrix instructions there are.
"""

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ARCHS = (80, 90, 100)
# Bytes of shared memory that a block may take.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class _Absent:
    """In place of Triton's driver: a device of some architecture, which is never asked to do anything."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list[tuple[str, triton.compiler.CompiledKernel]]]:
    """Within it, launches only compile, for sm_<arch>; gives the list to which they add what they made."""
    made = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        # What is already in this kernel's cache has been seen.
        known = len(self.device_caches[arch][0])
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if len(self.device_caches[arch][0]) > known:
            shape = {
                k: v
                for k, v in kwargs.items()
                if k in self.arg_names and self.params[self.arg_names.index(k)].is_constexpr
            }
            made.append((self.fn.__name__, shape, kernel))
        return kernel

    def compile_all(self, *args, **kwargs):
        for config in self.every_config:
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    before = driver._active
    driver.set_active(_Absent(arch))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(Autotuner, "run", compile_all),
        ):
            yield made
    finally:
        driver._active = before
