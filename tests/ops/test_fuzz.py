"""Random calls of every op: what serves by default against the reference in float64.

FASTGEN_FUZZ is how many calls of each op; where it is not set, they are the same in every run. A call is
judged by one draw of its numbers, and where that fails, by 32 others together, with 8 times the reference's
error. For now and then the reference happens to be exact; rounding decides on which side of a corner of the
activation a number lies; and of a sum that cancels, such as the gradient of a demodulated weight, two orders
differ several times more from each other than one does from the exact result. What is wrong fails both times.
"""

import functools
import os

import pytest
import torch
from accuracy import assert_accurate
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from ops.checks import DTYPES, exact_copy
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

import fastgen
from fastgen import ops
from fastgen.ops._dispatch import choice
from fastgen.ops.bias_act import DEFAULTS
from fastgen.ops.conv3x3 import conv3x3

CALLS = os.environ.get("FASTGEN_FUZZ")
# FASTGEN_BACKEND=triton holds Triton's kernels to the same.
SERVED = choice()
LAYOUTS = ("contiguous", "channels_last", "strided", "transposed", "reversed", "expanded", "offset")
DENSE = LAYOUTS[:3]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def fuzz(test):
    """Gives `test(draw)` many draws."""

    @settings(
        max_examples=int(CALLS or 25),
        derandomize=not CALLS,
        phases=[Phase.generate, *[Phase.shrink] * bool(CALLS)],
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def test_many(data, poisoned, threads):
        test(data.draw)

    return test_many


def integer(draw, low, high):
    return draw(st.integers(low, high))


def size(draw):
    return integer(draw, 1, 7) if integer(draw, 0, 3) else integer(draw, 1, 35)


def channels(draw):
    return integer(draw, 1, 6) if integer(draw, 0, 2) else integer(draw, 1, 40)


def one_of(draw, *values):
    return draw(st.sampled_from(values))


def lay_out(x, layout):
    """x in another place of memory; "expanded" repeats its first row."""
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "transposed" and x.ndim > 1:
        return x.mT.contiguous().mT
    if layout == "reversed":
        axes = list(range(x.ndim))[::-1]
        return x.permute(axes).contiguous().permute(axes)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "offset":
        return torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape)
    return x


def tensor(draw, *shape, dtype, layouts=LAYOUTS, scale=1.0, bad=False, fixed=False):
    """A function from a generator to such a tensor; with a few numbers that are not finite if bad says so."""
    layout = one_of(draw, *layouts)
    planted = one_of(draw, *[()] * 5, (torch.nan,), (torch.inf,), (-torch.inf, torch.nan)) if bad else ()

    def make(random):
        x = torch.randn(shape, generator=random) * scale
        for value in planted * (x.numel() > 0):
            x.view(-1)[torch.randint(x.numel(), (), generator=random)] = value
        x = lay_out(x.to(dtype), layout).detach()
        return x if fixed else x.requires_grad_()

    return make


def fir(draw, dtype, most=9):
    """None, or a function that makes taps: one axis, two, or two of rank one; zeros among them."""
    kind = one_of(draw, "none", "taps", "whole", "rank one")
    rows, columns = integer(draw, 1, most), integer(draw, 1, most)
    if kind == "none":
        return None, (1, 1)
    shape = (columns,) if kind == "taps" else (rows, columns)
    plain = tensor(draw, *shape, dtype=dtype, layouts=("contiguous", "strided", "transposed"), fixed=True)
    zero = one_of(draw, False, True)

    def make(random):
        f = plain(random)
        f = f[:, :1] * f[:1] if kind == "rank one" else f
        if zero:
            f[(0,) * f.ndim] = 0
        return f

    return make, (shape[0], shape[-1])


def padding(draw, sizes, need):
    """[x0, x1, y0, y1] that makes of sizes [x, y] at least what is needed."""
    found = []
    for size, least in zip(sizes, need, strict=True):
        before = integer(draw, -9, 12) if integer(draw, 0, 19) else 70
        after = max(integer(draw, -9, 12), least - size - before)
        found += [before, after]
    return found


