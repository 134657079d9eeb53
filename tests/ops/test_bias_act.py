"""bias_act: every activation, with and without bias and clamp, in every place of the channel."""

import os
import time

import pytest
import torch
from ops.checks import Case, OpChecks

from fastgen import _backends, ops
from fastgen.ops.bias_act import _VALUE, DEFAULTS


def case(name, x, b=None, **params):
    return Case(name, {"x": x, "b": b}, params)


class TestBiasAct(OpChecks):
    op = ops.bias_act
    stops_nan = True  # a clamp has no slope at NaN; plain PyTorch multiplies that 0 by the activation's NaN
    cases = [
        case("swish_small", (2, 3, 4, 5), (3,), act="swish", gain=1.5, clamp=0.8),
        case("lrelu_slope", (2, 6, 5, 7), (6,), act="lrelu", alpha=0.1),
        case("relu_without_slope", (2, 6, 5, 7), (6,), act="relu", alpha=0.5),
        *(case(act, (2, 6, 5, 7), (6,), act=act) for act in DEFAULTS),
        *(case(f"{act}_clamp", (2, 70), (70,), act=act, gain=0.5, clamp=0.4) for act in DEFAULTS),
        case("no_bias", (2, 3, 4), act="selu", gain=-2.0),
        case("last_dim", (2, 5, 9), (9,), dim=-1, act="elu"),
        case("first_dim", (2, 5), (2,), dim=0, act="softplus", clamp=0.0),
        case("long_rows", (2, 2, 3000), (2,), act="sigmoid"),
        case("one_dim", (1500,), (1500,), dim=0, act="tanh"),
        case("five_dims", (2, 3, 2, 1, 2), (3,), act="relu"),
        case("saturated", lambda: torch.linspace(-60, 60, 42).view(2, 21), (21,), act="softplus"),
        case("saturated_swish", lambda: torch.linspace(-120, 120, 42).view(2, 21), (21,), act="swish"),
    ]
    errors = [
        ({"x": None}, TypeError, "bias_act: x must be a tensor, got NoneType"),
        (
            {"x": torch.zeros(2, 3, dtype=torch.int64)},
            TypeError,
            "bias_act: x must be float32 or bfloat16 or float16 or float64, got int64",
        ),
        ({"b": torch.zeros(4)}, ValueError, "bias_act: b must have 3 elements, as x has along dim 1, got 4"),
        (
            {"b": torch.zeros(3, 1)},
            ValueError,
            "bias_act: b must have 1 dimension [x.shape[dim]], got 2 ([3, 1])",
        ),
        ({"dim": 4}, ValueError, "bias_act: dim must be one of the 4 of x, got 4"),
        (
            {"act": "gelu"},
            ValueError,
            "bias_act: act must be one of linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus, swish, "
            "got 'gelu'",
        ),
        (
            {"act": ["lrelu"]},
            ValueError,
            "bias_act: act must be one of linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus, swish, "
            "got ['lrelu']",
        ),
        ({"gain": "a"}, ValueError, "bias_act: gain must be a number, got 'a'"),
        ({"alpha": [1]}, ValueError, "bias_act: alpha must be a number, got [1]"),
        ({"clamp": "a"}, ValueError, "bias_act: clamp must be a number, got 'a'"),
        ({"dim": 1.0}, ValueError, "bias_act: dim must be one of the 4 of x, got 1.0"),
        ({"b": [1.0, 2.0, 3.0]}, TypeError, "bias_act: b must be a tensor, got list"),
        ({"clamp": -1}, ValueError, "bias_act: clamp must be at least 0, got -1"),
        ({"clamp": float("nan")}, ValueError, "bias_act: clamp must be at least 0, got nan"),
        ({"b": torch.zeros(3, device="meta")}, ValueError, "bias_act: b must be on cpu like x, got meta"),
    ]

    def emptied(self, case, inputs):
        if case.params.get("dim") == 0:
            inputs["b"] = inputs["b"].detach()[:0].requires_grad_()
        return super().emptied(case, inputs)

    @pytest.mark.parametrize("x_dim, b_dim", [(None, 0), (0, None), (0, 0), (2, None), (2, 0)])
    def test_vmap(self, device, x_dim, b_dim):
        x = torch.randn(2, 3, 4, device=device) if x_dim is None else torch.randn(5, 2, 3, 4, device=device)
        b = torch.randn(3, device=device) if b_dim is None else torch.randn(5, 3, device=device)

        def function(x, b):
            return ops.bias_act(x, b, act="swish", clamp=0.5)

        want = [function(x if x_dim is None else x[i], b if b_dim is None else b[i]) for i in range(5)]
        mapped = x if x_dim is None else x.movedim(0, x_dim)
        got = torch.func.vmap(function, in_dims=(x_dim, b_dim))(mapped, b)
        torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize("act, slope", [("relu", 0.0), ("lrelu", 0.2), ("elu", 1.0), ("selu", 1.75809934)])
