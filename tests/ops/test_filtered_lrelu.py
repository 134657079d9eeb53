"""filtered_lrelu, and that it is the composition it says."""

import math

import pytest
import torch
from accuracy import assert_accurate
from ops.checks import Case, OpChecks, exact_copy, gradients

from fastgen import ops
from fastgen._backends import is_interpreted
from fastgen.ops import _dispatch

F12 = ops.setup_filter([1, 2, 3, 5, 7, 8, 8, 7, 5, 3, 2, 1])
F24 = ops.setup_filter([*range(1, 15), *range(12, 2, -1)])
F4 = ops.setup_filter([1, 3, 3, 1])
F43 = torch.tensor([[1.0, 2, 3], [0, 1, -1], [2, 0, 1], [1, 1, 0]]) / 4  # of full rank, so not separable


def case(name, x, b=None, fu=None, fd=None, **params):
    return Case(name, {"x": x, "fu": fu, "fd": fd, "b": b}, params, fixed=("fu", "fd"))


class TestFilteredLrelu(OpChecks):
    op = ops.filtered_lrelu
    cases = [
        case("up_down", (2, 3, 6, 7), (3,), F12, F12, up=2, down=2, padding=[10, 9, 10, 9], clamp=1.0),
        case("plain", (2, 3, 4, 5), (3,)),
        case("up", (2, 2, 5, 4), None, F4, None, up=2, padding=[2, 1, 3, -1], gain=2.0, slope=0.0),
        case("down", (2, 3, 7, 9), (3,), None, F4, down=2, padding=1, flip_filter=True),
        case("two_dimensional", (2, 3, 5, 7), (3,), F43, F43, up=2, down=2, padding=[4, 3, 5, 4], clamp=0.5),
        case("flipped", (2, 2, 5, 6), (2,), F43, F4, up=2, padding=4, gain=0.7, flip_filter=True),
        case("cropped", (1, 3, 9, 8), (3,), F4, F43, up=2, down=2, padding=[-3, 2, -1, -4]),
        case("up_4_down_2", (1, 2, 5, 3), (2,), F12, F12, up=4, down=2, padding=[9, 9, 8, 11], slope=1.5),
        case("up_2_down_4", (1, 2, 9, 11), (2,), F4, F12, up=2, down=4, padding=9),
        case("up_3_down_2", (1, 2, 5, 4), (2,), F43, F12, up=3, down=2, padding=[7, 8, 9, 6]),
        case("up_more_than_taps", (1, 2, 3, 4), (2,), F4, F4, up=5, down=3, padding=2),
        case("clamped_to_zero", (2, 3, 4, 5), (3,), F4, F4, up=2, down=2, padding=3, clamp=0.0),
        case("long", (1, 5, 15, 14), (5,), F24, F12, up=4, down=2, padding=[17, 18, 15, 20], clamp=1.0),
        case("whole", (1, 2, 20, 21), (2,), F4, F12.outer(F12), up=3, down=2, padding=9),
        case("high", (1, 2, 70, 3), (2,), F12, F12, up=2, down=2, padding=[9, 12, 12, 9], gain=-1.0),
        case("wide", (1, 2, 3, 85), (2,), F12, F12, up=2, down=2, padding=[11, 10, 11, 10], clamp=1.0),
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

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("f", [F12, F43], ids=["separable", "two_dimensional"])
    def test_larger_than_a_block(self, device, f, layout, poisoned):
        """Rows shared out among threads, and channels among blocks, the last of which is not full."""
        # Triton's blocks are smaller, and its interpreter is slow.
        channels, width = (2, 90) if is_interpreted() else (34, 420)
        large = case("large", (1, channels, 5, width), (channels,), f, f, up=2, down=2, padding=11, clamp=1.0)
        inputs = large.make(device=device)
        inputs["x"] = inputs["x"].detach().contiguous(memory_format=layout).requires_grad_()
        exact = exact_copy(inputs)
        got, want, same = self.run(large, inputs), self.reference(large, exact), self.reference(large, inputs)
        assert_accurate(got, want, same)
        got, want, same = gradients(got, inputs), gradients(want, exact), gradients(same, inputs)
        for name in got:
            assert_accurate(got[name], want[name], same[name], f"gradient of {name}")

    @pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
    def test_16_bits_decide_signs_in_float32(self, device, kind):
        """A v that changed its sign would change its gradient by far more than rounding does."""
        short = case("short", (2, 3, 50, 40), (3,), (12,), (12,), up=2, down=2, padding=11)
        inputs = short.make(kind, device=device)
        exact = exact_copy(inputs)
        got = gradients(self.run(short, inputs), inputs)["x"].double()
        want = gradients(self.reference(short, exact), exact)["x"].double()
        # The reference rounds v to 16 bits.
        allowed = 30 if _dispatch._choice == "reference" else 6
        assert (got - want).abs().max() <= allowed * torch.finfo(kind).eps * want.abs().max()

    @pytest.mark.parametrize("dims", [(1, None, None), (0, None, 1), (None, 0, None), (2, 0, 1)], ids=str)
    def test_vmap(self, device, dims):
        def function(x, f, b):
            y = ops.filtered_lrelu(x, f, F4.to(device), b, up=2, down=2, padding=3)
            arguments = (2, 2, [3, 3, 3, 3], 1.4, 0.2, 1.0, False)
            return y, torch.ops.fastgen.filtered_lrelu_bwd(y, x, f, F4.to(device), b, *arguments)

        shapes = [(2, 4, 5, 6), (3, 4), (4,)]
        shapes = [s if d is None else (*s[:d], 3, *s[d:]) for s, d in zip(shapes, dims, strict=True)]
        args = [torch.randn(shape, device=device) for shape in shapes]
        each = [[a] * 3 if d is None else a.unbind(d) for a, d in zip(args, dims, strict=True)]
        want = [function(*one) for one in zip(*each, strict=True)]
        got = torch.func.vmap(function, dims)(*args)
        for a, b in zip(got, zip(*want, strict=True), strict=True):
            torch.testing.assert_close(a, torch.stack(b))

    def test_filters_that_do_not_fit(self, device):
        f = torch.linspace(0, 0.01, 200, device=device)
        huge = case("huge", (1, 2, 150, 140), (2,), f, f, up=2, down=2, padding=100)
        inputs = huge.make(device=device)
        torch.testing.assert_close(self.run(huge, inputs), self.reference(huge, inputs))
        if _dispatch._choice == "cuda-host":
            with pytest.raises(RuntimeError, match="filtered_lrelu: filters are too large: one result takes"):
                arguments = 2, 2, [100] * 4, 1.4, 0.2, -1.0, False
                torch.ops.fastgen.filtered_lrelu(inputs["x"], f, f, inputs["b"], *arguments)

    def test_opcheck(self):
        tensors = (torch.randn(1, 2, 6, 5, requires_grad=True), F4, F4, torch.randn(2, requires_grad=True))
        args = (*tensors, 2, 2, [3, 3, 3, 3], 1.4, 0.2, 1.0, False)
        torch.library.opcheck(torch.ops.fastgen.filtered_lrelu.default, args)
        dy = torch.randn(1, 2, 6, 5, requires_grad=True)
        torch.library.opcheck(torch.ops.fastgen.filtered_lrelu_bwd.default, (dy, *args))
