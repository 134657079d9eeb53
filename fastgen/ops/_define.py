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

What runs it is the business of _dispatch.py. An op without fake and backward is composed of other ops
(CompositeImplicitAutograd).
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _backends
from ._dispatch import choice, declare, library, serve, tensors

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    name = declare(schema)
    overload = getattr(torch.ops.fastgen, name).default
    if fake is None:
        plain = reference
        library.impl(name, kernel or reference, "CompositeImplicitAutograd")
    else:
        plain = without_autocast(reference)
        serve(name, _fresh(without_autocast(kernel or reference)), triton)
        torch.library.register_fake(f"fastgen::{name}", fake, lib=library)
    if backward is not None:
        torch.library.register_autograd(
            f"fastgen::{name}", backward, setup_context=setup_context, lib=library
        )
    if vmap is not None:
        torch.library.register_vmap(f"fastgen::{name}", vmap, lib=library)

    def call(*args):
        # PyTorch has no way to register derivatives for torch.func, nor of forward mode, which it would leave
        # out without a word.
        by_reference = choice() == "reference" or (is_transformed() and not (vmap and _is_only_mapped()))
        if by_reference:
            return plain(*args)
        if torch.compiler.is_compiling() or torch._C._len_torch_function_stack():
            return overload(*args)
        # Else what the dispatcher would come to, without the microseconds that this takes.
        if fake is None:
            return (kernel or reference)(*args)
        if backward is None or records(*args):
            return overload(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    call.__name__ = call.__qualname__ = name
    return call


def without_autocast(function: Callable) -> Callable:
    """An op computes in the dtypes it is given; autocast would turn the convolutions inside to 16 bits."""

    @functools.wraps(function)
    def run(*args):
        device = next(a.device.type for a in tensors(args))
        if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def records(*args) -> bool:
    """Will autograd record an op of these arguments?"""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors(args))


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
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _is_only_mapped() -> bool:
    """Is torch.func.vmap the only one of them?"""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    vmap = torch._C._functorch.TransformType.Vmap
    return forward_ad._current_level < 0 and all(transform.key() == vmap for transform in stack)


def _fresh(function: Callable) -> Callable:
    # The dispatcher wants outputs that are not views of inputs; an identity in the reference returns one.
    @functools.wraps(function)
    def run(*args):
        taken = {a.untyped_storage()._cdata for a in tensors(args)}

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


library.define("empty_workspace() -> ()")


def empty_workspace() -> None:
    """Give the memory that CPU kernels keep for their next call back to the C library.

    It is what layers' results and intermediate values took, at most a quarter more than ever at once.
    """
    if _backends.compiled("cpu"):
        torch.ops.fastgen.empty_workspace()


# For kernels in C++, whose ABI has no such question.
library.define("is_deterministic() -> bool")
library.impl("is_deterministic", torch.are_deterministic_algorithms_enabled, "CompositeExplicitAutograd")


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
    options = (axes,) if isinstance(axes, str) else axes or ()
    if options and x.ndim not in [option.count(" ") + 1 for option in options]:
        wanted = " or ".join(
            f"{len(o)} dimension{'s' if len(o) > 1 else ''} [{', '.join(o)}]" for o in map(str.split, options)
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
