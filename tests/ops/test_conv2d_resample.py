"""conv2d_resample: every route against upsampling, convolving and downsampling one after the other."""

import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from ops.checks import Case, OpChecks

from fastgen import ops

F4 = ops.setup_filter([1, 3, 3, 1])
F3 = ops.setup_filter([[1, 2, 0], [-1, 3, 1], [2, 1, 5]])
LONG = torch.arange(1.0, 9).cos()


def case(name, x, w, f=None, **params):
    return Case(name, {"x": x, "w": w, "f": f}, params, fixed=("f",))


def definition(x, w, f, up=1, down=1, padding=0, groups=1, flip_weight=True, flip_filter=False):
    """The three steps, with zeros inserted and dropped."""
    x0, x1, y0, y1 = [padding] * 4 if isinstance(padding, int) else padding
    fh, fw = (1, 1) if f is None else (f.shape[0], f.shape[-1])
    for factor, grow in (
        (up, lambda taps: ((taps + up - 1) // 2, (taps - up) // 2)),
        (down, lambda taps: ((taps - down + 1) // 2, (taps - down) // 2)),
    ):
        if factor > 1:
            x0, x1 = x0 + grow(fw)[0], x1 + grow(fw)[1]
            y0, y1 = y0 + grow(fh)[0], y1 + grow(fh)[1]
    x = ops.upfirdn2d(x, f if up > 1 else None, up, 1, [x0, x1, y0, y1], flip_filter, up**2)
    x = F.conv2d(x, w if flip_weight else w.flip([2, 3]), groups=groups)
    return ops.upfirdn2d(x, f, 1, down, 0, flip_filter) if down > 1 else x


class TestConv2dResample(OpChecks):
    op = ops.conv2d_resample
    keeps_layout = False  # that is up to torch's convolutions
    cases = [
        case("up", (2, 3, 5, 6), (4, 3, 3, 3), F4, up=2, padding=1, flip_weight=False),
        case("down", (2, 3, 8, 7), (4, 3, 3, 3), F4, down=2, padding=1),
        case("plain", (2, 3, 5, 6), (4, 3, 3, 3), F4, padding=1),
        case("crop_into_padding", (2, 3, 1, 2), (4, 3, 1, 1), padding=[4, -3, -2, 3]),
        case("uneven", (2, 3, 5, 6), (4, 3, 3, 2), padding=[1, 2, -1, 1], flip_weight=False),
        case("up_pointwise", (2, 3, 5, 6), (4, 3, 1, 1), F4, up=2),
        case("down_pointwise", (2, 3, 6, 7), (4, 3, 1, 1), F4, down=2),
        case("down_crop_pointwise", (2, 3, 6, 7), (4, 3, 1, 1), F4, down=2, padding=[-2, 1, 0, 1]),
        case("up_groups", (2, 4, 5, 6), (6, 2, 3, 3), F3, up=3, padding=1, groups=2, flip_filter=True),
        case("down_groups", (2, 4, 7, 6), (6, 2, 3, 3), F3, down=3, padding=2, groups=2, flip_weight=False),
        case("up_crop", (2, 3, 5, 6), (4, 3, 3, 3), F4, up=2, padding=[-5, 2, 1, 1]),
        case("down_crop", (2, 3, 8, 9), (4, 3, 3, 3), F4, down=2, padding=[-3, 2, 1, 2]),
        case("up_and_down", (2, 3, 5, 6), (4, 3, 3, 3), F3, up=2, down=3, padding=3),
        case("separable", (2, 3, 5, 6), (4, 3, 3, 3), LONG, up=2, padding=[1, 2, 3, 0]),
        case("no_filter", (2, 3, 5, 6), (4, 3, 3, 3), up=2, padding=1),
        case("even_kernel", (2, 3, 5, 6), (4, 3, 4, 2), F4, up=2, padding=2),
    ]
    errors = [
        ({"x": 3}, TypeError, "conv2d_resample: x must be a tensor, got int"),
        (
            {"x": torch.zeros(3, 4, 4)},
            ValueError,
            "conv2d_resample: x must have 4 dimensions [N, C, H, W], got 3 ([3, 4, 4])",
        ),
        (
            {"w": torch.zeros(4, 3)},
            ValueError,
            "conv2d_resample: w must have 4 dimensions [O, I, kh, kw], got 2 ([4, 3])",
        ),
        (
            {"w": torch.zeros(4, 2, 3, 3)},
            ValueError,
            "conv2d_resample: x must have 2 channels, got 3",
        ),
        (
            {"groups": 3, "w": torch.zeros(4, 1, 3, 3)},
            ValueError,
            "conv2d_resample: w must have a multiple of groups=3 outputs, got 4",
        ),
        (
            {"groups": 2},
            ValueError,
            "conv2d_resample: x must have groups * I = 2 * 3 channels, got 3",
        ),
        ({"f": torch.zeros(0)}, ValueError, "conv2d_resample: f must have at least one tap, got [0]"),
        (
            {"x": torch.zeros(2, 3, 4, 0)},
            ValueError,
            "conv2d_resample: x must have at least one row and one column, got [2, 3, 4, 0]",
        ),
        (
            {"w": torch.zeros(4, 3, 0, 3)},
            ValueError,
            "conv2d_resample: w must have at least one row and one column, got [4, 3, 0, 3]",
        ),
        ({"up": 0}, ValueError, "conv2d_resample: up must be an int of at least 1, got 0"),
        ({"down": [2, 2]}, ValueError, "conv2d_resample: down must be an int of at least 1, got [2, 2]"),
        (
            {"padding": "same"},
            ValueError,
            "conv2d_resample: padding must be an int or [x, y] or [x0, x1, y0, y1], got 'same'",
        ),
        (
            {"padding": -9},
            ValueError,
            "conv2d_resample: x, upsampled and padded, must have at least the size [6, 6] of filter and"
            " kernel, got [-5, -3]",
        ),
        (
            {"f": torch.zeros(4, 4, dtype=torch.int64)},
            TypeError,
            "conv2d_resample: f must be float32 or bfloat16 or float16 or float64, got int64",
        ),
        (
            {"w": torch.zeros(4, 3, 3, 3, device="meta")},
            ValueError,
            "conv2d_resample: w must be on cpu like x, got meta",
        ),
    ]

    def test_definition(self, case, device):
        inputs = case.make(torch.float64, device)
        assert_accurate(self.run(case, inputs), definition(**inputs, **case.params))

    def test_autocast(self, few, device):
        inputs = few.make(device=device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            out = self.run(few, inputs)
        half = {k: v if k == "f" else v.bfloat16() for k, v in inputs.items()}
        torch.testing.assert_close(out, self.run(few, half), rtol=0, atol=0)


def test_weight_takes_the_dtype_of_x():
    x, w = torch.randn(1, 3, 8, 8).bfloat16(), torch.randn(4, 3, 3, 3)
    assert ops.conv2d_resample(x, w, F4, up=2, padding=1).dtype == torch.bfloat16
