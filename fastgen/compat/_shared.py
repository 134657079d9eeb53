"""What the dialects share: arguments that choose nothing here, others' names of arguments, and convolutions
whose weights may go without gradients for a while."""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._define import is_transformed

_left_out = False


def named(*functions: Callable) -> dict[str, Callable]:
    return {function.__name__: function for function in functions}


def accepting(function: Callable, name: str, values: tuple | None, module: str) -> Callable:
    """The function as one of `module`, with one more argument that changes nothing.

    values: what it may be, its default first; None: anything.
    """
    default = values[0] if values else None
    signature = inspect.signature(function)
    last = inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
    count = len(signature.parameters)

    @functools.wraps(function)
    def call(*args, **kwargs):
        value = args[count] if len(args) == count + 1 else kwargs.pop(name, default)
        if values and value not in values:
            wanted = " or ".join(map(repr, values))
            raise ValueError(f"{function.__name__}: {name} must be {wanted}, got {value!r}")
        return function(*args[:count], **kwargs)

    call.__signature__ = signature.replace(parameters=[*signature.parameters.values(), last])
    call.__module__ = module
    return call


def speaking(**names: str) -> Callable[[Callable], Callable]:
    """A function whose errors call arguments what its caller does: speaking(x="input")."""

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except (TypeError, ValueError) as error:
                found = re.match(r"\w+: (\w+) must (.*)", str(error), re.DOTALL)
                if found is None or found[1] not in names:
                    raise
                raise type(error)(f"{function.__name__}: {names[found[1]]} must {found[2]}") from None

        return call

    return wrap


@contextlib.contextmanager
def no_weight_gradients(disable: bool = True) -> Iterator[None]:
    """Within it, backward passes give weights of convolutions no gradient: R1's need only the image's."""
    global _left_out
    before, _left_out = _left_out, _left_out or disable
    try:
        yield
    finally:
        _left_out = before


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, dy):
        return None if _left_out else dy


def weight_of(weight: Tensor) -> Tensor:
    """The weight, with a gradient only outside no_weight_gradients."""
    recorded = torch.is_grad_enabled() and weight.requires_grad
    passed = torch.compiler.is_compiling() or is_transformed()
    return _Weight.apply(weight) if recorded and not passed else weight


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """torch.nn.functional.conv2d, of which every derivative exists, under no_weight_gradients."""
    return F.conv2d(input, weight_of(weight), bias, stride, padding, dilation, groups)


def conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """torch.nn.functional.conv_transpose2d, likewise."""
    return F.conv_transpose2d(
        input, weight_of(weight), bias, stride, padding, output_padding, groups, dilation
    )


GRADFIX = named(conv2d, conv_transpose2d, no_weight_gradients)
