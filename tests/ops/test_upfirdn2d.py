"""upfirdn2d and its relatives."""

import pytest
import torch
from accuracy import assert_accurate
from ops.checks import Case, OpChecks

import fastgen
from fastgen import ops

F4 = ops.setup_filter([1, 3, 3, 1])
ODD = torch.tensor([[1.0, 2, 1], [-1, 3, 1], [2, 1, 5]])
LONG = torch.arange(1.0, 13).cos()


WIDE = torch.tensor([[(3.0 * i + j) % 7 - 2.5 for j in range(8)] for i in range(6)])


def packs():
    x = torch.randn(2, 16, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return x.contiguous(memory_format=torch.channels_last)


def case(name, x, f, **params):
    return Case(name, {"x": x, "f": f}, params, fixed=("f",))


class TestUpfirdn2d(OpChecks):
    op = ops.upfirdn2d
    cases = [
        case("up", (2, 3, 6, 5), F4, up=2, padding=[2, 1, 2, 1], gain=4),
        case("odd_everything", (2, 5, 7, 11), ODD, up=[2, 3], down=[1, 2], padding=[3, -1, 2, 0], gain=1.5),
        case("down", (2, 3, 9, 8), F4, down=2, padding=1),
        case("blur", (2, 3, 8, 8), F4, padding=[2, 1, 2, 1]),
        case("separable", (2, 2, 9, 8), LONG, up=2, down=2, padding=[5, 5, 7, 4], flip_filter=True),
        case("identity", (2, 3, 4, 5), None, up=2, gain=-2.0),
        case("decimate", (2, 3, 7, 7), None, down=[3, 2]),
        case("one_pixel", (2, 1, 1, 1), ODD, padding=1),
        case("crop_all_but_zeros", (2, 2, 4, 4), ODD, padding=[-6, 9, 0, 0]),
        case("wide_filter", (2, 2, 3, 3), torch.ones(1, 9), up=3, padding=[8, 8, 0, 0], down=[4, 1]),
        case("short_separable", (2, 2, 6, 5), ODD[0], up=[1, 2], down=[2, 1], padding=[2, 1, 1, 2], gain=3),
        case("separable_tiles", (2, 2, 5, 41), LONG.repeat(2), up=4, padding=[13, 10, 11, 12], gain=16),
        case("very_long", (2, 2, 4, 29), LONG.repeat(3), down=[3, 1], padding=[12, 13, 18, 17]),
        case("many_channels", (2, 33, 5, 6), F4, padding=[1, 2, 1, 2], flip_filter=True),
        # Whole packs of channels, side by side in memory.
        case("packs_up", packs, F4, up=2, padding=[3, 2, 2, -1], gain=4),
        case("packs_down", packs, F4, down=2, padding=[1, 2, 2, 1]),
        case("packs_blur", packs, ODD, padding=[2, 1, 1, 2]),
        case("packs_up_3", packs, WIDE, up=3, padding=[4, 3, 7, 5], flip_filter=True),
        case("packs_down_3", packs, WIDE, down=3, padding=[4, 3, 7, 5]),
        case("packs_up_4", packs, WIDE, up=4, padding=[2, 9, -1, 5]),
        case("packs_down_4", packs, WIDE, down=4, padding=[6, 4, 5, 3]),
        case("packs_separable", packs, LONG, up=2, padding=[5, 4, 3, 6]),
    ]
    errors = [
        ({"x": [1]}, TypeError, "upfirdn2d: x must be a tensor, got list"),
        (
            {"x": torch.zeros(8, 64, 64)},
            ValueError,
            "upfirdn2d: x must have 4 dimensions [N, C, H, W], got 3 ([8, 64, 64])",
        ),
        (
            {"x": torch.zeros(1, 1, 4, 4, dtype=torch.int32)},
            TypeError,
            "upfirdn2d: x must be float32 or bfloat16 or float16 or float64, got int32",
        ),
        (
            {"f": torch.zeros(1, 2, 3)},
            ValueError,
            "upfirdn2d: f must have 1 dimension [taps] or 2 dimensions [fh, fw], got 3 ([1, 2, 3])",
        ),
        ({"f": torch.zeros(0)}, ValueError, "upfirdn2d: f must have at least one tap, got [0]"),
        ({"f": torch.zeros(2, device="meta")}, ValueError, "upfirdn2d: f must be on cpu like x, got meta"),
        ({"up": 0}, ValueError, "upfirdn2d: up must be at least 1, got 0"),
        ({"up": 1.5}, ValueError, "upfirdn2d: up must be an int or [x, y], got 1.5"),
        ({"down": [1, -2]}, ValueError, "upfirdn2d: down must be at least 1, got [1, -2]"),
        (
            {"padding": [1, 2, 3]},
            ValueError,
            "upfirdn2d: padding must be an int or [x, y] or [x0, x1, y0, y1], got [1, 2, 3]",
        ),
        ({"gain": "a"}, ValueError, "upfirdn2d: gain must be a number, got 'a'"),
        (
            {"padding": [-5, -5, 0, 0]},
            ValueError,
            "upfirdn2d: x, upsampled and padded, must be at least as large as f (4 x 4), got 12 x 0",
        ),
        (
            {"x": torch.zeros(1, 1, 0, 4)},
            ValueError,
            "upfirdn2d: x must have at least one row and one column, got [1, 1, 0, 4]",
        ),
    ]

    def test_vmap(self, few, device):
        f = few.make(device=device)["f"]
        x = torch.randn(3, *few.inputs["x"], device=device)
        got = torch.func.vmap(lambda x: self.run(few, {"x": x, "f": f}), in_dims=1)(x.movedim(0, 1))
        torch.testing.assert_close(got, torch.stack([self.run(few, {"x": y, "f": f}) for y in x]))

    @pytest.mark.parametrize("x_dim", [None, 1])
    def test_vmap_over_filters(self, x_dim, device):
        x = torch.randn(2, 3, 2, 5, 6, device=device)
        x, f = x[:, 0] if x_dim is None else x, torch.randn(4, 2, 3, device=device)
        got = torch.func.vmap(lambda x, f: ops.upfirdn2d(x, f, 2, padding=1), (x_dim, 2))(x, f)
        xs = [x] * 3 if x_dim is None else x.unbind(x_dim)
        want = [ops.upfirdn2d(x, f, 2, padding=1) for x, f in zip(xs, f.unbind(2), strict=True)]
        torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize("name, factor", [("filter2d", 1), ("upsample2d", 2), ("downsample2d", 0.5)])
def test_relatives_change_the_size_by_their_factor(name, factor):
    x = torch.ones(1, 2, 32, 24)
    for taps in (3, 4, 5, 8):
        out = getattr(ops, name)(x, ops.setup_filter([1] * taps))
        assert out.shape == (1, 2, 32 * factor, 24 * factor)
        # Inside, what is constant stays so: filters are normalised, and the gain makes up for inserted zeros.
        if taps % 2 == 0:
            inside = out[:, :, out.shape[2] // 2, out.shape[3] // 2]
            assert_accurate(inside, torch.ones(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", ["filter2d", "upsample2d", "downsample2d"])
def test_relatives_name_themselves_in_errors(name):
    with pytest.raises(ValueError, match=f"^{name}: x must have 4 dimensions"):
        getattr(ops, name)(torch.zeros(2, 2), None)


def test_too_large_a_result_names_the_op(device):
    name = "^upfirdn2d: " if fastgen.ops._dispatch.choice() == "cuda-host" else None
    with pytest.raises(RuntimeError, match=name):
        ops.upfirdn2d(torch.ones(1, 1, 64, 64, device=device), None, up=1 << 20)
    if name is None:
        return
    # Nor may the copy fail wordlessly that a kernel needs of what is not dense.
    with pytest.raises(RuntimeError, match=name):
        ops.upfirdn2d(torch.ones(1, device=device).expand(1, 1, 1 << 22, 1 << 22), None, down=1 << 20)


def test_derivatives_of_every_order_are_upfirdn2d():
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    out = ops.upfirdn2d(x, F4, padding=[2, 1, 2, 1])
    for _ in range(3):
        # out is linear in x, so the gradient of <out, g> in x, taken back in g, is out's operator again.
        (dx,) = torch.autograd.grad(out, x, g, create_graph=True)
        (out,) = torch.autograd.grad(dx, g, x, create_graph=True)
    assert_accurate(out, ops.upfirdn2d(x, F4, padding=[2, 1, 2, 1]))


def test_setup_filter_is_traced():
    def up(x):
        return ops.upsample2d(x, ops.setup_filter([1, 3, 3, 1]))

    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(torch.compile(up, fullgraph=True, backend="aot_eager")(x), up(x))


def test_setup_filter():
    assert ops.setup_filter(None).tolist() == [[1]]
    assert ops.setup_filter(3, normalize=False).tolist() == [[9]]
    assert ops.setup_filter([1, 3]).tolist() == [[1 / 16, 3 / 16], [3 / 16, 9 / 16]]
    assert ops.setup_filter([1] * 8).shape == (8,)
    assert ops.setup_filter([1, 3], separable=True, flip_filter=True).tolist() == [0.75, 0.25]
    assert ops.setup_filter([1, 1], gain=4, separable=True).tolist() == [1, 1]
    assert ops.setup_filter([1, 1], gain=4).tolist() == [[1, 1], [1, 1]]
    assert ops.setup_filter([[1, 2], [3, 4]], normalize=False, flip_filter=True).tolist() == [[4, 3], [2, 1]]
    assert ops.setup_filter([1], device="meta").device.type == "meta"
    assert ops.setup_filter([1, 1], gain=-2).tolist() == [[-0.5, -0.5], [-0.5, -0.5]]
    with pytest.raises(TypeError, match=r"^setup_filter: f must be a number, .*, got 'abc'$"):
        ops.setup_filter("abc")
    with pytest.raises(ValueError, match=r"^setup_filter: f must be a number, .*, got \[\[1\], \[1, 2\]\]$"):
        ops.setup_filter([[1], [1, 2]])
    with pytest.raises(ValueError, match=r"^setup_filter: f must not sum to 0 to be .*, got \[1, -1\]$"):
        ops.setup_filter([1, -1])
    with pytest.raises(ValueError, match=r"^setup_filter: gain must be at least 0 for a separable filter"):
        ops.setup_filter([1] * 8, gain=-1)
    with pytest.raises(ValueError, match=r"setup_filter: f must be .*, got shape \[1, 1, 1\]"):
        ops.setup_filter([[[1]]])
    with pytest.raises(ValueError, match=r"setup_filter: f must be \[taps\] to be separable, got \[1, 2\]"):
        ops.setup_filter([[1, 2]], separable=True)
