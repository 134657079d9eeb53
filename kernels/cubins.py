"""What the compiler makes of every kernel, without a GPU: `python -m fastgen.kernels.cubins`.

Prints a table of the most that each kernel takes, and says what is wrong with which configuration.

Each kernel file's `calls` are made with tensors of the CPU while Triton compiles for a GPU that is not there
and launches nothing. So what is compiled is what users run: the same signatures, the same multiples of 16,
and every configuration of the kernels that are tuned.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import importlib
import itertools
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .. import kernels
from . import common

ARCHS = (80, 90, 100)
DTYPES = {
    "float32": torch.float32,
    "TF32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What is compiled: every architecture in two dtypes, and one in the others, which differ little from them.
TARGETS = [*itertools.product(ARCHS, ("float32", "bfloat16")), (90, "TF32"), (90, "float16")]
# KiB of shared memory that a block may take.
SHARED = {80: 163, 90: 227, 100: 227}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclasses.dataclass
class Cubin:
    kernel: str
    constants: str  # what the kernel is specialised by
    dtype: str
    arch: int
    warps: int
    registers: int  # a thread
    stack: int  # bytes a thread: spilled registers
    shared: int  # bytes a block
    dots: int  # tl.dot in the source, after unrolling
    matrix: str  # the matrix instructions that they became

    def faults(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if self.stack and "bwd" not in self.kernel:
            found.append(f"{self.stack} bytes a thread are spilled")
        if self.shared > SHARED[self.arch] << 10:
            found.append(f"{self.shared} bytes of shared memory, sm_{self.arch} has {SHARED[self.arch]} KiB")
        if self.dots and not self.matrix:
            found.append("tl.dot without matrix instructions")
        return [f"{self.kernel} ({self.constants}) {self.dtype} sm_{self.arch}: {fault}" for fault in found]


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


class Blind(TorchDispatchMode):
    """A launcher that reads numbers of a tensor would wait for the device: here that raises."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (
            torch.Tag.data_dependent_output in function.tags
            or torch.Tag.dynamic_output_shape in function.tags
        ):
            raise RuntimeError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list[tuple[str, dict, triton.compiler.CompiledKernel]]]:
    """Within it launches only compile, for this architecture; gives the list that grows by what they made."""
    made, seen = [], set()
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            constants = {p.name: kwargs[p.name] for p in self.params if p.is_constexpr and p.name in kwargs}
            made.append((self.fn.__name__, constants, kernel))
        return kernel

    def compile_one(call):
        call()
        return 0

    before = driver._active
    driver.set_active(_Absent(arch))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            # As if every configuration were measured.
            mock.patch.multiple(common, AUTOTUNE=True, fastest={}, milliseconds=compile_one),
        ):
            yield made
    finally:
        driver._active = before


def compile_everything() -> list[Cubin]:
    """Every kernel for every target, on all cores."""
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    jobs = [(name, *target) for name, target in itertools.product(sorted(names), TARGETS)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        return [cubin for table in pool.map(_compile, *zip(*jobs, strict=True)) for cubin in table]


def _compile(name: str, arch: int, dtype: str) -> list[Cubin]:
    torch.set_num_threads(1)
    module = importlib.import_module(f"{kernels.__name__}.{name}")
    torch.backends.cuda.matmul.allow_tf32 = dtype == "TF32"
    with compiling(arch) as made, Blind():
        for call in module.calls(DTYPES[dtype]) if hasattr(module, "calls") else ():
            if call() is NotImplemented:
                raise RuntimeError(f"kernels/{name}.py does not serve one of its own calls")
    return [_inspect(arch, dtype, *one) for one in made]


def _inspect(arch: int, dtype: str, name: str, constants: dict, kernel) -> Cubin:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    matrix = set(re.findall(r"\b(wgmma|tcgen05|mma)\.(?:mma_async|mma|sync)\b", kernel.asm["ptx"]))
    return Cubin(
        name,
        " ".join(f"{key}={value}" for key, value in constants.items()),
        dtype,
        arch,
        kernel.metadata.num_warps,
        registers,
        stack,
        kernel.metadata.shared,
        len(re.findall(r"\btt\.dot\b", kernel.asm["ttir"])),
        " ".join(sorted(matrix)),
    )


_MOST = "registers", "stack", "shared"


def _summary(table: list[Cubin]) -> Iterator[list]:
    """Of every kernel, dtype and architecture: how often it was compiled, and the most that it took."""

    def key(cubin):
        return cubin.kernel, cubin.dtype, cubin.arch

    for names, group in itertools.groupby(sorted(table, key=key), key):
        cubins = list(group)
        matrix = sorted({word for cubin in cubins for word in cubin.matrix.split()})
        most = (max(getattr(cubin, name) for cubin in cubins) for name in _MOST)
        yield [*names, len(cubins), *most, " ".join(matrix)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastgen.kernels.cubins", description=__doc__)
    parser.add_argument("--csv", type=Path, help="a file for the table of every configuration")
    file = parser.parse_args().csv
    table = compile_everything()
    if file is not None:
        with file.open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow([field.name for field in dataclasses.fields(Cubin)])
            writer.writerows(dataclasses.astuple(cubin) for cubin in table)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["kernel", "dtype", "arch", "compiled", *_MOST, "matrix"])
    writer.writerows(_summary(table))
    faults = [fault for cubin in table for fault in cubin.faults()]
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
