"""StyleGAN3's leaky ReLU without aliasing: applied at a higher resolution, between two filters."""

import math

from torch import Tensor

from ._define import define, require, require_ints, require_same_device, require_tensor
from .bias_act import bias_act, check_act
from .upfirdn2d import upfirdn2d


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
    if b is not None:
        x = bias_act(x, b)
    x = upfirdn2d(x, fu, up=up, padding=padding, gain=up**2, flip_filter=flip_filter)
    x = bias_act(x, act="lrelu", alpha=slope, gain=gain, clamp=None if clamp < 0 else clamp)
    return upfirdn2d(x, fd, down=down, flip_filter=flip_filter)


_filtered_lrelu = define(
    "filtered_lrelu(Tensor x, Tensor? fu, Tensor? fd, Tensor? b, int up, int down, int[] padding, float gain,"
    " float slope, float clamp, bool flip_filter) -> Tensor",
    reference=filtered_lrelu_reference,
)


def filtered_lrelu(
    x: Tensor,  # [N, C, H, W]
    fu: Tensor | None = None,  # [taps] or [fh, fw], used at up times the size; None is the identity
    fd: Tensor | None = None,  # the same before keeping every down-th sample
    b: Tensor | None = None,  # [C]
    up: int = 1,
    down: int = 1,
    padding: int | list[int] = 0,  # or [x, y] or [x0, x1, y0, y1], of the upsampled image
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,  # >= 0; None: none
    flip_filter: bool = False,
) -> Tensor:
    """x + b -> upfirdn2d(fu, up, padding, gain=up^2) -> lrelu * gain, clamp -> upfirdn2d(fd, down).

    Returns:   [N, C, H', W'] with W' = (W up + x0 + x1 - fuw + 1 - fdw) // down + 1, H' likewise; dtype of x.
    Raises:    ValueError on shapes and values; TypeError on dtypes.
    Precision: as its parts; differentiable twice in x and b.
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
    return _filtered_lrelu(x, fu, fd, b, up, down, padding, gain, slope, clamp, bool(flip_filter))
