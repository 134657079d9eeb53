"""Bias, activation, gain, clamp in one pass.

    y = clamp(f(v) gain, -c, c)  with v = x + b

Where the clamp does not bite, dx = dy gain f'(v), which is linear in dy, and for a gradient h of dx

    d/d dy <dx, h> = h gain f'(v),      d/dv <dx, h> = h dy gain f''(v);

where it bites, and on its bounds, all of them are zero. So three elementwise ops give two orders of
derivative. They keep x and compute f anew; a linear op without a clamp keeps nothing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import (
    define,
    differentiate,
    like,
    require,
    require_number,
    require_same_device,
    require_tensor,
    wide,
)

_SELU_SCALE, _SELU_ALPHA = 1.0507009873554804934, 1.6732632423543772848

# act -> (default alpha, default gain)
DEFAULTS = {
    "linear": (0.0, 1.0),
    "relu": (0.0, math.sqrt(2)),
    "lrelu": (0.2, math.sqrt(2)),
    "tanh": (0.0, 1.0),
    "sigmoid": (0.0, 1.0),
    "elu": (0.0, 1.0),
    "selu": (0.0, 1.0),
    "softplus": (0.0, 1.0),
    "swish": (0.0, math.sqrt(2)),
}

_VALUE = {
    "linear": lambda v, alpha: v,
    "relu": lambda v, alpha: F.relu(v),
    "lrelu": F.leaky_relu,
    "tanh": lambda v, alpha: v.tanh(),
    "sigmoid": lambda v, alpha: v.sigmoid(),
    "elu": lambda v, alpha: F.elu(v),
    "selu": lambda v, alpha: F.selu(v),
    "softplus": lambda v, alpha: F.softplus(v),
    "swish": lambda v, alpha: v * v.sigmoid(),
}


def _first(act: str, v: Tensor, alpha: float) -> Tensor:
    """f'(v), with torch's choice where f has a corner, and at NaN."""
    if act == "linear":
        return torch.ones_like(v)
    if act in ("relu", "lrelu"):
        # Of two numbers `where` would make a float32, and round the slope to it.
        one = torch.ones_like(v)
        return torch.where(v <= 0, 0.0, one) if act == "relu" else torch.where(v > 0, one, alpha)
    if act == "tanh":
        return 1 - v.tanh().square()
    if act == "elu":
        return torch.where(v <= 0, v.exp(), 1)
    if act == "selu":
        return _SELU_SCALE * torch.where(v <= 0, _SELU_ALPHA * v.exp(), 1)
    s = v.sigmoid()
    if act == "sigmoid":
        return s * (1 - s)
    if act == "softplus":
        return torch.where(v > 20, 1, s)
    return s * (1 + v * (1 - s))


def _second(act: str, v: Tensor, alpha: float) -> Tensor:
    """f''(v)."""
    if act in ("linear", "relu", "lrelu"):
        return torch.zeros_like(v)
    if act == "tanh":
        t = v.tanh()
        return -2 * t * (1 - t.square())
    if act == "elu":
        return torch.where(v >= 0, 0, v.exp())
    if act == "selu":
        return _SELU_SCALE * torch.where(v >= 0, 0, _SELU_ALPHA * v.exp())
    s = v.sigmoid()
    if act == "sigmoid":
        return s * (1 - s) * (1 - 2 * s)
    if act == "softplus":
        return torch.where(v > 20, 0, s * (1 - s))
    return s * (1 - s) * (2 + v * (1 - 2 * s))


def _biased(x: Tensor, b: Tensor | None, dim: int) -> Tensor:
    x = wide(x)
    return x if b is None else x + b.to(x.dtype).view([-1 if i == dim else 1 for i in range(x.ndim)])


def bias_act_reference(
    x: Tensor,
    b: Tensor | None,  # [x.shape[dim]]
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float,  # negative: none
) -> Tensor:
    """bias_act by PyTorch's functions; differentiable in x and b to any order."""
    y = _VALUE[act](_biased(x, b, dim), alpha)
    y = y * gain if gain != 1 else y
    # The dispatcher wants an output that is not the input.
    y = y.clone() if y is x else y
    if clamp >= 0 and y.requires_grad:
        # No slope on the bound, whatever that of torch's clamp is.
        y = torch.where(y.abs() < clamp, y, y.detach().clamp(-clamp, clamp))
    elif clamp >= 0:
        y = y.clamp(-clamp, clamp)
    return like(y, x)