def test_slope_at_zero_is_the_one_from_below(act, slope, device):
    x = torch.tensor([-0.0, 0.0], device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.bias_act(x, act=act, gain=1).sum(), x)
    torch.testing.assert_close(dx, torch.full_like(dx, slope))


def test_bias_in_another_dtype_is_converted(device):
    x = torch.randn(2, 3, device=device, dtype=torch.bfloat16)
    b = torch.randn(3, device=device, requires_grad=True)
    out = ops.bias_act(x, b)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert b.grad.dtype == torch.float32 and b.grad.tolist() == [2, 2, 2]


def test_an_identity_is_a_copy(device):
    x = torch.randn(2, 3, device=device)
    out = ops.bias_act(x)
    assert out.data_ptr() != x.data_ptr() and torch.equal(out, x)


def test_a_linear_op_keeps_no_activations(device):
    x, kept = torch.randn(2, 3, device=device, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        ops.bias_act(x, torch.zeros(3, device=device), gain=2)
    assert all(k is None or k.shape != x.shape for k in kept)


@pytest.mark.parametrize("act", DEFAULTS)
def test_third_and_fourth_derivatives(act, device):
    def derivatives(run):
        x = torch.linspace(-3, 3, 8, dtype=torch.float64, device=device).view(2, 4).requires_grad_()
        b = torch.linspace(-1, 1, 4, dtype=torch.float64, device=device).requires_grad_()
        found = [run(x, b)]
        for _ in range(4):
            grads = torch.autograd.grad(found[-1].square().sum(), (x, b), create_graph=True)
            found.append(sum(grad.sum() for grad in grads))
        return found

    want = derivatives(lambda x, b: _VALUE[act](x + b, 0.2).clamp(-2.5, 2.5))
    got = derivatives(lambda x, b: ops.bias_act(x, b, act=act, alpha=0.2, gain=1, clamp=2.5))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("clamp", [0, 2, torch.inf])
def test_the_bounds_of_the_clamp_count_as_clamped(clamp, device):
    x = torch.tensor([-clamp, -1.0, 1.0, clamp], device=device, requires_grad=True)
    out = ops.bias_act(x, clamp=clamp)
    assert out.tolist() == x.clamp(-clamp, clamp).tolist()
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(x))
    assert dx.tolist() == [0, clamp > 0, clamp > 0, 0]


@pytest.mark.parametrize("act, slope", [("relu", 1.0), ("lrelu", 0.2)])
def test_slope_at_nan_is_torchs(act, slope, device):
    x = torch.full((3,), torch.nan, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.bias_act(x, act=act, gain=1), x, torch.ones_like(x))
    torch.testing.assert_close(dx, torch.full_like(dx, slope))


@pytest.mark.skipif(
    "san" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer's build is for one processor"
)
@pytest.mark.skipif(not _backends.status()["cpu"][0], reason="no C++ library")
@pytest.mark.parametrize("act, plain", [("swish", "silu"), ("lrelu", "leaky_relu"), ("softplus", "softplus")])
def test_is_compiled_for_this_processor(act, plain):
    """One that is not inlined into its clones takes ten times as long, and is right all the same."""

    def least(call):
        times = []
        for _ in range(15):
            start = time.thread_time()
            call()
            times.append(time.thread_time() - start)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x, function = torch.randn(1, 32, 64, 64), getattr(torch.nn.functional, plain)
        assert least(lambda: ops.bias_act(x, act=act)) < 4 * least(lambda: function(x))
    finally:
        torch.set_num_threads(threads)
