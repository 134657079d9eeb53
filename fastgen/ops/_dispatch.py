"""What serves an op on a device: kernels in C++ and in Triton, or the reference.

C++ and Triton kernels register for the CPU and CUDA keys of an op's name, and the PyTorch dispatcher prefers
them to the reference. Those for CUDA do so at the first call on a CUDA tensor, which may ask what devices
there are, as an import must not: `cuda_plan` says what serves, by status and the table CUDA.
"""

import contextlib
import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import _backends

# The ops of the CUDA library. Where Triton has the op too C++ serves, but for calls with arguments for which
# the function here is true. Reasoned, not measured: most of them are bound by memory, which C++ reads in 16
# bytes a thread, and it adds up gradients of planes in a block before it does so in memory; but filters of
# filtered_lrelu are matrix products on tensor cores in Triton, and C++ has code of its own for few of them.


def _suits_triton(x, fu, fd, b, up, down, *_) -> bool:
    if x.dtype == torch.float64 or any(f is not None and f.ndim > 1 for f in (fu, fd)):
        return False
    taps = [1 if f is None else len(f) for f in (fu, fd)]
    own_code = (up, down) in ((2, 2), (4, 2)) and taps == [6 * up, 6 * down]
    return not own_code and max(up, down) <= 4 and 1 < max(taps) <= 24


CUDA: dict[str, Callable[..., bool] | None] = {
    "upfirdn2d": None,
    "bias_act": None,
    "bias_act_bwd": None,
    "bias_act_bwd2": None,
    "filtered_lrelu": _suits_triton,
    "filtered_lrelu_bwd": lambda dy, *rest: _suits_triton(*rest),
    "filtered_bias_act": None,
    "filtered_bias_act_bwd": None,
    "sample_triplane": None,
    "sample_triplane_bwd": None,
    "sample_triplane_bwd2": None,
}

library = torch.library.Library("fastgen", "DEF")
# The schemas again, for the CUDA kernels compiled for the CPU.
_host_library = torch.library.Library("fastgen_cuda_host", "DEF")
_defaults: dict[str, Callable] = {}  # what runs an op where no kernel does
_launchers: dict[str, Callable] = {}  # of Triton kernels
_files: dict[str, str] = {}  # of fastgen.kernels, that have them
# Kernels that a backend puts above all others while it is chosen: op, dispatch key, kernel.
_first: dict[str, list[tuple[str, str, Callable]]] = {"triton": [], "cuda-host": []}
_in_front: torch.library.Library | None = None
_settling = threading.RLock()
_settled: dict[str, tuple[str, str]] | None = None


def declare(schema: str) -> str:
    """The op's name."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _host_library.define(schema)
    return schema.partition("(")[0]


def serve(name: str, default: Callable, triton: str | None) -> None:
    """Have `default` run where no kernel does, and what that file of fastgen.kernels has where Triton is."""
    library.impl(name, default, "CompositeExplicitAutograd")
    _defaults[name] = default
    library.impl(name, _first_cuda_call(name), "CUDA")
    if triton is not None and _backends.has_triton():
        _files[name], _launchers[name] = triton, _launcher(name, triton, default)
        for key in ["CUDA", "CPU"] if _backends.is_interpreted() else ["CUDA"]:
            _offer("triton", name, key, _launchers[name])
    if _has_kernel(name, "CPU", "fastgen_cuda_host"):
        _offer("cuda-host", name, "CPU", getattr(torch.ops.fastgen_cuda_host, name).default)


def _launcher(name: str, file: str, default: Callable) -> Callable:
    def run(*args):
        # Here and not above, so that importing fastgen does not import Triton.
        launch = getattr(importlib.import_module(f"fastgen.kernels.{file}"), name)
        # Triton launches on the current device.
        with torch.cuda.device_of(tensors(args)[0]):
            out = launch(*args)
        return default(*args) if out is NotImplemented else out

    return run


def _first_cuda_call(name: str) -> Callable:
    def run(*args):
        by, why = settle_cuda()[name]
        if name in CUDA and by != "cuda":
            _warn_once(f"fastgen: no CUDA C++ kernels: {why}. {by.capitalize()} serves instead.")
        # Anew, to what is registered now.
        return _defaults[name](*args) if by == "reference" else getattr(torch.ops.fastgen, name)(*args)

    return run


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def cuda_plan() -> dict[str, tuple[str, str]]:
    """By op: what serves CUDA tensors (cuda, triton or reference), and why nothing better does.

    Asks CUDA for its devices.
    """
    found, plan = _backends.status(), {}
    for name in _defaults:
        why = [found[by][1] for by, ops in (("cuda", CUDA), ("triton", _launchers)) if name in ops]
        if name in CUDA and found["cuda"][0]:
            plan[name] = "cuda", ""
        elif name in _launchers and found["triton"][0]:
            plan[name] = "triton", why[0] if name in CUDA else ""
        else:
            plan[name] = "reference", "; ".join(dict.fromkeys(why)) or "no kernel for this op"
    return plan


def settle_cuda() -> dict[str, tuple[str, str]]:
    """Register what serves CUDA tensors, once; the plan."""
    global _settled
    with _settling:
        if _settled is None:
            plan = cuda_plan()
            kernels = {name: _launchers[name] for name, (by, _) in plan.items() if by == "triton"}
            with _overriding():
                if any(by == "cuda" for by, _ in plan.values()):
                    _backends.register_cuda()
                    if _backends.status()["triton"][0]:
                        kernels |= {name: _either(name) for name, other in CUDA.items() if other is not None}
                for name, kernel in kernels.items():
                    library.impl(name, kernel, "CUDA", allow_override=True)
            _settled = plan
            _put_in_front(_first.get(_choice, []))  # again, for these are above it now
        return _settled


def _either(name: str) -> Callable:
    """Triton or C++, by the table."""
    kernel = torch.library.get_kernel(f"fastgen::{name}", "CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def cuda(*args):
        return kernel.call_boxed(keys, *args)

    triton = _launcher(name, _files[name], cuda)
    return lambda *args: triton(*args) if CUDA[name](*args) else cuda(*args)


@contextlib.contextmanager
def _overriding() -> Iterator[None]:
    """PyTorch warns of a kernel above another, though it is allowed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        yield


