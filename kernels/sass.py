"""What nvcc made of every CUDA kernel of the built library: `python -m fastgen.kernels.sass`.

Prints, of every kernel and architecture, the most registers, spilled bytes and static shared memory that an
instance takes, and how many of those that are meant to load 16 bytes at a time do. By convention the last
template argument of such a kernel is how many elements a thread loads at once, and the first one their type.
"""

import argparse
import collections
import concurrent.futures
import csv
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ARCHS = (80, 86, 89, 90, 100, 120)
# KiB of shared memory that a block has without asking for more.
SHARED = 48
BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2}


@dataclasses.dataclass
class Instance:
    kernel: str
    arguments: str  # of the template
    arch: int
    registers: int  # a thread
    stack: int  # bytes a thread: spilled registers
    shared: int  # static bytes a block
    wide: bool  # has 16-byte loads

    @property
    def meant_wide(self) -> bool:
        first, *others = self.arguments.split(", ")
        return bool(others) and others[-1].isdigit() and int(others[-1]) * BYTES.get(first, 0) == 16

    def faults(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes a thread are spilled")
        if self.shared > SHARED << 10:
            found.append(f"{self.shared} bytes of static shared memory, there are {SHARED} KiB")
        if self.meant_wide and not self.wide:
            found.append("no 16-byte loads")
        return [f"{self.kernel}<{self.arguments}> sm_{self.arch}: {fault}" for fault in found]


def find_library() -> Path:
    """The CUDA library that was built; FileNotFoundError where none was."""
    spec = importlib.util.find_spec("fastgen._cuda")
    if spec is None:
        raise FileNotFoundError("fastgen._cuda is not built: install with nvcc present")
    return Path(spec.origin)


def _tool(name: str) -> str:
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    if spec := importlib.util.find_spec("triton"):
        places.append(Path(spec.origin).parent / "backends/nvidia/bin")
    found = shutil.which(name, path=os.pathsep.join([*map(str, places), os.environ.get("PATH", "")]))
    if found is None:
        raise FileNotFoundError(f"{name} is neither in CUDA_HOME nor in Triton's package nor on PATH")
    return found


def _run(*command) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def inspect(library: Path) -> list[Instance]:
    """Every kernel of the library, for every architecture that it has binaries for."""
    archs = sorted({int(a) for a in re.findall(r"\bsm_(\d+)", _run(_tool("cuobjdump"), "-lelf", library))})
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return [i for found in pool.map(functools.partial(_inspect, library), archs) for i in found]


def _inspect(library: Path, arch: int) -> list[Instance]:
    usage = _run(_tool("cuobjdump"), "-arch", f"sm_{arch}", "--dump-resource-usage", library)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    wide, name = collections.defaultdict(bool), None
    with subprocess.Popen(
        [_tool("cuobjdump"), "-arch", f"sm_{arch}", "-sass", library], stdout=subprocess.PIPE, text=True
    ) as dump:
        for line in dump.stdout:
            if "Function : " in line:
                name = line.split("Function : ")[1].strip()
            elif "LDG.E.128" in line:
                wide[name] = True
    names = _run("c++filt", *(name for name, *_ in found)).splitlines()
    table = []
    for (mangled, *numbers), name in zip(found, names, strict=True):
        whole = re.match(r"(?:void )?(?:\w+::|\(anonymous namespace\)::)*(\w+)(?:<(.*)>)?\(", name)
        registers, stack, shared = map(int, numbers)
        arguments = re.sub(r"\((?:\w+::)*\w+\)", "", whole[2] or "")
        table.append(Instance(whole[1], arguments, arch, registers, stack, shared, wide[mangled]))
    return table


def summary(table: list[Instance]) -> Iterator[list]:
    """Of every kernel and architecture: its instances, the most that they take, how many load 16 bytes."""
    groups = collections.defaultdict(list)
    for instance in table:
        groups[instance.kernel, instance.arch].append(instance)
    for key, instances in sorted(groups.items()):
        most = (max(getattr(i, name) for i in instances) for name in ("registers", "stack", "shared"))
        wide = [i.wide for i in instances if i.meant_wide]
        yield [*key, len(instances), *most, f"{sum(wide)} of {len(wide)}" if wide else ""]


def faults(library: Path, table: list[Instance]) -> list[str]:
    """What is wrong with the library: nothing, or lines."""
    found = [fault for instance in table for fault in instance.faults()]
    if missing := set(ARCHS) - {instance.arch for instance in table}:
        found.append(f"not built for sm_{', sm_'.join(map(str, sorted(missing)))}")
    if "ptx" not in _run(_tool("cuobjdump"), "-lptx", library):
        found.append("no PTX for architectures to come")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastgen.kernels.sass", description=__doc__)
    parser.add_argument("wheel", type=Path, nargs="?", help="look at the library in it")
    wheel = parser.parse_args().wheel
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            library = find_library()
        else:
            library = Path(zipfile.ZipFile(wheel).extract("fastgen/_cuda.abi3.so", folder))
        table = inspect(library)
        found = faults(library, table)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["kernel", "arch", "instances", "registers", "stack", "shared", "16-byte loads"])
    writer.writerows(summary(table))
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
