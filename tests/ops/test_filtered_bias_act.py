"""filtered_bias_act: the op behind modulated_conv2d, on images and on four phases."""

import pytest
import torch
from accuracy import assert_accurate
from ops.checks import Case, OpChecks

from fastgen import ops
from fastgen.ops.filtered_bias_act import filtered_bias_act

F4 = ops.setup_filter([1, 3, 3, 1])
LRELU = ("lrelu", 0.2, 2**0.5, 1.5)


def call(
    x, x01, x10, x11, f, scale, noise, b, next, padding=(0, 0, 0, 0), flip=False, gain=1.0, act=LRELU,
    dense=False,
):  # fmt: skip
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale, noise, next = (t if t is None else t.to(wide) for t in (scale, noise, next))
    images = [x] if x01 is None else [x, x01, x10, x11]
    return filtered_bias_act(images, f, list(padding), flip, gain, scale, noise, b, *act, next, dense)


call.__name__ = "filtered_bias_act"


def case(name, x, f=None, scale=False, noise=None, b=False, next=False, phases=False, **params):
    n, c, h, w = x
    inputs = {"x": x, "x01": None, "x10": None, "x11": None}
    if phases:
        inputs |= {"x01": (n, c, h, w - 1), "x10": (n, c, h - 1, w), "x11": (n, c, h - 1, w - 1)}
    inputs |= {"f": f, "scale": (n, c) if scale else None, "noise": noise, "b": (c,) if b else None}
    inputs["next"] = (n, c) if next else None
    return Case(name, inputs, params, fixed=("f",))


class TestFilteredBiasAct(OpChecks):
    op = call
    keeps_layout = False  # always [N, H, W, C]
    errors = []
    cases = [
        case("layer", (2, 5, 6, 7), scale=True, noise=(1, 1, 6, 7), b=True),
        case("up", (2, 3, 5, 4), F4, True, (2, 1, 8, 6), True, phases=True, padding=(1, 1, 1, 1), gain=4.0),
        case("bias", (1, 4, 3, 3), b=True, act=("linear", 0.0, 1.0, -1.0)),
        case("filter", (1, 17, 9, 5), F4, padding=(2, 1, 1, 2), act=("swish", 0.0, 1.0, -1.0)),
        case("uneven", (2, 3, 6, 7), torch.tensor([[1.0, 2, 0], [0, 1, 3]]), True, (2, 3, 6, 5), True,
             padding=(1, -1, 0, 1), act=("tanh", 0.0, 1.0, -1.0)),
        case("flipped", (1, 2, 5, 5), torch.tensor([1.0, 2, 4, 0.5]), noise=(1, 1, 1, 1), flip=True,
             padding=(-1, 3, 4, 0), act=("lrelu", 0.1, 1.0, -1.0)),
        case("identity", (1, 3, 4, 4), padding=(1, -1, 2, 0), gain=4.0, b=True),
        case("contiguous", (2, 40, 3, 50), F4, True, (2, 1, 4, 51), True, padding=(2, 2, 2, 2), dense=True),
        case("wide", (1, 3, 17, 700), F4, padding=(1, 2, 2, 1), b=True),
        case("many_taps", (1, 2, 5, 6), torch.tensor([1.0, -2, 3, 4, 0.5]), b=True, padding=(2, 2, 1, 3)),
        case("many_channels", (1, 1100, 2, 3), scale=True, b=True),
        case("up_next", (2, 16, 5, 6), F4, True, (1, 1, 8, 10), True, True, phases=True,
             padding=(1, 1, 1, 1), gain=4.0),
        case("layer_next", (3, 24, 4, 5), scale=True, noise=(3, 1, 4, 5), b=True, next=True, dense=True),
        case("packs", (2, 320, 3, 5), torch.tensor([[1.0, 2, 3], [0.5, -1, 1]]) / 8, True, (1, 320, 4, 5),
             True, padding=(2, 0, 1, 1)),
        case("blocks", (2, 24, 30, 37), F4, True, (2, 1, 29, 36), True, padding=(1, 1, 1, 1)),
        case("odd_phases", (1, 8, 5, 4), phases=True, padding=(3, -1, 0, 2), noise=(1, 1, 1, 9), b=True,
             gain=0.5, act=("linear", 0.2, 2.0, 0.5)),
        case("sigmoid_next", (1, 8, 3, 4), b=True, next=True, act=("sigmoid", 0.0, 1.3, -1.0)),
    ]  # fmt: skip

    def emptied(self, case, inputs):
        return {
            k: v.detach()[:0].requires_grad_()
            if k in ("x", "x01", "x10", "x11", "scale", "noise", "next") and v is not None
            else v
            for k, v in inputs.items()
        }

    def test_error(self):
        # Its callers check arguments; it only must not read what is not there.
        x = torch.zeros(1, 2, 3, 3)
        with pytest.raises((RuntimeError, IndexError)):
            filtered_bias_act([x] * 3, None, [0] * 4, False, 1.0, None, None, None, *LRELU, None, False)
        with pytest.raises(RuntimeError):
            filtered_bias_act(
                [x], None, [0] * 4, False, 1.0, None, torch.zeros(1, 1, 4, 4), None, *LRELU, None, False
            )
        with pytest.raises(RuntimeError):
            filtered_bias_act(
                [x], None, [0] * 4, False, 1.0, None, None, None, *LRELU, torch.zeros(1, 3), False
            )


def test_noise_of_one_channel_stays_there(device):
    noise = torch.tensor([torch.inf, 1.0, 2.0]).view(1, 3, 1, 1)
    out = filtered_bias_act(
        [torch.zeros(1, 3, 2, 2)],
        None,
        [0] * 4,
        False,
        1.0,
        None,
        noise,
        None,
        "linear",
        0.0,
        1.0,
        -1.0,
        None,
        False,
    )
    assert torch.equal(out, noise.expand(1, 3, 2, 2))


@pytest.mark.parametrize("grad", [False, True])
def test_modulated_conv2d_runs_on_it(grad, device):
    # With and without phases, against the definition on large images, in both memory layouts.
    x, w, s = torch.randn(2, 8, 33, 20), torch.randn(24, 8, 3, 3), torch.randn(2, 8)
    noise, b = torch.randn(66, 40), torch.randn(24)
    params = {"up": 2, "padding": 1, "flip_weight": False, "act": "lrelu", "clamp": 3}

    def run(dtype):
        tensors = (t.to(dtype, copy=True).requires_grad_(grad) for t in (x, w, s, noise))
        return ops.modulated_conv2d(*tensors, resample_filter=F4, bias=b.to(dtype), **params)

    exact = run(torch.float64)
    assert_accurate(run(torch.float32), exact, exact.float())
