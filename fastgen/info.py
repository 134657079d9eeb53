"""What is installed, what machine this is, and which backend serves each op: `fastgen info`, and reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from . import __version__, _backends


def collect() -> dict:
    """Everything as plain JSON values: versions, machine, backends, ops."""
    return {"versions": versions(), "machine": machine(), "backends": backends(), "ops": served()}


def find_device(name: str) -> torch.device:
    """The device that an option names; ValueError if it isn't one, or torch can't use it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    index = int(name.partition(":")[2] or 0)
    if name != "cpu" and index >= torch.cuda.device_count():
        raise ValueError(f"device: {name} was asked for, but torch sees {torch.cuda.device_count()} GPUs")
    return torch.device(name)


def is_out_of_memory(error: RuntimeError) -> bool:
    """On the CPU, and out of kernels in C++, it has no class of its own."""
    words = "not enough memory", "out of memory", "can't allocate memory"
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in words)


def versions() -> dict[str, str | None]:
    """Versions by name; None where something is not installed."""
    return {
        "fastgen": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None,
        **{name: _installed(name) for name in ("triton", "torchvision", "safetensors")},
    }


def machine() -> dict[str, str | int | list[str]]:
    """The processors, and how many threads torch uses."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [f"{gpu.name}, {gpu.total_memory >> 30} GiB, sm_{gpu.major}{gpu.minor}" for gpu in gpus],
    }


def backends() -> dict[str, dict[str, bool | str]]:
    """Per backend: usable here or not, and where it is or why not."""
    return {name: {"usable": usable, "why": why} for name, (usable, why) in _backends.status().items()}


def served() -> dict[str, dict[str, dict[str, str]]]:
    """Per op and device type: the backend that serves it, and why not a faster one."""
    from .ops import _dispatch  # with all of them

    names = [n.split("::") for n in torch._C._dispatch_get_all_op_names()]
    return {
        op: {device: {"backend": by, "why": why} for device, (by, why) in _dispatch.served(op).items()}
        for op in sorted(
            name
            for space, name in names
            if space == "fastgen" and "." not in name and name not in ("empty_workspace", "is_deterministic")
        )
    }


def summary(device: torch.device | None = None) -> str:
    """Machine and versions in one line, to stand below a table. device None: a GPU if there is one."""
    here, has = machine(), versions()
    device = device or find_device("auto")
    where = f"{here['cpu']}, {here['cores']} cores, threads: {here['threads']}"
    if device.type == "cuda":
        where = here["gpus"][device.index or 0]
    commit = f", commit {has['commit']}" if has["commit"] else ""
    return f"{where}; torch {has['torch']}, Python {has['python']}, fastgen {has['fastgen']}{commit}"


def commit() -> str | None:
    """The commit of the checkout that this is, '+' if it has changes; None for an installed copy."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None

    def git(*command: str) -> str:
        answer = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, check=True)
        return answer.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"
