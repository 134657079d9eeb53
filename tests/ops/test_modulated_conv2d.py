"""modulated_conv2d: against a weight for every sample, in every route, and where 16 bits would overflow."""

import pytest
import torch
from accuracy import assert_accurate
from ops.checks import Case, OpChecks

import fastgen
from fastgen import ops
from fastgen.ops.modulated_conv2d import channels_last_reference, modulated_weight_reference

F4 = ops.setup_filter([1, 3, 3, 1])


def case(name, x, w, noise=None, bias=None, f=None, **params):
    inputs = {"x": x, "weight": w, "styles": x[:2], "noise": noise, "bias": bias, "resample_filter": f}
    return Case(name, inputs, params, fixed=("resample_filter",))


def definition(x, weight, styles, noise=None, bias=None, resample_filter=None, demodulate=True, **params):
    """Sample by sample, with its own modulated and demodulated weight."""
    tail = {k: params.pop(k) for k in ("act", "alpha", "clamp") if k in params}
    if "act_gain" in params:
        tail["gain"] = params.pop("act_gain")
    outs = []
    for n in range(x.shape[0]):
        w = weight * styles[n, :, None, None]
        if demodulate:
            w = w / (w.square().sum([1, 2, 3], keepdim=True) + 1e-8).sqrt()
        outs.append(ops.conv2d_resample(x[n : n + 1], w, resample_filter, **params))
    y = torch.cat(outs)
    return ops.bias_act(y if noise is None else y + noise, bias, **tail)