def is_double(x):
    return x is not None and x.dtype == torch.float64


def generator(seed, name):
    return torch.Generator().manual_seed(seed + 1000 * sum(name.encode()))


def run(op, inputs, params):
    """The results by name, and the gradients of a number that depends on all of them."""
    outs = op(**inputs, **params)
    outs = {"result": outs} if isinstance(outs, torch.Tensor) else outs._asdict()
    dy = [torch.randn(x.shape, generator=generator(0, k), dtype=torch.float64).to(x) for k, x in outs.items()]
    wanted = {k: x for k, x in inputs.items() if x is not None and x.requires_grad}
    grads = torch.autograd.grad([*outs.values()], [*wanted.values()], dy, allow_unused=True)
    return outs, {k: g for k, g in zip(wanted, grads, strict=True) if g is not None}


def three(op, makers, params, seed):
    """What is served, the exact result, the reference in this dtype (float64: in float32); and the inputs."""
    inputs = {k: m(generator(seed, k)) if callable(m) else m for k, m in makers.items()}
    same = {
        k: x.detach().float().requires_grad_(x.requires_grad) if is_double(x) else x
        for k, x in inputs.items()
    }
    results = []
    for numbers, backend in ((inputs, SERVED), (exact_copy(inputs), "reference"), (same, "reference")):
        with fastgen.backend(backend):
            results.append(run(op, numbers, params))
    return results, inputs


def judge(drawn, stops_nan, factor=1):
    """Holds the results of some draws of a call to the tolerance together."""
    (first, *_), inputs = drawn[0]

    def together(part, name):
        got, exact, same = (torch.stack([r[k][part][name].detach() for r, _ in drawn]) for k in range(3))
        # The reference's error in float64 is that in float32, as much smaller as its eps.
        scale = factor * torch.finfo(got.dtype).eps / torch.finfo(same.dtype).eps
        return got, exact, same if scale == 1 else exact + (same.double() - exact) * scale

    for name in first[0]:
        got, exact, same = together(0, name)
        # Sums of 16 bits overflow, and PyTorch's convolutions make NaN of inf times a zero of their padding.
        told = exact.isnan() | (same == exact) | (same.isfinite() & exact.isfinite())
        assert_accurate(got[told], exact[told], same[told], name)
    for name, grad in first[1].items():
        got, exact, same = together(1, name)
        what = f"gradient of {name}"
        assert grad.dtype == inputs[name].dtype, what
        # As for test_not_finite of checks.py.
        own = ~torch.stack([made[name].detach().isfinite() for _, made in drawn])
        assert not (got.isnan() & ~exact.isnan() & ~same.isnan() & ~own).any(), f"NaN in the {what}"
        assert stops_nan or not (exact.isnan() & ~got.isnan() & ~own).any(), f"no NaN in the {what}"
        told = exact.isfinite() & got.isfinite() & same.isfinite() & ~own
        assert_accurate(got[told], exact[told], same[told], what)


def layout(x):
    strides = [x.stride(i) for i in range(x.ndim) if x.shape[i] > 1 and x.numel()]
    return x.shape, x.dtype, strides


def check(draw, op, makers, params, stops_nan=False):
    seed = integer(draw, 0, 2**20)
    # Beside other work on the cores, threads that wait for each other cost small calls a thousandfold.
    torch.set_num_threads(one_of(draw, 1, 1, 1, 2))
    drawn = three(op, makers, params, seed)
    ((outs, grads), _, (same_outs, same_grads)), inputs = drawn
    assert [x.shape for x in outs.values()] == [x.shape for x in same_outs.values()]
    assert grads.keys() == same_grads.keys()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = op(**{k: x if x is None else mode.from_tensor(x) for k, x in inputs.items()}, **params)
    for made, told in zip(outs.values(), pytree.tree_leaves(fake), strict=True):
        # PyTorch's own addcmul may lay out its result otherwise than its fake says.
        assert layout(made) == layout(told) or op is ops.fma
    try:
        judge([drawn], stops_nan)
    except AssertionError as error:
        event(f"judged by 32 draws: {str(error)[:60]}")
        judge([three(op, makers, params, seed + 1 + i) for i in range(32)], stops_nan, 8)