def bias_act_bwd_reference(dy, x, b, dim, act, alpha, gain, clamp) -> Tensor:
    """dx for the gradient dy of bias_act's result."""
    return _derivative(_first, wide(dy), x, b, dim, act, alpha, gain, clamp)


def bias_act_bwd2_reference(ddx, dy, x, b, dim, act, alpha, gain, clamp) -> Tensor:
    """The gradient in x of sum(ddx * bias_act_bwd(dy, x, b))."""
    return _derivative(_second, wide(ddx) * wide(dy), x, b, dim, act, alpha, gain, clamp)


def _derivative(order, g, x, b, dim, act, alpha, gain, clamp):
    v = _biased(x, b, dim)
    d = order(act, v, alpha) * (g * gain)
    if clamp >= 0:
        d = torch.where((_VALUE[act](v, alpha) * gain).abs() < clamp, d, 0)
    return like(d, x)


def bias_gradient(dx: Tensor, b: Tensor | None, dim: int) -> Tensor | None:
    if b is None:
        return None
    others = [i for i in range(dx.ndim) if i != dim]
    return (dx.sum(others) if others else dx).to(b.dtype)


def _setup_context(ctx, inputs, output):
    x, b, *ctx.args = inputs
    _, act, _, ctx.gain, clamp = ctx.args
    ctx.scales_only = act == "linear" and clamp < 0
    ctx.save_for_backward(None if ctx.scales_only else x, b)


def _backward(ctx, dy):
    x, b = ctx.saved_tensors
    dx = dy * ctx.gain if ctx.scales_only else bias_act_bwd(dy, x, b, *ctx.args)
    return dx, bias_gradient(dx, b, ctx.args[0]), *[None] * 5


def _setup_context_bwd(ctx, inputs, output):
    dy, x, b, *ctx.args = inputs
    ctx.save_for_backward(dy, x, b)


def _backward_bwd(ctx, ddx):
    dy, x, b = ctx.saved_tensors
    ddy = bias_act_bwd(ddx, x, b, *ctx.args) if ctx.needs_input_grad[0] else None
    dx = db = None
    if any(ctx.needs_input_grad[1:3]) and ctx.args[1] not in ("linear", "relu", "lrelu"):
        dx = _bias_act_bwd2(ddx, dy, x, b, *ctx.args)
        db = bias_gradient(dx, b, ctx.args[0])
    return ddy, dx, db, *[None] * 5


def _backward_bwd2(ctx, g):
    """Through the differentiable reference: higher derivatives are rare."""

    def second(*tensors):
        return (bias_act_bwd2_reference(*tensors, *ctx.args),)

    return *differentiate(second, ctx.saved_tensors, [g]), *[None] * 5


def _setup_context_bwd2(ctx, inputs, output):
    ddx, dy, x, b, *ctx.args = inputs
    ctx.save_for_backward(ddx, dy, x, b)


def _vmap(op, info, in_dims, *args):
    """The mapped dimension goes in front of x, or, where the bias has it as well, into dimension `dim`."""
    *xs, b, dim, act, alpha, gain, clamp = args
    *x_dims, b_dim = in_dims[: len(xs) + 1]
    front = [
        x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
        for x, d in zip(xs, x_dims, strict=True)
    ]
    if b_dim is None:
        return op(*front, b, dim + 1, act, alpha, gain, clamp), 0
    joint = [x.movedim(0, dim).flatten(dim, dim + 1) for x in front]
    out = op(*joint, b.movedim(b_dim, 0).flatten(), dim, act, alpha, gain, clamp)
    return out.unflatten(dim, (info.batch_size, -1)), dim


