"""StyleGAN3's leaky ReLU without aliasing: applied at a higher resolution, between two filters.

With U and D for the filters and a for the activation, y = D a(U (x + b)). Its gradient,

    dx = U' (a'(v) D' dy)  with v = U (x + b),

is linear in dy, and a'' = 0: so the only second derivative is that in dy, ddy = D (a'(v) U ddx). The compiled
kernels store neither v nor anything else of its size: they hold a few rows, and the backward computes v anew.
"""

import math

import torch
from torch import Tensor

from .. import _backends
from ._define import define, memory_format, require, require_ints, require_same_device, require_tensor
from ._dispatch import choice, has_kernel
from .bias_act import bias_act, bias_act_bwd, bias_gradient, check_act
from .upfirdn2d import transposed, upfirdn2d


def _upsampled(x, fu, b, up, padding, flip_filter) -> Tensor:
    x = x if b is None else bias_act(x, b)
    return upfirdn2d(x, fu, up=up, padding=padding, gain=up**2, flip_filter=flip_filter)


def filtered_lrelu_reference(
    x: Tensor,
    fu: Tensor | None,
    fd: Tensor | None,
    b: Tensor | None,
    up: int,
    down: int,
    padding: list[int],  # [x0, x1, y0, y1]
    gain: float,
    slope: float,
    clamp: float,  # negative: none
    flip_filter: bool,
) -> Tensor:
    """Its parts, one after the other."""
    v = _upsampled(x, fu, b, up, padding, flip_filter)
    y = bias_act(v, act="lrelu", alpha=slope, gain=gain, clamp=None if clamp < 0 else clamp)
    return upfirdn2d(y, fd, down=down, flip_filter=flip_filter)


def filtered_lrelu_bwd_reference(
    dy, x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter
) -> Tensor:
    """dx for the gradient dy of filtered_lrelu's result."""
    v = _upsampled(x, fu, b, up, padding, flip_filter)
    ones, none = [1, 1], [0, 0, 0, 0]
    dy = transposed(dy, fd, v.shape[2:], ones, [down, down], none, flip_filter, 1.0)
    dv = bias_act_bwd(dy, v, None, 0, "lrelu", slope, gain, clamp)
    return transposed(dv, fu, x.shape[2:], [up, up], ones, padding, flip_filter, float(up**2))


def _fake(x, fu, fd, b, up, down, padding, *_):
    def size(n, dim, before, after):
        taps = [1 if f is None else f.shape[dim] for f in (fu, fd)]
        return (n * up + before + after - taps[0] + 1 - taps[1]) // down + 1

    shape = (*x.shape[:2], size(x.shape[2], 0, *padding[2:]), size(x.shape[3], -1, *padding[:2]))
    return x.new_empty(shape).contiguous(memory_format=memory_format(x))


def _setup_context(ctx, inputs, output):
    x, fu, fd, b, *ctx.args = inputs
    ctx.save_for_backward(x, fu, fd, b)


def _backward(ctx, dy):
    x, fu, fd, b = ctx.saved_tensors
    dx = _filtered_lrelu_bwd(dy, x, fu, fd, b, *ctx.args)
    return dx, None, None, bias_gradient(dx, b, 1), *[None] * 7


def _backward_bwd(ctx, ddx):
    x, fu, fd, b = ctx.saved_tensors
    up, down, padding, gain, slope, clamp, flip_filter = ctx.args
    v = _upsampled(x, fu, b, up, padding, flip_filter)
    dv = _upsampled(ddx, fu, None, up, padding, flip_filter)
    dv = bias_act_bwd(dv, v, None, 0, "lrelu", slope, gain, clamp)
    return upfirdn2d(dv, fd, down=down, flip_filter=flip_filter), *[None] * 11


def _vmap(op, info, in_dims, *args):
    """The mapped dimension joins the batch, or the channels if b has it; mapped filters go one by one."""
    *images, fu, fd, b = args[:-7]
    *dims, fu_dim, fd_dim, b_dim = in_dims[: len(images) + 3]
    if fu_dim is not None or fd_dim is not None:
        tensors = [
            [x] * info.batch_size if d is None else x.unbind(d)
            for x, d in zip(args[:-7], in_dims, strict=False)
        ]
        return torch.stack([op(*each, *args[-7:]) for each in zip(*tensors, strict=True)]), 0
    front = [
        x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
        for x, d in zip(images, dims, strict=True)
    ]
    if b_dim is None:
        out = op(*(x.flatten(0, 1) for x in front), fu, fd, b, *args[-7:])
        return out.unflatten(0, front[-1].shape[:2]), 0
    joint = [x.movedim(0, 1).flatten(1, 2) for x in front]
    out = op(*joint, fu, fd, b.movedim(b_dim, 0).flatten(), *args[-7:])
    return out.unflatten(1, (info.batch_size, -1)), 1