class TestModulatedConv2d(OpChecks):
    op = ops.modulated_conv2d
    keeps_layout = False  # that is up to torch's convolutions
    cases = [
        case("up", (2, 3, 5, 6), (4, 3, 3, 3), (2, 1, 10, 12), (4,), F4, up=2, padding=1, flip_weight=False,
             act="lrelu", clamp=1.5),
        case("up_without_filter", (2, 3, 5, 6), (4, 3, 3, 3), None, (4,), up=2, padding=[1, 0], act="lrelu"),
        case("layer", (3, 3, 6, 5), (4, 3, 3, 3), (6, 5), (4,), padding=1, act="lrelu", act_gain=0.7),
        case("to_rgb", (2, 5, 4, 6), (3, 5, 1, 1), None, (3,), demodulate=False, clamp=0.5),
        case("down", (2, 3, 8, 8), (4, 3, 3, 3), (1, 4, 4, 4), None, F4, down=2, padding=1),
        case("bare", (2, 3, 5, 6), (4, 3, 3, 3)),
        case("noise_only", (2, 3, 5, 6), (4, 3, 2, 2), (4, 1), padding=[1, 0], demodulate=False),
        case("swish", (2, 3, 5, 6), (4, 3, 3, 3), (2, 4, 5, 6), (4,), padding=1, act="swish", alpha=0.3),
        case("one_sample", (1, 3, 5, 6), (4, 3, 3, 3), (1, 1, 5, 6), (4,), padding=1, act="lrelu"),
        case("one_sample_up", (1, 3, 5, 6), (4, 3, 3, 3), None, (4,), F4, up=2, padding=1),
        case("one_sample_few_pixels", (1, 3, 2, 2), (4, 3, 3, 3), None, (4,), padding=1, clamp=1.0),
        case("one_sample_plain", (1, 3, 6, 6), (2, 3, 1, 1), (6, 6), demodulate=False),
    ]  # fmt: skip
    errors = [
        ({"x": None}, TypeError, "modulated_conv2d: x must be a tensor, got NoneType"),
        (
            {"weight": torch.zeros(4, 5, 3, 3)},
            ValueError,
            "modulated_conv2d: x must have 5 channels, got 3",
        ),
        (
            {"styles": torch.zeros(2, 4)},
            ValueError,
            "modulated_conv2d: styles must have shape [N=2, I=3], got [2, 4]",
        ),
        (
            {"styles": torch.zeros(3)},
            ValueError,
            "modulated_conv2d: styles must have 2 dimensions [N, I], got 1 ([3])",
        ),
        (
            {"weight": torch.zeros(0, 3, 3, 3)},
            ValueError,
            "modulated_conv2d: weight must have at least one output and one input channel, got [0, 3, 3, 3]",
        ),
        ({"bias": torch.zeros(3)}, ValueError, "modulated_conv2d: bias must have shape [O=4], got [3]"),
        (
            {"noise": torch.zeros(9, 12)},
            ValueError,
            "modulated_conv2d: noise must be broadcastable to the output [2, 4, 10, 12], got [9, 12]",
        ),
        (
            {"resample_filter": torch.zeros(1, 2, 3)},
            ValueError,
            "modulated_conv2d: resample_filter must have 1 dimension [taps] or 2 dimensions [fh, fw],"
            " got 3 ([1, 2, 3])",
        ),
        ({"noise": 0.5}, TypeError, "modulated_conv2d: noise must be a tensor, got float"),
        ({"bias": [1.0] * 4}, TypeError, "modulated_conv2d: bias must be a tensor, got list"),
        ({"act_gain": "a"}, ValueError, "modulated_conv2d: act_gain must be a number, got 'a'"),
        (
            {"resample_filter": torch.zeros(0)},
            ValueError,
            "modulated_conv2d: resample_filter must have at least one tap, got [0]",
        ),
        (
            {"weight": torch.zeros(4, 3, 3, 0)},
            ValueError,
            "modulated_conv2d: weight must have at least one row and one column, got [4, 3, 3, 0]",
        ),
        ({"clamp": -1}, ValueError, "modulated_conv2d: clamp must be at least 0, got -1"),
        (
            {"act": "gelu"},
            ValueError,
            "modulated_conv2d: act must be one of linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus,"
            " swish, got 'gelu'",
        ),
        (
            {"weight": torch.zeros(4, 3, 3, 3, dtype=torch.int8)},
            TypeError,
            "modulated_conv2d: weight must be float32 or bfloat16 or float16 or float64, got int8",
        ),
        (
            {"noise": torch.zeros(1, device="meta")},
            ValueError,
            "modulated_conv2d: noise must be on cpu like x, got meta",
        ),
    ]

    def emptied(self, case, inputs):
        few = {k: inputs[k].detach()[:0].requires_grad_() for k in ("x", "styles")}
        noise = inputs["noise"]
        if noise is not None and noise.ndim == 4 and noise.shape[0] > 1:
            few["noise"] = noise.detach()[:0].requires_grad_()
        return {**inputs, **few}

    def test_definition(self, case, device):
        inputs = case.make(torch.float64, device)
        assert_accurate(self.run(case, inputs), definition(**inputs, **case.params))

    def test_autocast(self, few, device):
        inputs = few.make(device=device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            out = self.run(few, inputs)
        half = {**inputs, "x": inputs["x"].bfloat16()}
        torch.testing.assert_close(out, self.run(few, half), rtol=0, atol=0)


@pytest.mark.parametrize("samples", [1, 3])
def test_16_bit_sums_do_not_overflow(samples):
    # Sums of products here reach 1e9, and demodulated results 1e4; float16 ends at 65504.
    x, w = 200 * torch.ones(samples, 64, 4, 4), 50 + torch.rand(8, 64, 3, 3)
    styles = 100 + torch.rand(samples, 64)
    got = ops.modulated_conv2d(x.half(), w, styles, padding=1)
    exact = ops.modulated_conv2d(x.double(), w.double(), styles.double(), padding=1)
    # Rounding x s and weight to 11 bits is 3 roundings of 2^-11, and the sums add one more.
    assert got.isfinite().all()
    assert (got - exact).abs().max() <= 4 * 2**-11 * exact.abs().max()


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_outputs_of_weak_channels(dtype, samples, size):
    # The only channel that the output takes has a style of 1e-6 of the largest.
    x, w = torch.ones(samples, 2, size, size, dtype=dtype), torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    styles = torch.tensor([[1000, 1e-3]]).expand(samples, 2)
    got = ops.modulated_conv2d(x, w, styles)
    exact = ops.modulated_conv2d(x.double(), w.double(), styles.double())
    assert_accurate(got, exact)


def test_16_bit_outputs_of_channels_weak_in_one_sample():
    x, w = torch.ones(2, 2, 3, 3).half(), torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    styles = torch.tensor([[1000, 1e-3], [1e-3, 1000]])
    got = ops.modulated_conv2d(x, w, styles)
    exact = ops.modulated_conv2d(x.double(), w.double(), styles.double())
    # x s / max|s| is 1e-6, 17 of the smallest steps of float16: half a step is 3 %.
    assert (got - exact).abs().max() <= 0.03 * exact.abs().max()


def test_16_bit_gradients_do_not_see_the_scaling():
    x, w, styles = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 3, 3), torch.randn(2, 4) + 2
    grads = {}
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [x.to(dtype), *(t.to(dtype) for t in (w, styles))]
        inputs = [t.requires_grad_() for t in inputs]
        out = ops.modulated_conv2d(*inputs, padding=1)
        grads[dtype] = torch.autograd.grad(out.sum(), inputs)
    for got, want in zip(grads[torch.bfloat16], grads[torch.float64], strict=True):
        # A wrong factor would change all by percents of the largest; bfloat16 sums of 100 terms err by 2 %.
        assert (got - want).abs().max() <= 0.03 * want.abs().max()


