"""grid_sample, also against PyTorch's."""

import pytest
import torch
from accuracy import assert_accurate
from ops.checks import Case, OpChecks, gradients

from fastgen import ops


def positions(*shape):
    """Inside and outside the image, away from pixel centres, where derivatives jump."""
    return lambda: (torch.rand(*shape, 2, generator=torch.Generator().manual_seed(3)) * 2.6 - 1.3).double()


class TestGridSample(OpChecks):
    op = ops.grid_sample
    keeps_layout = False
    cases = [
        Case("square", {"x": (2, 3, 5, 5), "grid": positions(2, 4, 3)}),
        Case("odd", {"x": (2, 4, 3, 7), "grid": positions(2, 1, 9)}),
        Case("one_pixel", {"x": (2, 1, 1, 1), "grid": positions(2, 5, 5)}),
        Case("one_channel", {"x": (2, 1, 6, 2), "grid": positions(2, 2, 3)}),
    ]
    errors = [
        (
            {"grid": torch.zeros(2, 4, 2)},
            ValueError,
            "grid_sample: grid must have 4 dimensions [N, H', W', 2], got 3 ([2, 4, 2])",
        ),
        (
            {"grid": torch.zeros(2, 4, 4, 3)},
            ValueError,
            "grid_sample: grid must have 2 numbers a position, got [2, 4, 4, 3]",
        ),
        (
            {"grid": torch.zeros(1, 4, 4, 2)},
            ValueError,
            "grid_sample: grid must have the batch size of x, 2, got 1",
        ),
        (
            {"x": torch.zeros(2, 3, 0, 4)},
            ValueError,
            "grid_sample: x must have at least one row and one column, got [2, 3, 0, 4]",
        ),
        (
            {"x": torch.zeros(2, 3, 4, 4).int()},
            TypeError,
            "grid_sample: x must be float32 or bfloat16 or float16 or float64, got int32",
        ),
    ]

    def emptied(self, case, inputs):
        return {k: x.detach()[:0].requires_grad_() for k, x in inputs.items()}

    def test_is_torchs(self, case, device):
        inputs = case.make(torch.float64, device)
        got = self.run(case, inputs)
        want = torch.nn.functional.grid_sample(*inputs.values(), align_corners=False)
        assert_accurate(got, want)
        got, want = gradients(got, inputs), gradients(want, inputs)
        for name in want:
            assert_accurate(got[name], want[name], what=f"gradient of {name}")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30, -1e30])
def test_impossible_positions_do_no_harm(value, device):
    x = torch.randn(1, 2, 3, 3, device=device, requires_grad=True)
    grid = torch.tensor([[[[value, 0.0], [0.1, value], [0.1, 0.2]]]], device=device, requires_grad=True)
    out = ops.grid_sample(x, grid)
    assert out[..., 2].isfinite().all()
    if abs(value) == 1e30:
        assert not out[..., :2].any()
    gradients(out, {"x": x, "grid": grid})


def test_positions_keep_their_precision_beside_16_bit_images(device):
    x = torch.arange(1024.0, device=device).view(1, 1, 1, 1024).bfloat16()
    grid = torch.tensor([[[[2 * 700.5 / 1024 - 1, 0.0]]]], device=device)
    assert ops.grid_sample(x, grid).item() == x[0, 0, 0, 700].item()