def may_stop_nan(clamp, act="lrelu", **_):
    # A clamp has no slope at NaN; torch's elu has 1 or NaN there, by where in a vector the number is.
    return clamp is not None or act in ("elu", "selu")


def draw_clamp(draw):
    return one_of(draw, None, None, 0, 0.3, 1.0, 256.0, torch.inf)


@fuzz
def test_upfirdn2d(draw):
    dtype = one_of(draw, *DTYPES)
    n, c, h, w = integer(draw, 0, 3), channels(draw), size(draw), size(draw)
    up, down = ([integer(draw, 1, 4), integer(draw, 1, 4)] for _ in range(2))
    f, (fh, fw) = fir(draw, one_of(draw, torch.float32, dtype))
    makers = {"x": tensor(draw, n, c, h, w, dtype=dtype, bad=True), "f": f}
    params = {
        "up": up,
        "down": down,
        "padding": padding(draw, (w * up[0], h * up[1]), (fw, fh)),
        "flip_filter": one_of(draw, False, True),
        "gain": one_of(draw, 1, 2.5, -0.3, 0),
    }
    check(draw, ops.upfirdn2d, makers, params)


@fuzz
def test_bias_act(draw):
    dtype = one_of(draw, *DTYPES)
    shape = [integer(draw, 0, 3), *(one_of(draw, 1, 2, 3, 7, 40) for _ in range(integer(draw, 0, 4)))]
    if integer(draw, 0, 4) == 0:
        shape[-1] = integer(draw, 1000, 2100)
    dim = integer(draw, -len(shape), len(shape) - 1)
    # The gradient of a bias in float32 is as coarse as x, which the tolerance can't know.
    kind = one_of(draw, dtype, dtype, torch.float32)
    b = tensor(draw, shape[dim], dtype=kind, fixed=kind != dtype) if one_of(draw, True, False) else None
    act = one_of(draw, *DEFAULTS)
    x = tensor(draw, *shape, dtype=dtype, scale=one_of(draw, 1.0, 0.01, 30.0), bad=True)
    params = {
        "dim": dim,
        "act": act,
        "alpha": one_of(draw, None, 0.1, -0.5, 0),
        "gain": one_of(draw, None, 1, 0.7, -2.0),
        "clamp": draw_clamp(draw),
    }
    check(draw, ops.bias_act, {"x": x, "b": b}, params, stops_nan=may_stop_nan(**params))


@fuzz
def test_filtered_lrelu(draw):
    dtype = one_of(draw, *DTYPES)
    n, c, h, w = integer(draw, 0, 3), channels(draw), size(draw), size(draw)
    up, down = integer(draw, 1, 4), integer(draw, 1, 4)
    (fu, (uh, uw)), (fd, (dh, dw)) = (fir(draw, torch.float32, 12) for _ in range(2))
    makers = {
        "x": tensor(draw, n, c, h, w, dtype=dtype, bad=True),
        "fu": fu,
        "fd": fd,
        "b": tensor(draw, c, dtype=dtype) if one_of(draw, True, False) else None,
    }
    params = {
        "up": up,
        "down": down,
        "padding": padding(draw, (w * up, h * up), (uw + dw - 1, uh + dh - 1)),
        "gain": one_of(draw, 2**0.5, 1.0),
        "slope": one_of(draw, 0.2, 0.0, 1.0),
        "clamp": draw_clamp(draw),
        "flip_filter": one_of(draw, False, True),
    }
    check(draw, ops.filtered_lrelu, makers, params, stops_nan=may_stop_nan(**params))


