"""The ops at the shapes of EG3D's largest layers, beside plain PyTorch and its compilation.

Every case first compares a small result with the reference in float64, and its own with plain PyTorch's in
the same dtype; a wrong result is not timed. A row says how many bytes the op has to move at least (each input
and output once) and how many FLOP it takes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import DEVICE, DTYPES, ROUTES, on_route, scaled

from fastgen import ops
from fastgen.ops._define import wide_dtype
from fastgen.ops.filtered_bias_act import filtered_bias_act

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
F4 = ops.setup_filter([1, 3, 3, 1])


@dataclass(frozen=True)
class Case:
    """run(x, b, f, w, s): images x [batch, channels, size, size], and what else they need."""

    name: str
    channels: int
    size: int
    run: Callable
    flop: float  # for each element of the result
    outputs: int = 0  # of the 3x3 weight; 0: none
    f: torch.Tensor = F4
    batch: int = 1


def low_pass(taps: int) -> torch.Tensor:
    """Half the band, by a Kaiser window."""
    window = torch.kaiser_window(taps, periodic=False, beta=6.0)
    return ops.setup_filter(window * torch.sinc((torch.arange(taps) - (taps - 1) / 2) / 2))


def filtered_lrelu(x, b, f, w, s):
    """At twice the size, which comes out as it went in."""
    return ops.filtered_lrelu(x, f, f, b, up=2, down=2, padding=[11, 10, 11, 10], clamp=256)


def post_kernel(x, b, f, w, s):
    """What follows the transposed convolution of an up layer, the styles of the next layer included."""
    s = s.to(wide_dtype(x))
    noise = s.new_ones(1, 1, *x.shape[2:])
    act = "lrelu", 0.2, 2**0.5, 256.0
    return filtered_bias_act([x], f, [2, 1, 2, 1], False, 4.0, s, noise, b, *act, s, x.is_contiguous())


def modulated(up: int):
    def run(x, b, f, w, s):
        noise = torch.ones(x.shape[2] * up, x.shape[3] * up, dtype=x.dtype, device=x.device)
        return ops.modulated_conv2d(
            x, w, s, noise, up=up, padding=1, resample_filter=f, flip_weight=up == 1, bias=b, act="lrelu"
        )

    return run


def to_rgb(x, b, f, w, s):
    return ops.modulated_conv2d(x, w[:3, :, :1, :1], s, demodulate=False, bias=b[:3], clamp=256)


def sampled(x, b, f, w, s):
    """A grid that turns the image by a sixth of a circle."""
    turn = torch.tensor([[[0.5, -0.8660254, 0.0], [0.8660254, 0.5, 0.0]]], dtype=x.dtype, device=x.device)
    return ops.grid_sample(x, torch.nn.functional.affine_grid(turn, x.shape, align_corners=False))


CASES = [
    Case("upsample2d", 128, 256, lambda x, b, f, w, s: ops.upsample2d(x, f), 8),
    Case("downsample2d", 128, 512, lambda x, b, f, w, s: ops.downsample2d(x, f), 32),
    Case("filter2d", 128, 512, lambda x, b, f, w, s: ops.filter2d(x, f), 32),
    Case(
        "bias_act_lrelu_clamp",
        128,
        512,
        lambda x, b, f, w, s: ops.bias_act(x, b, act="lrelu", clamp=256),
        5,
    ),
    Case("bias_act_swish", 128, 512, lambda x, b, f, w, s: ops.bias_act(x, b, act="swish"), 12),
    Case("post_kernel", 128, 512, post_kernel, 42),
    # 12 + 24 products up, 24 + 12 down, and 4 activations.
    Case("filtered_lrelu", 64, 128, filtered_lrelu, 164, f=low_pass(12)),
    Case("modulated_conv2d_up2", 256, 256, modulated(2), 2 * 256 * 9 / 4, 128),
    Case("modulated_conv2d", 128, 512, modulated(1), 2 * 128 * 9, 128),
    Case("modulated_conv2d_batch_4", 128, 128, modulated(1), 2 * 128 * 9, 128, batch=4),
    Case("to_rgb", 128, 512, to_rgb, 2 * 128, 128),
    Case(
        "conv2d_resample_down2",
        128,
        256,
        lambda x, b, f, w, s: ops.conv2d_resample(x, w, f, down=2, padding=1),
        2 * 128 * 9 + 32 * 4,
        128,
    ),
    Case("grid_sample", 128, 256, sampled, 8),
    Case("fma", 128, 256, lambda x, b, f, w, s: ops.fma(x, b[:, None, None], x), 2),
]
GRADIENTS = ("upsample2d", "bias_act_lrelu_clamp", "filtered_lrelu", "modulated_conv2d_batch_4")


def require_near(got: torch.Tensor, plain: torch.Tensor):
    """Within what rounding does to a whole result; convolutions of a GPU may be in TF32."""
    exactly = got.dtype == torch.float32
    allowed = (5e-3 if got.is_cuda else 1e-4) if exactly else 2e-2
    error = (got.float() - plain.float()).norm() / plain.float().norm()
    assert error <= allowed, f"wrong by {error:.2g} at full size, not timed"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_op(measure, case, dtype, layout, route):
    torch.manual_seed(0)
    kind = DTYPES[dtype]

    def inputs(channels, outputs, size):
        x = torch.randn(case.batch, channels, size, size, device=DEVICE)
        x = x.to(kind, memory_format=LAYOUTS[layout])
        w, s = torch.randn(max(1, outputs), channels, 3, 3), torch.randn(case.batch, channels) + 1
        return x, *(t.to(DEVICE, kind) for t in (torch.randn(outputs or channels), case.f, w, s))

    run = on_route(route, case.run)
    small = inputs(32, 32 if case.outputs else 0, scaled(64))
    exact = on_route("pytorch", case.run)(*(t.double() for t in small))
    same = on_route("pytorch", case.run)(*small)
    eps = torch.finfo(kind).eps
    allowed = 4 * eps * exact.abs().max() + 2 * (same.double() - exact).abs().max()
    assert (run(*small).double() - exact).abs().max() <= allowed, "wrong result, not timed"

    full = inputs(scaled(case.channels), case.outputs, scaled(case.size))
    result = run(*full)
    require_near(result, on_route("pytorch", case.run)(*full))
    weights = full[3].nbytes if case.outputs else 0
    measure(
        lambda: run(*full),
        7,
        op=case.name,
        shape="x".join(map(str, full[0].shape)) + (f" to {case.outputs}" if case.outputs else ""),
        dtype=dtype,
        layout=layout,
        route=route,
        bytes=full[0].nbytes + result.nbytes + weights,
        flop=case.flop * result.numel(),
    )


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient(measure, name, route):
    """Of the image, bias, weight and styles, where there are any: three times the FLOP of the result."""
    case = next(case for case in CASES if case.name == name)

    def inputs(size, dtype=torch.float32):
        torch.manual_seed(0)
        x = torch.randn(case.batch, case.channels, size, size)
        w, s = (
            torch.randn(max(1, case.outputs), case.channels, 3, 3),
            torch.randn(case.batch, case.channels) + 1,
        )
        return [t.to(DEVICE, dtype) for t in (x, torch.randn(case.outputs or case.channels), case.f, w, s)]

    def gradients(route, x, b, f, w, s):
        variables = [x, b, w, s] if case.outputs else [x, b]
        run = on_route(route, lambda x, b, w=w, s=s: case.run(x, b, f, w, s))
        result = run(*(t.requires_grad_() for t in variables))
        dy = torch.ones_like(result)
        options = {"retain_graph": True, "allow_unused": True}
        return result, lambda: torch.autograd.grad(result, variables, dy, **options)

    small = inputs(scaled(32))
    for got, exact in zip(
        gradients(route, *small)[1](), gradients("pytorch", *(t.double() for t in small))[1](), strict=True
    ):
        if exact is not None:
            error = (got.double() - exact).abs().max() / exact.abs().max()
            assert error <= 1e-4, "wrong result, not timed"
    full = inputs(scaled(case.size))
    result, timed = gradients(route, *full)
    for got, plain in zip(timed(), gradients("pytorch", *full)[1](), strict=True):
        if plain is not None:
            require_near(got, plain)
    measure(
        timed,
        5,
        op=f"{name}_gradient",
        shape="x".join(map(str, full[0].shape)) + (f" to {case.outputs}" if case.outputs else ""),
        dtype="float32",
        route=route,
        bytes=2 * (full[0].nbytes + result.nbytes),
        flop=3 * case.flop * result.numel(),
    )