_ARGUMENTS = (
    "Tensor x, Tensor? fu, Tensor? fd, Tensor? b, int up, int down, int[] padding, float gain, float slope,"
    " float clamp, bool flip_filter"
)
_filtered_lrelu = define(
    f"filtered_lrelu({_ARGUMENTS}) -> Tensor",
    reference=filtered_lrelu_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    vmap=lambda *args: _vmap(_filtered_lrelu, *args),
    triton="filtered_lrelu",
)
_filtered_lrelu_bwd = define(
    f"filtered_lrelu_bwd(Tensor dy, {_ARGUMENTS}) -> Tensor",
    reference=filtered_lrelu_bwd_reference,
    fake=lambda dy, x, *_: x.new_empty(x.shape).contiguous(memory_format=memory_format(x)),
    backward=_backward_bwd,
    setup_context=lambda ctx, inputs, output: _setup_context(ctx, inputs[1:], output),
    vmap=lambda *args: _vmap(_filtered_lrelu_bwd, *args),
    triton="filtered_lrelu",
)


def _is_fused(x: Tensor, fu: Tensor | None, fd: Tensor | None, up: int, down: int) -> bool:
    """Does a kernel serve this? PyTorch's compiler cannot ask, and sees the op."""
    if not (torch.compiler.is_compiling() or has_kernel("filtered_lrelu", x)):
        return False
    if choice() == "cuda-host" if x.is_cpu else _backends.compiled("cuda") and choice() != "triton":
        # What makes one result fits into the memory of a CUDA kernel's block, in float64 too.
        return max((n for f in (fu, fd) if f is not None for n in f.shape), default=1) <= 32
    if x.is_cpu:
        # Rows of the C++ kernel have as many phases as the least common multiple.
        return math.lcm(up, down) <= 64
    # And Triton's has tiles for so many taps of separable filters.
    short = all(f is None or f.ndim == 1 and len(f) <= 24 for f in (fu, fd))
    return x.dtype != torch.float64 and short and max(up, down) <= 4


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None = None,
    fd: Tensor | None = None,
    b: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | list[int] = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
) -> Tensor:
    """x + b -> upfirdn2d(fu, up, padding, gain=up^2) -> lrelu * gain, clamp -> upfirdn2d(fd, down).

    x:         [N, C, H, W]
    fu:        [taps] or [fh, fw], used at up times the size; None is the identity
    fd:        the same, before every down-th sample is kept
    b:         [C]; None: none
    up, down:  ints
    padding:   an int, [x, y] or [x0, x1, y0, y1], of the upsampled image
    gain, slope, clamp: of the leaky ReLU; clamp is at least 0, None: none
    flip_filter: correlate with fu and fd instead of convolving
    Returns:   [N, C, H', W'] with W' = (W up + x0 + x1 - fuw + 1 - fdw) // down + 1, H' likewise; dtype of x.
    Raises:    ValueError on shapes and values; TypeError on dtypes.
    Precision: computes in float32 (float64 for float64); where a compiled kernel runs it rounds once, else
               after each part. Differentiable twice in x and b.
    """
    op = "filtered_lrelu"
    require_tensor(op, "x", x, "N C H W")
    text = "x must have at least one row and one column, got {}"
    require(x.shape[2] > 0 and x.shape[3] > 0, op, text, x.shape)
    size = [x.shape[3], x.shape[2]]
    padding = require_ints(op, "padding", padding, [2, 4])
    for name, value in (("up", up), ("down", down)):
        text = name + " must be an int of at least 1, got {!r}"
        require(isinstance(value, int) and value >= 1, op, text, value)
    if b is not None:
        require_tensor(op, "b", b, "C")
        require(b.shape[0] == x.shape[1], op, "b must have {} elements, got {}", x.shape[1], b.shape[0])
    size = [n * up + sum(padding[2 * i : 2 * i + 2]) for i, n in enumerate(size)]
    text = "x, upsampled and padded, must have at least one row and one column, got {} x {}"
    require(min(size) > 0, op, text, *size[::-1])
    for name, f, at in (("fu", fu, "upsampled and padded"), ("fd", fd, "filtered with fu")):
        if f is None:
            continue
        require_tensor(op, name, f, ("taps", "fh fw"))
        taps = [f.shape[-1], f.shape[0]]
        text = "x, {}, must be at least as large as {} ({} x {}), got {} x {}"
        require(f.numel() > 0, op, name + " must have at least one tap, got {}", f.shape)
        require(size[0] >= taps[0] and size[1] >= taps[1], op, text, at, name, *taps[::-1], *size[::-1])
        size = [n - t + 1 for n, t in zip(size, taps, strict=True)]
    require_same_device(op, x=x, fu=fu, fd=fd, b=b)
    slope, gain, clamp = check_act(op, "lrelu", slope, gain, clamp, names=("slope", "gain"))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    fu, fd = (f if f is None else f.detach().to(wide) for f in (fu, fd))
    b = b if b is None else b.to(x.dtype)
    # Where there is no kernel, autograd sees the parts: they keep v, and needn't compute it again.
    run = _filtered_lrelu if _is_fused(x, fu, fd, up, down) else filtered_lrelu_reference
    return run(x, fu, fd, b, up, down, padding, gain, slope, clamp, bool(flip_filter))