def test_zero_styles_and_weights_give_zero_in_every_dtype():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        x = torch.randn(2, 3, 4, 4).to(dtype)
        w, s = torch.zeros(4, 3, 3, 3), torch.zeros(2, 3)
        assert not ops.modulated_conv2d(x, w, s + 1, padding=1).any()
        assert not ops.modulated_conv2d(x, w + 1, s, padding=1).any()


@pytest.mark.parametrize("up", [1, 2])
def test_empty_batch_in_16_bits(up, device):
    x, weight, styles = (
        torch.zeros(s, device=device).bfloat16() for s in ((0, 4, 8, 8), (5, 4, 3, 3), (0, 4))
    )
    f = F4.to(device)
    out = ops.modulated_conv2d(x, weight, styles, up=up, padding=1, resample_filter=f)
    assert out.shape == (0, 5, 8 * up, 8 * up) and out.dtype == torch.bfloat16


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("grad", [False, True])
def test_large(grad, up, samples, device):
    # What a GPU leaves to PyTorch's convolutions.
    shapes = (samples, 64, 32, 32), (64, 64, 3, 3), (samples, 64), (32 * up, 32 * up), (64,)
    given = [torch.randn(shape, device=device) for shape in shapes]

    def run(dtype):
        inputs = [t.to(dtype, copy=True).requires_grad_(grad) for t in given]
        params = {"resample_filter": F4.to(device), "padding": 1, "up": up, "act": "lrelu", "clamp": 256}
        out = ops.modulated_conv2d(*inputs[:4], bias=inputs[4], **params)
        return out, torch.autograd.grad(out.square().mean(), inputs) if grad else ()

    out, grads = run(torch.float32)
    with fastgen.backend("reference"):
        (exact, exact_grads), (same, same_grads) = run(torch.float64), run(torch.float32)
    assert_accurate(out, exact, same)
    for got, want, near in zip(grads, exact_grads, same_grads, strict=True):
        assert_accurate(got, want, near)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("up", [1, 2])