def resampling(draw, dtype, groups, i, o):
    """Batch size, (x, weight, filter) and parameters of a resampling convolution."""
    n, h, w = integer(draw, 0, 3), size(draw), size(draw)
    if dtype == torch.bfloat16:
        # There oneDNN's convolutions with a stride return garbage where what they stride over is a pixel wide
        # (torch 2.14 with AMX: F.conv2d, and the gradient of F.conv_transpose2d).
        w += 10
    kh, kw = one_of(draw, (1, 1), (3, 3), (integer(draw, 1, 4), integer(draw, 1, 4)))
    up, down = one_of(draw, (1, 1), (2, 1), (1, 2), (integer(draw, 1, 4), integer(draw, 1, 4)))
    f, _ = fir(draw, torch.float32, 6)
    pads = padding(draw, (w * up, h * up), (kw + down - 1, kh + down - 1))
    makers = (
        tensor(draw, n, groups * i, h, w, dtype=dtype, bad=True),
        tensor(draw, o, i, kh, kw, dtype=dtype, scale=(i * kh * kw) ** -0.5, layouts=DENSE),
        f,
    )
    params = {"up": up, "down": down, "padding": pads, "flip_weight": one_of(draw, True, False)}
    return n, makers, params


@fuzz
def test_conv2d_resample(draw):
    dtype = one_of(draw, *DTYPES)
    groups, i, o = one_of(draw, 1, 1, 2, 3), integer(draw, 1, 20), integer(draw, 1, 13)
    _, (x, w, f), params = resampling(draw, dtype, groups, i, groups * o)
    params |= {"groups": groups, "flip_filter": one_of(draw, False, True)}
    check(draw, ops.conv2d_resample, {"x": x, "w": w, "f": f}, params)


@fuzz
def test_conv3x3(draw):
    wide = one_of(draw, True, False)
    i, o = (integer(draw, 1, 70) if wide else channels(draw) for _ in range(2))
    n, h, w = integer(draw, 0, 3), integer(draw, 1, 21), integer(draw, 1, 21)
    makers = {
        "x": tensor(draw, n, i, h, w, dtype=torch.float32),
        "weight": tensor(draw, o, i, 3, 3, dtype=torch.float32),
    }
    # An infinity in x makes NaN of infinity minus infinity, or of zero times it, where PyTorch's sums do.
    check(draw, conv3x3, makers, {}, stops_nan=True)


@fuzz
def test_modulated_conv2d(draw):
    dtype = one_of(draw, *DTYPES)
    i, o = channels(draw), channels(draw)
    n, (x, weight, f), params = resampling(draw, dtype, 1, i, o)
    act = one_of(draw, *DEFAULTS)
    params |= {
        "demodulate": one_of(draw, True, False),
        "act": act,
        "alpha": one_of(draw, None, 0.1),
        "act_gain": one_of(draw, None, 0.7),
        "clamp": draw_clamp(draw),
    }
    makers = {
        "x": x,
        "weight": weight,
        "styles": tensor(draw, n, i, dtype=dtype),
        "resample_filter": f,
        "bias": tensor(draw, o, dtype=dtype) if one_of(draw, True, False) else None,
    }
    if one_of(draw, True, False):
        made = {k: m(generator(0, k)) if callable(m) else m for k, m in makers.items()}
        with torch.no_grad():
            shape = ops.modulated_conv2d(**made, **params).shape
        kept = [one_of(draw, 1, size) for size in shape]
        makers["noise"] = tensor(draw, *kept[integer(draw, 0, 3) :], dtype=dtype)
    check(draw, ops.modulated_conv2d, makers, params, stops_nan=may_stop_nan(**params))


@fuzz
def test_grid_sample(draw):
    dtype = one_of(draw, *DTYPES)
    n, c, h, w = integer(draw, 0, 3), channels(draw), size(draw), size(draw)
    shape = n, integer(draw, 0, 9), integer(draw, 1, 9), 2
    grid = tensor(draw, *shape, dtype=one_of(draw, dtype, torch.float32), scale=one_of(draw, 0.5, 2.0))
    check(draw, ops.grid_sample, {"x": tensor(draw, n, c, h, w, dtype=dtype, bad=True), "grid": grid}, {})


