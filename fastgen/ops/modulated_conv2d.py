"""StyleGAN2's modulated convolution, with the modulation on the activations.

    out[n,o] = sum_i,k weight[o,i,k] s[n,i] x[n,i] d[n,o],   d = rsqrt(sum_i s^2 (sum_k weight^2) + 1e-8)

so s multiplies x, d multiplies the result, the weight is shared, and d costs a matrix product. For a single
sample with more pixels than taps it is cheaper to fold s and d into the weight.

In float16 x s weight may overflow before d brings it back. With a[o], b[n] and c[i] any positive numbers,

    weight -> weight c / a,  s -> s / (b c),  1e-8 -> 1e-8 / (a b)^2

leaves the product with d unchanged, gradients too; so a, b and c are constants to autograd. With c the
largest |s[:,i]|, a = sqrt(I kh kw) max|weight[o] c| and b = max|s[n] / c|, a sum is at most
sqrt(I kh kw) max|x|. Where an output needs channels that its styles make small, d may still be too large for
float16: so it multiplies in float32.

Where there are kernels, the composition is another one: everything in memory [N, H, W, C], the weight of one
sample always folded, and one op for all that follows the convolution. A CPU makes a transposed convolution as
its phases. A GPU has one kernel for the whole of a convolution, modulation included; large ones it leaves to
PyTorch.
"""

import torch
from torch import Tensor

from ._define import (
    define,
    is_transformed,
    memory_format,
    records,
    require,
    require_same_device,
    require_shape,
    require_tensor,
    wide,
    wide_dtype,
)
from ._dispatch import choice, has_kernel
from .bias_act import bias_act, check_act
from .conv2d_resample import (
    call_autocast,
    check_resample,
    conv2d_resample_reference,
    convolve,
    convolve_transposed,
    padding_after_transposed,
    phases_of_weight,
)
from .conv3x3 import conv3x3, pays
from .filtered_bias_act import filtered_bias_act
from .fma import fma
from .styled_conv2d import styled_conv2d, styled_conv2d_act


def modulated_conv2d_reference(
    x: Tensor,  # [N, I, H, W]
    weight: Tensor,  # [O, I, kh, kw]
    styles: Tensor,  # [N, I]
    noise: Tensor | None,  # broadcastable to the output
    up: int,
    down: int,
    padding: list[int],  # [x0, x1, y0, y1], the filter's share included
    resample_filter: Tensor | None,  # [taps] or [fh, fw]
    demodulate: bool,
    flip_weight: bool,
    bias: Tensor | None,  # [O]
    act: str,
    alpha: float | None,
    act_gain: float | None,
    clamp: float | None,
) -> Tensor:
    """modulated_conv2d of differentiable ops."""
    s, w, d = _modulation(weight, styles, x.dtype, demodulate)
    resample = up, down, padding, 1, flip_weight, False
    if _folds(x, weight, up):
        y, d = conv2d_resample_reference(x, _folded(w, s, d), resample_filter, *resample), None
    else:
        s = s.to(x.dtype)[:, :, None, None]
        y = conv2d_resample_reference(x * s, w, resample_filter, *resample)

    if d is not None:
        y, d = wide(y), d[:, :, None, None]
        y = (y * d if noise is None else fma(y, d, noise)).to(x.dtype)
    elif noise is not None:
        y = y + noise.to(x.dtype)
    if bias is None and act == "linear" and act_gain in (None, 1) and clamp is None:
        return y
    return bias_act(y, None if bias is None else bias.to(y.dtype), 1, act, alpha, act_gain, clamp)


def _modulation(weight, styles, dtype, demodulate) -> tuple[Tensor, Tensor, Tensor | None]:
    """s [N, I], weight and d [N, O] (None: 1), in the dtype that sums of `dtype` are made in."""
    taps = weight[0].numel()
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    s, w, d, eps = styles.to(sums), weight.to(sums), None, 1e-8
    if demodulate:
        if dtype == torch.float16 and s.shape[0] > 0:
            c = _largest(s.t(), [1])
            w, s = w * c[:, None, None], s / c
            a, b = _largest(w, [1, 2, 3]) * taps**0.5, _largest(s, [1])
            w, s = w / a[:, None, None, None], s / b[:, None]
            eps = eps / (b[:, None] * a).square()
        d = (s.square() @ w.square().sum([2, 3]).t() + eps).rsqrt()
    return s, w, d


