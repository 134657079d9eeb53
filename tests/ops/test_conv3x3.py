"""conv3x3: odd sizes and channel counts, several blocks, and where Winograd's transforms could go wrong."""

import pytest
import torch
from accuracy import assert_accurate
from ops.checks import Case, OpChecks, exact_copy, gradients

from fastgen.ops import _dispatch
from fastgen.ops.conv3x3 import conv3x3, conv3x3_dw_reference, conv3x3_reference


def case(name, x, channels):
    return Case(name, {"x": x, "weight": (channels, x[1], 3, 3)})


class TestConv3x3(OpChecks):
    op = conv3x3
    dtypes = [torch.float32]  # PyTorch serves the others
    cases = [
        case("odd", (2, 5, 7, 9), 3),
        case("even", (1, 16, 6, 4), 32),
        case("many_channels", (1, 70, 9, 8), 100),
        case("blocks", (2, 33, 41, 23), 17),
        case("large", (1, 64, 64, 96), 64),
        case("one_tile", (3, 40, 2, 2), 48),
        case("one_channel", (1, 1, 20, 21), 1),
        case("row", (2, 16, 1, 9), 20),
        case("column", (1, 8, 13, 1), 16),
        case("pixel", (1, 6, 1, 1), 5),
    ]
    errors = [
        ({"x": None}, TypeError, "conv3x3: x must be a tensor, got NoneType"),
        (
            {"x": torch.zeros(5, 7, 9)},
            ValueError,
            "conv3x3: x must have 4 dimensions [N, I, H, W], got 3 ([5, 7, 9])",
        ),
        (
            {"weight": torch.zeros(3, 5, 1)},
            ValueError,
            "conv3x3: weight must have 4 dimensions [O, I, kh, kw], got 3 ([3, 5, 1])",
        ),
        ({"weight": torch.zeros(3, 5, 1, 3)}, ValueError, "conv3x3: weight must be 3x3, got 1x3"),
        (
            {"weight": torch.zeros(3, 4, 3, 3)},
            ValueError,
            "conv3x3: weight must have 5 input channels, as x has, got 4",
        ),
        (
            {"weight": torch.zeros(3, 5, 3, 3, device="meta")},
            ValueError,
            "conv3x3: weight must be on cpu like x, got meta",
        ),
    ]

    def test_second_order(self, case, device, poisoned):
        """In float32, whose formulas gradgradcheck's float64 does not reach."""

        def second(inputs, function):
            first = gradients(function(**inputs), inputs, create_graph=True)
            total = sum((grad * grad).sum() for grad in first.values())
            return dict(zip(inputs, torch.autograd.grad(total, [*inputs.values()]), strict=True))

        inputs = case.make(device=device)
        exact = exact_copy(inputs)
        got, want, same = (
            second(i, f)
            for i, f in ((inputs, conv3x3), (exact, conv3x3_reference), (inputs, conv3x3_reference))
        )
        for name in got:
            assert_accurate(got[name], want[name], same[name], f"second gradient of {name}")


KINDS = {
    "positive": lambda x, weight: (x.relu(), weight.abs()),
    "mean": lambda x, weight: (x + 100, weight),
    "constant": lambda x, weight: (torch.ones_like(x), weight),
    "edges": lambda x, weight: (x + 10, weight - weight.mean([2, 3], keepdim=True)),
    "scales": lambda x, weight: (x * torch.logspace(-3, 3, x.shape[1]).view(1, -1, 1, 1), weight),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("i, o", [(3, 64), (64, 64), (256, 32), (512, 128)])
def test_accuracy_on_other_inputs(kind, i, o):
    x, weight = KINDS[kind](torch.randn(1, i, 16, 16), torch.randn(o, i, 3, 3))
    exact = conv3x3_reference(x.double(), weight.double())
    assert_accurate(conv3x3(x, weight), exact, conv3x3_reference(x, weight))
    dy = torch.randn(1, o, 16, 16) + weight.mean()
    exact, same = conv3x3_dw_reference(dy.double(), x.double()), conv3x3_dw_reference(dy, x)
    assert_accurate(torch.ops.fastgen.conv3x3_dw(dy, x), exact, same)


@pytest.mark.parametrize("shape", [(1, 16, 64, 64), (1, 200, 6, 6), (5, 20, 3, 5)])
def test_threads_agree(shape):
    x, weight, threads = torch.randn(shape), torch.randn(170, shape[1], 3, 3), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 9):
            torch.set_num_threads(count)
            y = conv3x3(x, weight)
            results.append((y, torch.ops.fastgen.conv3x3_dw(y, x)))
    finally:
        torch.set_num_threads(threads)
    for y, dw in results:
        assert torch.equal(y, results[0][0]) and torch.equal(dw, results[0][1])
    y = results[0][0]
    exact, same = conv3x3_dw_reference(y.double(), x.double()), conv3x3_dw_reference(y, x)
    assert_accurate(results[0][1], exact, same)


def test_channels_last_comes_out(device):
    x = torch.randn(2, 3, 4, 5, device=device)
    assert conv3x3(x, x.new_ones(6, 3, 3, 3)).is_contiguous(memory_format=torch.channels_last)


def test_weight_layouts(device):
    x, weight = torch.randn(1, 20, 9, 9, device=device), torch.randn(3, 3, 20, 40, device=device)
    weight = weight.permute(3, 2, 0, 1)
    torch.testing.assert_close(conv3x3(x, weight), conv3x3(x, weight.contiguous()), rtol=0, atol=0)


def test_infinity_stays_where_it_is_under_autocast(device):
    x, weight = torch.randn(1, 8, 9, 9, device=device), torch.rand(4, 8, 3, 3, device=device)
    x[0, 3, 4, 4] = torch.inf
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        out = conv3x3(x, weight)
    assert out.dtype == torch.float32 and out.isinf().sum() == 4 * 9 and not out.isnan().any()


def test_large_finite_values(device):
    """Winograd's sums of inputs overflow; the result does not."""
    x, weight = torch.full((1, 2, 6, 6), 3e38, device=device), torch.full((1, 2, 3, 3), 0.01, device=device)
    torch.testing.assert_close(conv3x3(x, weight), conv3x3_reference(x, weight))


def test_kernel_refuses_other_dtypes():
    x = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    if _dispatch.served("conv3x3")["cpu"][0] == "cpu":
        with pytest.raises(
            RuntimeError, match="conv3x3: x and weight must be float32, got Double and Double"
        ):
            torch.ops.fastgen.conv3x3(x, x.new_zeros(2, 2, 3, 3))
        with pytest.raises(RuntimeError, match="conv3x3_dw: dy and x must be float32, got Double and Double"):
            torch.ops.fastgen.conv3x3_dw(x, x)