def test_vmap(up, samples, device):
    x, styles = torch.randn(3, samples, 32, 9, 9), torch.randn(3, samples, 32)
    weight, bias = torch.randn(32, 32, 3, 3), torch.randn(3, 32)

    def run(x, styles, bias):
        return ops.modulated_conv2d(
            x, weight, styles, up=up, padding=1, resample_filter=F4, bias=bias, act="lrelu"
        )

    got = torch.vmap(run)(x, styles, bias)
    want = torch.stack([run(*each) for each in zip(x, styles, bias, strict=True)])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 2])
def test_functional_derivatives(samples, device):
    x, styles, weight = torch.randn(samples, 5, 6, 6), torch.randn(samples, 5), torch.randn(4, 5, 3, 3)

    def run(*args):
        return ops.modulated_conv2d(*args, padding=1)

    inputs = [t.double() for t in (x, weight, styles)]
    tangents = [torch.randn_like(t) for t in inputs]
    _, got = torch.func.jvp(run, tuple(inputs), tuple(tangents))
    step = 1e-6
    ends = [run(*(t + s * d for t, d in zip(inputs, tangents, strict=True))) for s in (step, -step)]
    torch.testing.assert_close(got, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-6)
    got = torch.func.grad(lambda w: run(inputs[0], w, inputs[2]).square().sum())(inputs[1])
    wanted = inputs[1].requires_grad_()
    (want,) = torch.autograd.grad(run(inputs[0], wanted, inputs[2]).square().sum(), wanted)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("samples", [0, 1, 3])
@pytest.mark.parametrize(
    "flip, phases, channels_last",
    [(False, False, False), (True, False, True), (True, True, False), (False, True, True)],
)
@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_weight(demodulate, flip, phases, channels_last, samples, dtype, device):
    weight, styles = torch.randn(5, 7, 3, 4, device=device), torch.randn(samples, 7, device=device)
    how = demodulate, flip, phases, channels_last
    got = torch.ops.fastgen.modulated_weight(weight, styles, *how, dtype)
    exact = modulated_weight_reference(weight.double(), styles.double(), *how, torch.float64)
    same = modulated_weight_reference(weight, styles, *how, dtype)
    for part, want, near in zip(got, exact, same, strict=True):
        assert (part.dtype, part.stride()) == (near.dtype, near.stride())
        assert_accurate(part, want, near)
    torch.library.opcheck(torch.ops.fastgen.modulated_weight, (weight, styles, *how, dtype))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("up", [1, 2])
@torch.no_grad()
def test_compiled_inference(up, samples):
    torch.compiler.reset()
    x, weight, styles = torch.randn(samples, 32, 9, 9), torch.randn(32, 32, 3, 3), torch.randn(samples, 32)

    def run(x):
        return ops.modulated_conv2d(x, weight, styles, up=up, padding=1, resample_filter=F4, act="lrelu")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scaled", [True, False])
def test_channels_last(scaled, layout, dtype, device):
    x = torch.randn(2, 21, 5, 9, device=device).to(dtype, memory_format=layout)
    scale = torch.randn(2, 21, device=device) if scaled else None
    got = torch.ops.fastgen.channels_last(x, scale)
    assert got.stride() == torch.empty_like(x, memory_format=torch.channels_last).stride()
    assert_accurate(got, channels_last_reference(x.double(), scale), channels_last_reference(x, scale))
    torch.library.opcheck(torch.ops.fastgen.channels_last, (x, scale))


def test_float64_with_a_filter_of_rank_one_in_float32(device):
    # Apart, such a filter is exact to float32's rounding only.
    f = torch.outer(torch.randn(3), torch.randn(3))
    x, w, s = (
        torch.randn(n, dtype=torch.float64, device=device) for n in ((1, 2, 5, 5), (3, 2, 3, 3), (1, 2))
    )
    arguments = {"up": 2, "padding": 2, "resample_filter": f.to(device)}
    got = ops.modulated_conv2d(x, w, s, **arguments)
    with fastgen.backend("reference"):
        assert_accurate(got, ops.modulated_conv2d(x, w, s, **arguments))