_bias_act = define(
    "bias_act(Tensor x, Tensor? b, int dim, str act, float alpha, float gain, float clamp) -> Tensor",
    reference=bias_act_reference,
    fake=lambda x, *_: torch.empty_like(x),
    backward=_backward,
    setup_context=_setup_context,
    vmap=lambda *args: _vmap(_bias_act, *args),
    triton="bias_act",
)
bias_act_bwd = define(
    "bias_act_bwd(Tensor dy, Tensor x, Tensor? b, int dim, str act, float alpha, float gain, float clamp)"
    " -> Tensor",
    reference=bias_act_bwd_reference,
    fake=lambda dy, x, *_: torch.empty_like(x),
    backward=_backward_bwd,
    setup_context=_setup_context_bwd,
    vmap=lambda *args: _vmap(bias_act_bwd, *args),
    triton="bias_act",
)
_bias_act_bwd2 = define(
    "bias_act_bwd2(Tensor ddx, Tensor dy, Tensor x, Tensor? b, int dim, str act, float alpha, float gain,"
    " float clamp) -> Tensor",
    reference=bias_act_bwd2_reference,
    fake=lambda ddx, dy, x, *_: torch.empty_like(x),
    backward=_backward_bwd2,
    setup_context=_setup_context_bwd2,
    vmap=lambda *args: _vmap(_bias_act_bwd2, *args),
    triton="bias_act",
)


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """clamp(act(x + b) * gain, -clamp, clamp).

    x:         any shape
    b:         [x.shape[dim]], converted to x's dtype; None: none
    dim:       the dimension that b runs along
    act:       linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus or swish
    alpha:     slope of lrelu below 0; None: 0.2
    gain:      None: sqrt 2 for relu, lrelu and swish, else 1
    clamp:     at least 0; None: none
    Returns:   the shape, dtype and layout of x.
    Raises:    ValueError on shapes and values; TypeError on dtypes.
    Precision: computes in float32 (float64 for float64), rounds once; differentiable in x and b to any
               order, from the third on by PyTorch's functions.
    """
    alpha, gain, clamp = check_act("bias_act", act, alpha, gain, clamp)
    require_tensor("bias_act", "x", x)
    if b is None:
        return _bias_act(x, None, 0, act, alpha, gain, clamp)
    known = isinstance(dim, int) and -x.ndim <= dim < x.ndim
    require(known, "bias_act", "dim must be one of the {} of x, got {!r}", x.ndim, dim)
    require_tensor("bias_act", "b", b, "x.shape[dim]")
    text = "b must have {} elements, as x has along dim {}, got {}"
    require(b.shape[0] == x.shape[dim], "bias_act", text, x.shape[dim], dim, b.shape[0])
    require_same_device("bias_act", x=x, b=b)
    return _bias_act(x, b.to(x.dtype), dim % x.ndim, act, alpha, gain, clamp)


def check_act(op: str, act: str, alpha, gain, clamp, names=("alpha", "gain")) -> tuple[float, float, float]:
    """alpha, gain and clamp as the op wants them: numbers, and a negative clamp for none."""
    known = isinstance(act, str) and act in DEFAULTS
    require(known, op, "act must be one of {}, got {!r}", ", ".join(DEFAULTS), act)
    alpha, gain = (
        default if given is None else require_number(op, name, given)
        for name, given, default in zip(names, (alpha, gain), DEFAULTS[act], strict=True)
    )
    if clamp is None:
        return alpha, gain, -1.0
    require(require_number(op, "clamp", clamp) >= 0, op, "clamp must be at least 0, got {}", clamp)
    return alpha, gain, float(clamp)
