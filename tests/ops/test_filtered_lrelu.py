"""filtered_lrelu, and that it is the composition it says."""

import math

import torch
from ops.checks import Case, OpChecks

from fastgen import ops

F12 = ops.setup_filter([1, 2, 3, 5, 7, 8, 8, 7, 5, 3, 2, 1])
F4 = ops.setup_filter([1, 3, 3, 1])


def case(name, x, b=None, fu=None, fd=None, **params):
    return Case(name, {"x": x, "fu": fu, "fd": fd, "b": b}, params, fixed=("fu", "fd"))


class TestFilteredLrelu(OpChecks):
    op = ops.filtered_lrelu
    cases = [
        case("up_down", (2, 3, 6, 7), (3,), F12, F12, up=2, down=2, padding=[10, 9, 10, 9], clamp=1.0),
        case("plain", (2, 3, 4, 5), (3,)),
        case("up", (2, 2, 5, 4), None, F4, None, up=2, padding=[2, 1, 3, -1], gain=2.0, slope=0.0),
        case("down", (2, 3, 7, 9), (3,), None, F4, down=2, padding=1, flip_filter=True),
    ]
    errors = [
        (
            {"x": torch.zeros(3, 4)},
            ValueError,
            "filtered_lrelu: x must have 4 dimensions [N, C, H, W], got 2 ([3, 4])",
        ),
        ({"b": torch.zeros(4)}, ValueError, "filtered_lrelu: b must have 3 elements, got 4"),
        ({"up": [2, 2]}, ValueError, "filtered_lrelu: up must be an int of at least 1, got [2, 2]"),
        ({"down": 0}, ValueError, "filtered_lrelu: down must be an int of at least 1, got 0"),
        ({"clamp": -2.0}, ValueError, "filtered_lrelu: clamp must be at least 0, got -2.0"),
        (
            {"padding": -1},
            ValueError,
            "filtered_lrelu: x, upsampled and padded, must be at least as large as fu (12 x 12), got 10 x 12",
        ),
        (
            {"padding": 4},
            ValueError,
            "filtered_lrelu: x, filtered with fu, must be at least as large as fd (12 x 12), got 9 x 11",
        ),
        (
            {"fu": None, "padding": -6},
            ValueError,
            "filtered_lrelu: x, upsampled and padded, must have at least one row and one column, got 0 x 2",
        ),
        (
            {"x": torch.zeros(2, 3, 0, 4)},
            ValueError,
            "filtered_lrelu: x must have at least one row and one column, got [2, 3, 0, 4]",
        ),
        ({"slope": "a"}, ValueError, "filtered_lrelu: slope must be a number, got 'a'"),
        ({"fd": 3}, TypeError, "filtered_lrelu: fd must be a tensor, got int"),
    ]

    def test_is_its_composition(self, case, device):
        inputs = case.make(torch.float64, device)
        p = {"up": 1, "down": 1, "padding": 0, "gain": math.sqrt(2), "slope": 0.2, "clamp": None}
        p |= case.params
        flip = p.get("flip_filter", False)
        y = inputs["x"] if inputs["b"] is None else inputs["x"] + inputs["b"][:, None, None]
        y = ops.upfirdn2d(y, inputs["fu"], p["up"], 1, p["padding"], flip, p["up"] ** 2)
        y = torch.where(y > 0, y, y * p["slope"]) * p["gain"]
        y = y if p["clamp"] is None else y.clamp(-p["clamp"], p["clamp"])
        want = ops.upfirdn2d(y, inputs["fd"], down=p["down"], flip_filter=flip)
        torch.testing.assert_close(self.run(case, inputs), want)

    def test_opcheck(self):
        tensors = (torch.randn(1, 2, 6, 5, requires_grad=True), F4, F4, torch.randn(2, requires_grad=True))
        args = (*tensors, 2, 2, [3, 3, 3, 3], 1.4, 0.2, 1.0, False)
        torch.library.opcheck(torch.ops.fastgen.filtered_lrelu.default, args)
