"""Which backends exist here, and for each that does not, why.

`load` runs once, at `import fastgen`: it loads the compiled libraries that were built. The CPU's kernels
register themselves with the PyTorch dispatcher; CUDA's do so at the first call on a CUDA tensor (see
ops/_dispatch.py), if `status` finds that they run here. A library that is missing, cannot be loaded, or was
built for another CUDA or for other devices is not an error: Triton or the reference serves, and `status` has
the exact reason.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys

import torch

OLDEST_TORCH = (2, 11)
OLDEST_CARD = (8, 0)  # whose kernels, C++ and Triton, are looked at: see kernels/cubins.py


class BackendError(RuntimeError):
    """A backend that was asked for is missing; says why."""


_libraries: dict[str, object] = {}  # backend -> loaded module
_reasons: dict[str, str] = {}  # backend -> why it was not loaded


def load() -> None:
    """Load fastgen._cpu, _cuda and _cuda_host where they exist. Never raises on a missing or broken one."""
    for backend in ("cpu", "cuda", "cuda-host"):
        if backend in _libraries:
            continue
        try:
            _libraries[backend] = _load_library(backend)
        except (ImportError, OSError) as error:
            _reasons[backend] = str(error)
    if "cuda-host" in _libraries:
        _libraries["cuda-host"].register()


def _load_library(backend: str):
    name = f"fastgen._{backend.replace('-', '_')}"
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"not built: {_HOW_TO_BUILD[backend]}")
    if _torch_version() < OLDEST_TORCH:
        raise ImportError(f"needs torch >= 2.11, this is {torch.__version__}")
    if backend == "cuda" and torch.version.cuda is None:
        raise ImportError(f"torch {torch.__version__} is built without CUDA")
    try:
        library = importlib.import_module(name)
    except ImportError as error:
        if needed := re.search(r"libcudart\.so\.(\d+)", str(error)):
            raise ImportError(_other_cuda(needed[1])) from error
        raise ImportError(
            f"{error} (this is torch {torch.__version__}, CUDA {torch.version.cuda})"
        ) from error
    built = re.search(r"\bCUDA (\d+)", library.build)  # 13000 is CUDA 13.0
    if built and int(built[1]) // 1000 != int(torch.version.cuda.split(".")[0]):
        raise ImportError(_other_cuda(int(built[1]) // 1000))
    return library


def _other_cuda(major: int | str) -> str:
    return f"built for CUDA {major}, but torch {torch.__version__} is for CUDA {torch.version.cuda}"


_HOW_TO_BUILD = {
    "cpu": "install with a C++ compiler present",
    "cuda": "install with nvcc present (FASTGEN_CUDA=1 shows what is wrong)",
    "cuda-host": "it is for tests of the CUDA kernels, and FASTGEN_CUDA=host builds it",
}


def compiled(backend: str) -> bool:
    """Is the compiled library of this backend, cpu, cuda or cuda-host, loaded?"""
    return backend in _libraries


def register_cuda() -> None:
    """Have the dispatcher know the CUDA library's kernels."""
    _libraries["cuda"].register()


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])


def status() -> dict[str, tuple[bool, str]]:
    """Per backend: is it usable here, and where it is (usable) or why not. Asks CUDA for its devices."""
    found = {name: _library_status(name) for name in ("cpu", "cuda", "cuda-host")}
    if found["cuda"][0] and (problem := _device_problem()):
        found["cuda"] = (False, problem)
    return found | {"triton": _triton_status(), "reference": (True, "")}


def _library_status(backend: str) -> tuple[bool, str]:
    library = _libraries.get(backend)
    if library is None:
        return False, _reasons.get(backend, "not loaded")
    return True, f"{library.__file__} ({library.build})"


def _device_problem() -> str:
    """Why the CUDA library does not serve all visible devices; empty if it does or that cannot be told."""
    devices = _capabilities()
    if isinstance(devices, str):
        return devices
    built = re.search(r"\bsm ([\w.+]*)", _libraries["cuda"].build)
    archs = built[1] if built else ""
    if all(_serves(archs, device) for device in devices):
        return ""
    return f"built for compute capability {archs.replace('_', ', ')}; visible: {_listed(devices)}"


def _capabilities() -> list[tuple[int, int]] | str:
    """The visible devices', or what is wrong with them."""
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    try:
        return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    except RuntimeError as error:  # the driver or a device is out of order
        return f"CUDA does not start: {error}"


def _listed(devices: list[tuple[int, int]]) -> str:
    return ", ".join(f"{major}.{minor}" for major, minor in devices)


def _serves(archs: str, device: tuple[int, int]) -> bool:
    """Has a library built for `archs`, such as "8.0_9.0+PTX", code that runs on a device of this capability?

    Binaries run on the same major version from their minor version on, PTX on everything newer; an `a` ties
    both to one capability, an `f` to one major version. True where archs are names ("Hopper") or none.
    """
    parsed = [re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch) for arch in archs.split("_")]
    if not all(parsed):
        return True
    for arch in parsed:
        built, only, ptx = (int(arch[1]), int(arch[2])), arch[3], arch[4]
        same_major = built[0] == device[0] and only != "a"
        if built == device or (built <= device and (same_major or (ptx and not only))):
            return True
    return False


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Do Triton kernels run by its interpreter, which takes tensors of the CPU?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_status() -> tuple[bool, str]:
    if not has_triton():
        return False, "triton is not installed"
    devices = [] if is_interpreted() else _capabilities()
    if isinstance(devices, str):
        return False, devices
    # It compiles a little C of its own at its first launch.
    compilers = os.environ.get("CC"), "clang", "gcc", "cc"
    if devices and not any(shutil.which(name) for name in compilers if name):
        return False, "triton needs a C compiler, in CC or on PATH"
    if any(device < OLDEST_CARD for device in devices):
        return False, f"needs compute capability {_listed([OLDEST_CARD])}; visible: {_listed(devices)}"
    how = ", interpreted" if is_interpreted() else ""
    try:
        return True, f"triton {importlib.metadata.version('triton')}{how}"
    except importlib.metadata.PackageNotFoundError:  # nightly builds come under another name
        return True, f"triton{how}"


def keep_memory() -> bool:
    """Make this process keep freed memory for its next tensors; True where that works (glibc).

    By default glibc returns every large block to the kernel at once, and fetching it again, page by page,
    costs more than most element-wise operations on it. The process then holds its peak until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (other C libraries have no such symbol)
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        # Nothing by mmap, the heap never shrinks, and it grows in steps of 64 MiB.
        settings = ((mmap_max, 0), (trim_threshold, -1), (top_pad, 64 << 20))
        return all(libc.mallopt(option, value) == 1 for option, value in settings)
    return False