def has_kernel(name: str, x: Tensor) -> bool:
    """Is there a kernel, C++ or Triton, for the op where x is? (On too old a card it still does not run.)"""
    if x.device.type == "cuda":
        return name in _launchers or (name in CUDA and _backends.compiled("cuda"))
    return x.device.type == "cpu" and _has_kernel(name, "CPU")


@functools.cache
def _has_kernel(name: str, key: str, space: str = "fastgen") -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{space}::{name}", key)


def served(op: str) -> dict[str, tuple[str, str]]:
    """Per device type: the backend that calls of `op` reach, and why nothing better is there."""
    if _choice == "reference":
        return dict.fromkeys(("cpu", "cuda"), ("reference", "chosen"))
    if op not in _defaults:
        return dict.fromkeys(("cpu", "cuda"), ("composed", ""))  # of other ops
    plan = {"cpu": _served_on_cpu(op), "cuda": cuda_plan()[op]}
    if _choice == "triton" and op in _launchers:
        plan["cuda"] = "triton", ""
    return plan


def _served_on_cpu(op: str) -> tuple[str, str]:
    if any(found[:2] == (op, "CPU") for found in _first.get(_choice, [])):
        return _choice, ""
    usable, why = _backends.status()["cpu"]
    return (
        ("cpu", "") if _has_kernel(op, "CPU") else ("reference", "no kernel for this op" if usable else why)
    )


def tensors(args: Sequence) -> list[Tensor]:
    """Those among an op's arguments, in lists too."""
    listed = [a if isinstance(a, list | tuple) else [a] for a in args]
    return [a for some in listed for a in some if isinstance(a, Tensor)]


_NAMES = ("auto", "cpu", "cuda", "triton", "cuda-host", "reference")


def _check_choice(name: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"backend must be one of {', '.join(_NAMES)}, got {name!r}")
    # Only what asks for kernels looks for them: the look may start CUDA, which an import must not.
    if name not in ("auto", "reference"):
        usable, reason = _backends.status()[name]
        if not usable:
            raise _backends.BackendError(f"backend {name!r} is not available: {reason}")
    return name


class backend:
    """`with fastgen.backend("reference"): ...` chooses what ops run on, for the whole process.

    auto       the best kernel for each op and device, else the reference
    reference  plain PyTorch; what it records for autograd stays so, wherever it is differentiated
    triton     as auto, but an op that has a Triton kernel runs that: on a CUDA device, and, where the
               environment has TRITON_INTERPRET=1, on the CPU, by Triton's interpreter
    cuda-host  as auto, but on the CPU an op that has a CUDA kernel runs that, compiled for the CPU: for tests
    cpu, cuda  as auto
               These four raise where the library, or Triton, is not usable. The place of its tensors still
               says where an op runs, and one without such a kernel runs what it has.
    At the start it is the environment's FASTGEN_BACKEND, or auto.
    Raises: RuntimeError where the backend is missing, with the reason; ValueError on another name.
    """

    def __init__(self, name: str):
        self.name = _check_choice(name)

    def __enter__(self):
        self.before = _choice
        _use(self.name)

    def __exit__(self, *_):
        _use(self.before)


def _use(name: str) -> None:
    global _choice, _in_front
    if _in_front is not None:
        _in_front._destroy()  # and what was below is there again
        _in_front = None
    _choice = name
    _put_in_front(_first.get(name, []))


def _offer(backend: str, op: str, key: str, kernel: Callable) -> None:
    _first[backend].append((op, key, kernel))
    if backend == _choice:
        _put_in_front(_first[backend][-1:])


def _put_in_front(kernels: Sequence[tuple[str, str, Callable]]) -> None:
    global _in_front
    with _overriding():
        for op, key, kernel in kernels:
            _in_front = _in_front or torch.library.Library("fastgen", "IMPL")
            _in_front.impl(op, kernel, key, allow_override=True)
    _has_kernel.cache_clear()


_use(_check_choice(os.environ.get("FASTGEN_BACKEND") or "auto"))


def choice() -> str:
    """The backend in force."""
    return _choice