@fuzz
def test_sample_triplane(draw):
    dtype = one_of(draw, *DTYPES)
    n, c, h, w = integer(draw, 0, 3), channels(draw), size(draw), size(draw)
    kind = dtype if dtype == torch.float64 else one_of(draw, dtype, torch.float32)
    points = tensor(draw, n, integer(draw, 0, 40), 3, dtype=kind, scale=one_of(draw, 0.3, 2.0))
    params = {
        "box_warp": one_of(draw, 1.0, 0.5, 1.7),
        "plane_axes": one_of(draw, "eg3d", "fixed", [[[1.0, 0.5, 0], [0, 2, 0], [0.3, 0, 1]]] * 3),
        "reduce": one_of(draw, None, "mean"),
    }
    planes = tensor(draw, n, 3, c, h, w, dtype=dtype, bad=True)
    check(draw, ops.sample_triplane, {"planes": planes, "coordinates": points}, params)


def render(planes, w1, b1, w2, b2, ray_origins, ray_directions, u_coarse, u_fine, options):
    decoder = w1, b1, w2, b2
    return ops.render_triplane(planes, decoder, ray_origins, ray_directions, options, u_coarse, u_fine)


@fuzz
def test_render_triplane(draw):
    # Importance sampling is ill-conditioned in float32: there it is a single pass.
    dtype = one_of(draw, *DTYPES, torch.float64)
    fine = integer(draw, 0, 20) if dtype == torch.float64 else 0
    samples = integer(draw, 4 if fine else 2, 25)
    n, r, f, d, c = integer(draw, 0, 2), integer(draw, 0, 20), *(integer(draw, 1, 40) for _ in range(3))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    auto = one_of(draw, False, True)
    options = {
        "ray_start": "auto" if auto else 0.7,
        "ray_end": "auto" if auto else 2.3,
        "depth_resolution": samples,
        "depth_resolution_importance": fine,
        "box_warp": one_of(draw, 1.0, 2.4),
        "white_back": one_of(draw, False, True),
        "plane_axes": one_of(draw, "eg3d", "fixed"),
    }
    directions = tensor(draw, n, r, 3, dtype=wide, scale=0.3, fixed=True)
    shift = torch.tensor([0.0, 0.0, 1.5])

    def uniform(*shape):
        return lambda random: torch.rand(shape, generator=random, dtype=wide)

    # Depths are divided by weights, which is ill-conditioned where a ray meets almost nothing.
    last, density = tensor(draw, 1 + c, dtype=dtype), torch.tensor([3.0] + [0.0] * c).to(dtype)
    planes = tensor(draw, n, 3, f, integer(draw, 1, 12), integer(draw, 1, 12), dtype=dtype)
    makers = {
        "planes": planes,
        "w1": tensor(draw, d, f, dtype=dtype, scale=f**-0.5),
        "b1": tensor(draw, d, dtype=dtype),
        "w2": tensor(draw, 1 + c, d, dtype=dtype, scale=2 * d**-0.5),
        "b2": lambda random: (last(random).detach() + density).requires_grad_(),
        "ray_origins": functools.partial(lambda make, random: make(random) + shift.to(wide), directions),
        "ray_directions": lambda random: torch.nn.functional.normalize(
            directions(random) - shift.to(wide), dim=-1
        ),
        "u_coarse": uniform(n, r, samples, 1) if one_of(draw, True, False) else None,
        "u_fine": uniform(n, r, fine) if fine and one_of(draw, True, False) else None,
    }
    check(draw, render, makers, {"options": options})


@fuzz
def test_fma(draw):
    dtype = one_of(draw, *DTYPES)
    shape = [integer(draw, 0, 3), *(integer(draw, 1, 40) for _ in range(integer(draw, 0, 3)))]

    def part(kind, **kwargs):
        kept = [one_of(draw, 1, size) for size in shape][integer(draw, 0, len(shape) - 1) :]
        return tensor(draw, *kept, dtype=kind, **kwargs)

    makers = {"a": part(dtype, bad=True), "b": part(dtype), "c": part(one_of(draw, dtype, torch.float32))}
    check(draw, ops.fma, makers, {})


@fuzz
def test_a_wrong_result_is_found(draw):
    def wrong(x):
        return x * (1 if fastgen.ops._dispatch.choice() == "reference" else 1.1)

    with pytest.raises(AssertionError, match="largest error"):
        check(draw, wrong, {"x": tensor(draw, 3, 2, dtype=one_of(draw, *DTYPES))}, {})
