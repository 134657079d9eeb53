"""How an op is made, and what its arguments must be.

An op is a schema, a reference (plain differentiable PyTorch), and, unless the reference already says it
all, a fake (shapes only) and a backward made of differentiable ops. `define` registers each exactly once,
whatever was built:

    _op = define(
        "twice(Tensor x) -> Tensor",
        reference=twice_reference,          # takes what the schema says
        fake=lambda x: torch.empty_like(x),
        backward=lambda ctx, dy: _op(dy),   # of ops and aten: so it can be differentiated again
        setup_context=lambda ctx, inputs, output: None,
    )

    def twice(x):                           # the public function: check, make canonical, call
        require_tensor("twice", "x", x, "N C H W")
        return _op(x)

C++ and Triton kernels register for the CPU and CUDA keys of the same name, and the PyTorch dispatcher prefers
them to the reference. Those for CUDA do so at the first call on a CUDA tensor, which may ask what devices
there are, as an import must not: `cuda_plan` says what serves, by status and TRITONS. An op without fake and
backward is composed of other ops (CompositeImplicitAutograd).
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
from torch.autograd import forward_ad

from .. import _backends

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# The ops of the CUDA library. Where Triton has the op too C++ serves, but for calls with arguments for which
# the function here is true. Reasoned, not measured: most of them are bound by memory, which C++ reads in 16
# bytes a thread, and it adds up gradients of planes in a block before it does so in memory; but filters of
# filtered_lrelu are matrix products on tensor cores in Triton, and C++ has code of its own for few of them.


def _suits_triton(x, fu, fd, b, up, down, *_) -> bool:
    if x.dtype == torch.float64 or any(f is not None and f.ndim > 1 for f in (fu, fd)):
        return False
    taps = [1 if f is None else len(f) for f in (fu, fd)]
    own_code = (up, down) in ((2, 2), (4, 2)) and taps == [6 * up, 6 * down]
    return not own_code and max(up, down) <= 4 and max(taps) <= 24


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

_library = torch.library.Library("fastgen", "DEF")
# The schemas again, for the CUDA kernels compiled for the CPU.
_host_library = torch.library.Library("fastgen_cuda_host", "DEF")
_defaults: dict[str, Callable] = {}  # what runs an op where no kernel does
_launchers: dict[str, Callable] = {}  # of Triton kernels
# Kernels that a backend puts above all others while it is chosen: op, dispatch key, kernel.
_first: dict[str, list[tuple[str, str, Callable]]] = {"triton": [], "cuda-host": []}
_in_front: torch.library.Library | None = None
_settling = threading.RLock()
_settled: dict[str, tuple[str, str]] | None = None


def define(
    schema: str,
    reference: Callable,
    fake: Callable | None = None,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    vmap: Callable | None = None,
    kernel: Callable | None = None,
    triton: str | None = None,
) -> Callable:
    """Register an op of namespace fastgen; returns the function that calls it on the chosen backend.

    fake:      shapes, strides and dtypes of the outputs; None for an op composed of differentiable ops.
    backward, setup_context, vmap: as in `torch.library.register_autograd` and `register_vmap`.
    kernel:    what runs where no compiled kernel does, if something is faster than the reference when nothing
               has to be recorded for autograd. Of an op without fake it is composed of other ops as well.
    triton:    the file of fastgen.kernels whose function of the op's name launches a Triton kernel. What it
               answers NotImplemented to, such as float64, the reference does.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _host_library.define(schema)
    overload = getattr(torch.ops.fastgen, name).default
    if fake is None:
        plain = reference
        _library.impl(name, kernel or reference, "CompositeImplicitAutograd")
    else:
        plain = without_autocast(reference)
        default = _fresh(without_autocast(kernel or reference))
        _library.impl(name, default, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastgen::{name}", fake, lib=_library)
        _defaults[name] = default
        _library.impl(name, _first_cuda_call(name), "CUDA")
        if triton is not None and _backends.has_triton():
            _launchers[name] = _launcher(name, triton, default)
            for key in ["CUDA", "CPU"] if _backends.is_interpreted() else ["CUDA"]:
                _offer("triton", name, key, _launchers[name])
        if _has_kernel(name, "CPU", "fastgen_cuda_host"):
            _offer("cuda-host", name, "CPU", getattr(torch.ops.fastgen_cuda_host, name).default)
    if backward is not None:
        torch.library.register_autograd(
            f"fastgen::{name}", backward, setup_context=setup_context, lib=_library
        )
    if vmap is not None:
        torch.library.register_vmap(f"fastgen::{name}", vmap, lib=_library)

    def call(*args):
        return plain(*args) if _choice == "reference" else overload(*args)

    call.__name__ = call.__qualname__ = name
    return call


def _launcher(name: str, file: str, default: Callable) -> Callable:
    def run(*args):
        # Here and not above, so that importing fastgen does not import Triton.
        launch = getattr(importlib.import_module(f"fastgen.kernels.{file}"), name)
        # Triton launches on the current device.
        with torch.cuda.device_of(_tensors(args)[0]):
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
                    _library.impl(name, kernel, "CUDA", allow_override=True)
            _settled = plan
            _put_in_front(_first.get(_choice, []))  # again, for these are above it now
        return _settled


def _either(name: str) -> Callable:
    """Triton or C++, by the table."""
    cuda = torch.library.get_kernel(f"fastgen::{name}", "CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def run(*args):
        return _launchers[name](*args) if CUDA[name](*args) else cuda.call_boxed(keys, *args)

    return run


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


def _tensors(args: Sequence) -> list[Tensor]:
    """Those among an op's arguments, in lists too."""
    listed = [a if isinstance(a, list | tuple) else [a] for a in args]
    return [a for some in listed for a in some if isinstance(a, Tensor)]


def without_autocast(function: Callable) -> Callable:
    """An op computes in the dtypes it is given; autocast would turn the convolutions inside to 16 bits."""

    @functools.wraps(function)
    def run(*args):
        device = next(a.device.type for a in _tensors(args))
        if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def differentiate(function: Callable, inputs: Sequence[Tensor | None], grads: Sequence[Tensor]) -> list:
    """The gradients in the inputs, for `grads` of a tuple that the function makes of them by ops of autograd.

    Those that have no element's shape are left out. Differentiable again; the inputs' own past takes no part.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, since one of the tensors may be made of another, and that is not to be differentiated here.
        inputs = [None if x is None else x.view_as(x) if x.requires_grad else x.detach() for x in inputs]
        wanted = [x.requires_grad_() for x in inputs if x is not None]
        out = function(*inputs)
        used = [i for i, y in enumerate(out) if y.requires_grad and y.shape == grads[i].shape]
        found = torch.autograd.grad(
            [out[i] for i in used],
            wanted,
            [grads[i] for i in used],
            create_graph=recorded,
            materialize_grads=True,
        )
    found = iter(found)
    return [None if x is None else next(found) for x in inputs]


def is_transformed() -> bool:
    """Is this within torch.func's transforms, or in forward-mode differentiation?"""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _fresh(function: Callable) -> Callable:
    # The dispatcher wants outputs that are not views of inputs; an identity in the reference returns one.
    @functools.wraps(function)
    def run(*args):
        taken = {a.untyped_storage()._cdata for a in _tensors(args)}

        def own(out):
            return out.clone() if isinstance(out, Tensor) and out.untyped_storage()._cdata in taken else out

        out = function(*args)
        return type(out)(map(own, out)) if isinstance(out, tuple | list) else own(out)

    return run


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of outputs shaped like x: channels_last if x has just that, else contiguous."""
    try:
        channels_last = (
            x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        )
    except RuntimeError:  # inside vmap PyTorch doesn't tell, and lays out the whole itself
        channels_last = False
    return torch.channels_last if channels_last else torch.contiguous_format


def like(y: Tensor, x: Tensor) -> Tensor:
    """y in x's dtype and layout."""
    out = torch.empty_like(x)
    return y.to(x.dtype) if y.stride() == out.stride() else out.copy_(y)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype that sums are made in: float32 for 16 bits, else x's own."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def wide(x: Tensor) -> Tensor:
    """x in the dtype that sums are made in."""
    return x.to(wide_dtype(x))


_library.define("empty_workspace() -> ()")


def empty_workspace() -> None:
    """Give the memory that CPU kernels keep for their next call back to the C library.

    It is what layers' results and intermediate values took, at most a quarter more than ever at once.
    """
    if _backends.compiled("cpu"):
        torch.ops.fastgen.empty_workspace()


# For kernels in C++, whose ABI has no such question.
_library.define("is_deterministic() -> bool")
_library.impl("is_deterministic", torch.are_deterministic_algorithms_enabled, "CompositeExplicitAutograd")


# The backend.


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


_use(_check_choice(os.environ.get("FASTGEN_BACKEND") or "auto"))


def choice() -> str:
    """The backend in force."""
    return _choice


# What arguments must be. Each raises a line that names op, argument, expectation and what came.


def require(ok: bool, op: str, text: str, *values) -> None:
    """ValueError unless ok. The text is "name must be {}, got {}"; it is filled in only when needed."""
    if not ok:
        values = [list(v) if isinstance(v, torch.Size) else v for v in values]
        raise ValueError(f"{op}: {text.format(*values)}")


def require_tensor(op: str, name: str, x, axes: str | Sequence[str] | None = None, dtypes=FLOATS) -> None:
    """x is a tensor of one of the dtypes, and has the axes, such as "N C H W" (or one of several such)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {wanted}, got {str(x.dtype).removeprefix('torch.')}")
    if axes is not None:
        options = [option.split() for option in ([axes] if isinstance(axes, str) else axes)]
        if x.ndim not in map(len, options):
            wanted = " or ".join(
                f"{len(o)} dimension{'s' if len(o) > 1 else ''} [{', '.join(o)}]" for o in options
            )
            raise ValueError(f"{op}: {name} must have {wanted}, got {x.ndim} ({list(x.shape)})")


def require_shape(op: str, name: str, x: Tensor, shape: Sequence[int | None], axes: str) -> None:
    """x has this shape; None stands for any size. axes names them in the message: "N 3 C H W"."""
    require_tensor(op, name, x, axes)
    if any(want not in (None, got) for want, got in zip(shape, x.shape, strict=True)):
        sizes = zip(axes.split(), shape, strict=True)
        wanted = ", ".join(a if n is None or a == str(n) else f"{a}={n}" for a, n in sizes)
        raise ValueError(f"{op}: {name} must have shape [{wanted}], got {list(x.shape)}")


def require_same_device(op: str, **tensors: Tensor | None) -> None:
    """All are tensors (or None), where the first one is."""
    given = {name: x for name, x in tensors.items() if x is not None}
    for name, tensor in given.items():
        require_tensor(op, name, tensor)
    (first, x), *others = given.items()
    for name, tensor in others:
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like {first}, got {tensor.device}")


def require_number(op: str, name: str, value) -> float:
    """A number, as a float."""
    try:
        if not isinstance(value, str | bytes):  # which float() would read
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise ValueError(f"{op}: {name} must be a number, got {value!r}")


def require_ints(op: str, name: str, value, counts: Sequence[int], at_least: int | None = None) -> list[int]:
    """One int, or as many as one of the counts; returns as many as the last: [x, y] or [x0, x1, y0, y1]."""
    values = [value] if isinstance(value, int) else value
    ints = isinstance(values, list | tuple) and all(isinstance(v, int | torch.SymInt) for v in values)
    if not ints or len(values) not in (1, *counts):
        forms = {2: "[x, y]", 4: "[x0, x1, y0, y1]"}
        wanted = " or ".join(["an int", *(forms[n] for n in counts)])
        raise ValueError(f"{op}: {name} must be {wanted}, got {value!r}")
    if at_least is not None and min(values) < at_least:
        raise ValueError(f"{op}: {name} must be at least {at_least}, got {value!r}")
    return [v for v in values for _ in range(counts[-1] // len(values))]
