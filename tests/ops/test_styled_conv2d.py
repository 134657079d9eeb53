"""styled_conv2d: the convolution behind modulated_conv2d on a GPU, its gradients, and what follows it."""

import pytest
import torch
from accuracy import assert_accurate
from ops.checks import Case, OpChecks, exact_copy, gradients

import fastgen
from fastgen.ops.styled_conv2d import styled_conv2d, styled_conv2d_act


def call(x, weight, s, padding=(0, 0, 0, 0), up=1):
    s = s if s is None else s.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return styled_conv2d(x, weight, s, list(padding), up)


call.__name__ = "styled_conv2d"


def case(name, x, w, styles=True, **params):
    return Case(name, {"x": x, "weight": w, "s": x[:2] if styles else None}, params)


class TestStyledConv2d(OpChecks):
    op = call
    keeps_layout = False  # always [N, H, W, C]
    cases = [
        case("layer", (2, 5, 6, 7), (4, 5, 3, 3), padding=(1, 1, 1, 1)),
        case("up", (2, 3, 5, 4), (5, 3, 3, 3), up=2),
        case("plain", (2, 3, 5, 4), (2, 3, 3, 3), False, padding=(1, 1, 1, 1)),
        case("up_plain", (1, 3, 4, 5), (4, 3, 2, 5), False, up=2),
        case("pointwise", (2, 20, 3, 5), (3, 20, 1, 1)),
        case("uneven", (1, 2, 7, 6), (17, 2, 2, 4), padding=(3, -1, 0, 2)),
        case("more_padding_than_taps", (1, 2, 2, 3), (3, 2, 2, 1), padding=(1, 2, 3, 2)),
        case("several_tiles", (2, 33, 7, 9), (35, 33, 3, 3), padding=(1, 1, 1, 1)),
    ]

    def emptied(self, case, inputs):
        return inputs | {
            k: inputs[k].detach()[:0].requires_grad_() for k in ("x", "s") if inputs[k] is not None
        }

    def test_error(self):
        # Its callers check arguments.
        with pytest.raises(RuntimeError):
            styled_conv2d(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 1, 1), None, [0] * 4, 1)

    @pytest.mark.parametrize("enough", [1, 10**6])
    def test_every_tile(self, case, device, enough, monkeypatch, poisoned):
        kernels = pytest.importorskip("fastgen.kernels.styled_conv2d")
        monkeypatch.setattr(kernels, "ENOUGH", enough)
        inputs, exact = case.make(torch.bfloat16, device), exact_copy(case.make(torch.bfloat16, device))
        got, want, same = self.run(case, inputs), self.reference(case, exact), self.reference(case, inputs)
        assert_accurate(got, want, same)
        got, want, same = gradients(got, inputs), gradients(want, exact), gradients(same, inputs)
        for name in got:
            assert_accurate(got[name], want[name], same[name], f"gradient of {name}")


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("noise", [None, (1, 1, 6, 5), (2, 4, 6, 5), (1, 4, 1, 1)])
@pytest.mark.parametrize("act", [("lrelu", 0.2, 1.4, 0.7), ("swish", 0.0, 1.0, -1.0)])
def test_with_what_follows(act, noise, dtype, contiguous, device, poisoned):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight = torch.randn(2, 3, 6, 5).to(device, dtype), torch.randn(4, 3, 3, 3).to(device, dtype)
    s, d = torch.randn(2, 3).to(device, wide), torch.rand(2, 4).to(device, wide)
    noise = None if noise is None else torch.randn(noise).to(device, wide)
    b = None if noise is None else torch.randn(4).to(device, dtype)

    def run(to):
        tensors = [t if t is None else to(t) for t in (x, weight, s, d, noise, b)]
        return styled_conv2d_act(*tensors, [1] * 4, *act, contiguous)

    got = run(lambda t: t)
    with fastgen.backend("reference"):
        same, exact = run(lambda t: t), run(lambda t: t.double())
    assert got.dtype == dtype and got.stride() == same.stride()
    assert_accurate(got, exact, same)