def _folds(x: Tensor, weight: Tensor, up: int) -> bool:
    """Is it cheaper to scale the weight than what comes in and out?"""
    return x.shape[0] == 1 and weight[0].numel() * 2 <= x.shape[2] * x.shape[3] * up * up


def _folded(w: Tensor, s: Tensor, d: Tensor | None) -> Tensor:
    w = w * s[0, :, None, None]
    return w if d is None else w * d[0, :, None, None, None]


def _largest(x: Tensor, axes: list[int]) -> Tensor:
    """Of |x| along the axes, and never 0."""
    return x.detach().abs().amax(axes).clamp(min=1e-8)


def modulated_weight_reference(
    weight: Tensor,  # [O, I, kh, kw]
    styles: Tensor,  # [N, I]
    demodulate: bool,
    flip: bool,
    phases: bool,
    channels_last: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The weight, whole or as phases_of_weight takes it apart, and then d [N, O].

    Of a single sample, styles and d are in the weight; d has no rows then, nor without demodulation.
    """
    s, w, d = _modulation(weight, styles, weight.dtype, demodulate)
    if styles.shape[0] == 1:
        w, d = _folded(w, s, d), None
    w = w.to(dtype)
    w = w.flip([2, 3]) if flip else w
    layout = torch.channels_last if channels_last else torch.contiguous_format
    parts = [p.contiguous(memory_format=layout) for p in (phases_of_weight(w) if phases else [w])]
    return [*parts, weight.new_empty(0, w.shape[0]) if d is None else d]


def _modulated_weight_fake(weight, styles, demodulate, flip, phases, channels_last, dtype):
    parts = phases_of_weight(weight) if phases else [weight]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    rows = styles.shape[0] if demodulate and styles.shape[0] > 1 else 0
    parts = [torch.empty(p.shape, dtype=dtype, device=p.device, memory_format=layout) for p in parts]
    return [*parts, weight.new_empty(rows, weight.shape[0])]


_modulated_weight = define(
    "modulated_weight(Tensor weight, Tensor styles, bool demodulate, bool flip, bool phases,"
    " bool channels_last, ScalarType dtype) -> Tensor[]",
    reference=modulated_weight_reference,
    fake=_modulated_weight_fake,
    triton="modulated_conv2d",
)


def channels_last_reference(x: Tensor, scale: Tensor | None) -> Tensor:
    """x [N, C, H, W] times scale [N, C], in channels_last."""
    y = x if scale is None else (wide(x) * scale.to(wide_dtype(x))[:, :, None, None]).to(x.dtype)
    return y.contiguous(memory_format=torch.channels_last)


_channels_last = define(
    "channels_last(Tensor x, Tensor? scale) -> Tensor",
    reference=channels_last_reference,
    fake=lambda x, scale: torch.empty(
        x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    ),
    triton="modulated_conv2d",
)


# A GPU leaves a convolution of so many pixels to PyTorch, if it has taps, and WIDE channels in and out. All
# others are limited by memory or by latency, and a kernel that does everything at once has less of both. In
# float32 PyTorch's products are of TF32, unless that is forbidden, and the kernel's are three of it each.
# Reasoned from bytes and products, not yet measured.
WIDE = 64
MANY_PIXELS = {torch.float32: 32 * 32, torch.bfloat16: 64 * 64, torch.float16: 64 * 64, torch.float64: 0}


def _is_large(pixels: int, x: Tensor, weight: Tensor) -> bool:
    taps = weight[0, 0].numel()
    return taps > 1 and min(weight.shape[:2]) >= WIDE and pixels >= MANY_PIXELS[x.dtype]


def _runs_kernels(x: Tensor) -> bool:
    return has_kernel("filtered_bias_act", x) and not is_transformed()


def _has_styled(pixels: int, x: Tensor, weight: Tensor) -> bool:
    """Does a kernel multiply by the styles as it convolves so many pixels?"""
    return has_kernel("styled_conv2d", x) and not _is_large(pixels, x, weight)


def _fused(
    x, weight, styles, noise, up, down, padding, resample_filter, demodulate, flip_weight, bias, act, alpha,
    act_gain, clamp, *, modulated=False, next_styles=None,
) -> Tensor:  # fmt: skip
    """In memory [N, H, W, C], with at most one pass after the convolution, where there are kernels for it.

    modulated says that x is multiplied by the styles already; the result will be by next_styles.
    """
    kh, kw = weight.shape[2:]
    transposed = up == 2 and min(*padding, kh - 2, kw - 2) >= 0
    if not (_runs_kernels(x) and down == 1 and (up == 1 or transposed)):
        y = modulated_conv2d_reference(
            x, weight, styles, noise, up, down, padding, resample_filter, demodulate, flip_weight, bias, act,
            alpha, act_gain, clamp,
        )  # fmt: skip
        return y if next_styles is None else y * next_styles.to(y.dtype)[:, :, None, None]
    contiguous = memory_format(x) == torch.contiguous_format
    recorded = records(x, weight, styles)
    flip = flip_weight == (up > 1)
    single = x.shape[0] == 1
    styled = _has_styled(x[:, 0].numel(), x, weight)
    winograd = x.device.type == "cpu" and not styled and pays(x, weight, padding)
    # A GPU's transposed convolution does not multiply by zeros either, and is one launch.
    phases = up > 1 and x.device.type == "cpu" and not styled
    # In float16 several samples need the range that only the other way keeps.
    short = x.dtype in (torch.float32, torch.bfloat16) or (single and x.dtype == torch.float16)
    if short and weight.dtype != torch.float64 and not recorded:
        # PyTorch's convolutions would copy it to what they want.
        *weights, d = _modulated_weight(
            weight.float(), styles, demodulate, flip, phases, up > 1 or not winograd, x.dtype
        )
        d = d if d.shape[0] else None
        s = None if single or modulated else styles
        if not styled and (contiguous or s is not None):
            x = _channels_last(x, s)
    else:
        s, w, d = _modulation(weight, styles, x.dtype, demodulate)
        w, s, d = (_folded(w, s, d), None, None) if _folds(x, weight, up) else (w, s.to(x.dtype), d)
        s = None if modulated else s
        if not styled:
            x = x.contiguous(memory_format=torch.channels_last)
            x = x if s is None else x * s[:, :, None, None]
        w = w.to(x.dtype)
        w = w.flip([2, 3]) if flip and (kh > 1 or kw > 1) else w
        weights = phases_of_weight(w) if phases and not recorded else [w]
    alpha, act_gain, clamp = check_act("modulated_conv2d", act, alpha, act_gain, clamp)
    if noise is not None:
        noise = noise.to(wide_dtype(x)).view((1,) * (4 - noise.ndim) + noise.shape)
    tail = act, alpha, act_gain, clamp
    f, filter_padding = None, [0] * 4
    if up > 1:
        f, filter_padding = resample_filter, padding_after_transposed(padding, kh, kw, up)
    if styled:
        s = None if s is None else s.to(wide_dtype(x))
        if up == 1 and next_styles is None and not records(x, weight, styles, noise, bias):
            return styled_conv2d_act(x, *weights, s, d, noise, bias, padding, *tail, contiguous)
        y = [styled_conv2d(x, *weights, s, padding, up)]
    elif up == 1:
        y = [conv3x3(x, *weights) if winograd else convolve(x, *weights, padding)]
    else:
        y = convolve_transposed(x, weights)
    next_styles = None if next_styles is None else next_styles.to(wide_dtype(x))
    return filtered_bias_act(
        y, f, filter_padding, False, float(up**2), d, noise, bias, *tail, next_styles, contiguous
    )


_modulated_conv2d = define(
    "modulated_conv2d(Tensor x, Tensor weight, Tensor styles, Tensor? noise, int up, int down, int[] padding,"
    " Tensor? resample_filter, bool demodulate, bool flip_weight, Tensor? bias, str act, float? alpha,"
    " float? act_gain, float? clamp) -> Tensor",
    reference=modulated_conv2d_reference,
    kernel=_fused,
)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | list[int] = 0,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
    flip_weight: bool = True,
    bias: Tensor | None = None,
    act: str = "linear",
    alpha: float | None = None,
    act_gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """Scale channels by styles, convolve and resample, normalise, add noise and bias, activate.

    y[n] = conv2d_resample(x[n] * styles[n], weight);  out = clamp(act(y d + noise + bias) * act_gain), with
    d[n,o] = rsqrt(sum((weight[o] * styles[n])^2) + 1e-8) if demodulate else 1.
    x:         [N, I, H, W]; everything is taken in its dtype, and x in autocast's
    weight:    [O, I, kh, kw]
    styles:    [N, I]
    noise:     broadcastable to the output; None: none
    up, down, padding, resample_filter, flip_weight: as for conv2d_resample; resample_filter is its f
    demodulate: normalise by d
    bias:      [O]; None: none
    act, alpha, act_gain, clamp: as for bias_act; act_gain is its gain
    Returns:   [N, O, H', W'] as conv2d_resample. On a CPU channels_last is fast; other layouts are converted
               to it and back.
    Raises:    ValueError on shapes and values, TypeError on dtypes.
    Precision: d in float32 (float64 for float64); 16-bit sums cannot overflow where demodulate is set;
               twice differentiable in x, weight, styles, noise and bias.
    Source:    Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN", sec. 2.2.
    """
    op = "modulated_conv2d"
    padding = check_resample(
        op, x, weight, resample_filter, up, down, padding, names=("weight", "resample_filter")
    )
    require_shape(op, "styles", styles, [x.shape[0], x.shape[1]], "N I")
    check_act(op, act, alpha, act_gain, clamp, names=("alpha", "act_gain"))
    require_same_device(op, x=x, styles=styles, noise=noise, bias=bias)
    if bias is not None:
        require_shape(op, "bias", bias, [weight.shape[0]], "O")
    if noise is not None:
        require_tensor(op, "noise", noise)
        fh, fw = (1, 1) if resample_filter is None else (resample_filter.shape[0], resample_filter.shape[-1])
        shape = [x.shape[0], weight.shape[0]]
        for size, pad, k, f in (
            (x.shape[2], padding[2:], weight.shape[2], fh),
            (x.shape[3], padding[:2], weight.shape[3], fw),
        ):
            shape.append((size * up + sum(pad) - (f - 1) * ((up > 1) + (down > 1)) - k) // down + 1)
        fits = noise.ndim <= 4 and all(
            n in (1, m) for n, m in zip(reversed(noise.shape), reversed(shape), strict=False)
        )
        require(fits, op, "noise must be broadcastable to the output {}, got {}", shape, noise.shape)
    return call_autocast(
        _modulated_conv2d, x, weight, styles, noise, up, down, padding, resample_filter, bool(demodulate),
        bool(flip_weight), bias, act, alpha, act_gain, clamp,
    )  # fmt: skip


def takes_modulated(x: Tensor, pixels: int, weight: Tensor) -> bool:
    """Should what makes an input like x, but of so many pixels, also multiply it by the next layer's styles?

    So it is in inference where modulated_conv2d would do that in a pass of its own.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or choice() == "reference":
        return False
    short = x.dtype in (torch.float32, torch.bfloat16) and weight.dtype != torch.float64
    plain = _runs_kernels(x) and not torch.is_autocast_enabled(x.device.type)
    return plain and short and x.shape[0] > 1 and not _has_styled(x.shape[0] * pixels, x, weight)


def modulated_conv2d_chained(
    x, weight, styles, *, noise, up, padding, resample_filter, flip_weight, bias, act, clamp, modulated,
    next_styles,
) -> Tensor:  # fmt: skip
    """modulated_conv2d, of an x that is multiplied by the styles already where it is `modulated`, as
    takes_modulated said; and the result times next_styles [N, O], if not None."""
    padding = check_resample("modulated_conv2d", x, weight, resample_filter, up, 1, padding)
    return _fused(
        x, weight, styles, noise, up, 1, padding, resample_filter, True, flip_weight, bias, act, None, None,
        clamp, modulated=modulated, next_styles=next_styles,
    )  # fmt: skip
