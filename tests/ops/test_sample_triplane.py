"""sample_triplane: against a plain loop over corners, in every convention of axes."""

import contextlib

import pytest
import torch
from accuracy import assert_accurate
from ops.checks import Case, OpChecks

import fastgen
from fastgen import ops
from fastgen.ops._dispatch import choice

# For each plane the coordinate along its columns and along its rows.
AXES = {"eg3d": ["xy", "xz", "zx"], "fixed": ["xy", "xz", "zy"]}
PERMUTED = torch.eye(3)[torch.tensor([[1, 2, 0], [2, 0, 1], [0, 2, 1]])]
SHEARED = torch.tensor([[1.0, 0.5, 0], [0, 2, 0], [0.3, 0, 1]]).expand(3, 3, 3)


def points(n, m):
    # Cells' inner parts only: a derivative on an edge between pixels is not defined.
    def make():
        random = torch.Generator().manual_seed(3)
        cell = torch.randint(-2, 12, (n, m, 3), generator=random)
        return (cell + 0.25 + 0.5 * torch.rand(n, m, 3, generator=random)) / 10 - 0.5

    return make


def case(name, planes, m, axes="eg3d", **params):
    inputs = {"planes": planes, "coordinates": points(planes[0], m)}
    return Case(name, inputs, {"plane_axes": axes, **params})


def definition(planes, coordinates, box_warp=1.0, plane_axes="eg3d", reduce=None):
    n, _, c, h, w = planes.shape
    out = planes.new_zeros(n, 3, coordinates.shape[1], c)
    for p in range(3):
        if isinstance(plane_axes, str):
            column, row = (coordinates[..., "xyz".index(axis)] for axis in AXES[plane_axes][p])
        else:
            basis = plane_axes[p].to(planes).T.expand(n, 3, 3)
            column, row, _ = torch.linalg.solve(basis, coordinates.transpose(1, 2)).unbind(1)
        u, v = (column * 2 / box_warp + 1) * w / 2 - 0.5, (row * 2 / box_warp + 1) * h / 2 - 0.5
        for i in range(n):
            for j in range(w):
                for k in range(h):
                    tent = (1 - (u[i] - j).abs()).clamp(min=0) * (1 - (v[i] - k).abs()).clamp(min=0)
                    out[i, p] += tent[:, None] * planes[i, p, :, k, j]
    return out.mean(1) if reduce else out


class TestSampleTriplane(OpChecks):
    op = ops.sample_triplane
    any_order = 1e-10
    image = "planes"
    cases = [
        case("eg3d", (2, 3, 4, 5, 5), 30),
        case("mean", (2, 3, 4, 6, 5), 30, "fixed", box_warp=0.8, reduce="mean"),
        case("outside", (1, 3, 2, 5, 5), 40, box_warp=0.5),
        case("permuted", (2, 3, 2, 5, 5), 20, PERMUTED, reduce="mean"),
        case("sheared", (1, 3, 2, 4, 4), 60, SHEARED),
        case("one_pixel", (2, 3, 1, 1, 1), 9),
        case("no_points", (2, 3, 2, 4, 4), 0),
        case("whole_vectors", (2, 3, 16, 5, 5), 30, "fixed", reduce="mean"),
        case("many_points", (1, 3, 20, 5, 5), 300, box_warp=2),
    ]
    errors = [
        ({"planes": 1}, TypeError, "sample_triplane: planes must be a tensor, got int"),
        (
            {"planes": torch.zeros(2, 4, 8, 5, 5)},
            ValueError,
            "sample_triplane: planes must have shape [N, 3, C, H, W], got [2, 4, 8, 5, 5]",
        ),
        (
            {"coordinates": torch.zeros(2, 3)},
            ValueError,
            "sample_triplane: coordinates must have 3 dimensions [N, M, 3], got 2 ([2, 3])",
        ),
        (
            {"coordinates": torch.zeros(1, 4, 3)},
            ValueError,
            "sample_triplane: coordinates must have shape [N=2, M, 3], got [1, 4, 3]",
        ),
        ({"box_warp": 0}, ValueError, "sample_triplane: box_warp must be positive, got 0"),
        (
            {"plane_axes": "xyz"},
            ValueError,
            "sample_triplane: plane_axes must be 'eg3d', 'fixed', or numbers or a tensor [3, 3, 3],"
            " got 'xyz'",
        ),
        (
            {"plane_axes": torch.zeros(2, 3, 3)},
            ValueError,
            "sample_triplane: plane_axes must have shape [3, 3, 3], got [2, 3, 3]",
        ),
        (
            {"plane_axes": torch.zeros(3, 3, 3)},
            ValueError,
            f"sample_triplane: plane_axes must be invertible, got {torch.zeros(3, 3, 3).tolist()}",
        ),
        (
            {"plane_axes": [[[1, 0, 0]] * 3] * 2},
            ValueError,
            "sample_triplane: plane_axes must be 'eg3d', 'fixed', or numbers or a tensor [3, 3, 3],"
            f" got {[[[1, 0, 0]] * 3] * 2}",
        ),
        (
            {"planes": torch.zeros(2, 3, 4, 0, 5)},
            ValueError,
            "sample_triplane: planes must have at least one row and one column, got [2, 3, 4, 0, 5]",
        ),
        ({"reduce": "sum"}, ValueError, "sample_triplane: reduce must be None or 'mean', got 'sum'"),
        (
            {"coordinates": torch.zeros(2, 4, 3, dtype=torch.int64)},
            TypeError,
            "sample_triplane: coordinates must be float32 or bfloat16 or float16 or float64, got int64",
        ),
        (
            {"coordinates": torch.zeros(2, 4, 3, device="meta")},
            ValueError,
            "sample_triplane: coordinates must be on cpu like planes, got meta",
        ),
    ]

    def emptied(self, case, inputs):
        return {k: x.detach()[:0].requires_grad_() for k, x in inputs.items()}

    def test_gradients_in_any_order(self, case, dtype, device):
        # PyTorch is deterministic where new memory is poisoned.
        self.test_gradients(case, dtype, device, None)

    def test_definition(self, case, device):
        inputs = case.make(torch.float64, device)
        assert_accurate(self.run(case, inputs), definition(**inputs, **case.params))


def differentiate(planes, coordinates, **params):
    """The samples, their gradients, and gradients of these."""
    out = ops.sample_triplane(planes, coordinates, **params)
    random = torch.Generator().manual_seed(2)
    dy, p, q = (
        # Numbers that every dtype has.
        torch.randn(x.shape, generator=random).bfloat16().to(x).requires_grad_()
        for x in (out, planes, coordinates)
    )
    first = torch.autograd.grad(out, (planes, coordinates), dy, create_graph=True)
    return out, *first, *torch.autograd.grad(first, (dy, planes, coordinates), (p, q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("m", [9, 150])
def test_channels_last(channels, m, dtype, device, poisoned):
    # The planes of one image of 3 C channels, as a backbone makes them.
    image = torch.randn(2, 3 * channels, 20, 15).bfloat16().to(device, dtype)
    planes = image.contiguous(memory_format=torch.channels_last).view(2, 3, channels, 20, 15)
    assert planes.stride(2) == 1
    coordinates = points(2, m)().to(device)
    for reduce in (None, "mean"):
        got, want, exact = (
            differentiate(x.detach().requires_grad_(), y.requires_grad_(), reduce=reduce)
            for x, y in (
                (planes, coordinates),
                (planes.contiguous(), coordinates),
                (planes.double(), coordinates.detach().double()),
            )
        )
        for x, y, z in zip(got, want, exact, strict=True):
            assert_accurate(x, z, y)
        if choice() != "reference":
            assert got[1].stride() == got[4].stride() == planes.stride()


def test_what_needs_no_gradient_gets_none(device):
    planes, coordinates = torch.randn(2, 3, 4, 5, 5, device=device), points(2, 30)().to(device)
    both = differentiate(planes.requires_grad_(), coordinates.requires_grad_())
    dy = torch.randn(both[0].shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(both[0])
    only = torch.autograd.grad(ops.sample_triplane(planes, coordinates.detach()), planes, dy)[0]
    torch.testing.assert_close(only, both[1])
    only = torch.autograd.grad(ops.sample_triplane(planes.detach(), coordinates), coordinates, dy)[0]
    torch.testing.assert_close(only, both[2])


def test_second_derivatives_of_one_gradient(device):
    inputs = torch.randn(1, 3, 4, 5, 5).double(), points(1, 20)().double()
    planes, coordinates = (x.to(device).requires_grad_() for x in inputs)

    def gradient(wanted):
        def function(planes, coordinates):
            out = ops.sample_triplane(planes, coordinates, reduce="mean")
            inputs = planes, coordinates
            return torch.autograd.grad(out.square().sum(), inputs[wanted], create_graph=True)

        return function

    for wanted in range(2):
        function = gradient(wanted)
        assert torch.autograd.gradcheck(
            function, (planes, coordinates), fast_mode=True, nondet_tol=TestSampleTriplane.any_order
        )


def test_third_derivatives(device):
    inputs = torch.randn(1, 3, 2, 5, 5).double(), points(1, 10)().double()
    tensors = [x.to(device).requires_grad_() for x in inputs]

    def gradients(planes, coordinates):
        out = ops.sample_triplane(planes, coordinates)
        return torch.autograd.grad(out.pow(3).sum(), (planes, coordinates), create_graph=True)

    assert torch.autograd.gradgradcheck(
        gradients, tensors, fast_mode=True, nondet_tol=TestSampleTriplane.any_order
    )


@pytest.mark.parametrize("reduce", [None, "mean"])
def test_positions_that_are_not_finite(reduce):
    planes, coordinates = torch.randn(1, 3, 4, 5, 5), points(1, 8)()
    coordinates[0, 0, 0], coordinates[0, 1, 1], coordinates[0, 2, 2] = torch.nan, torch.inf, -torch.inf
    coordinates[0, 3] = torch.tensor([1e30, 0, -1e30])

    def run(*tensors):
        planes, coordinates = (x.requires_grad_() for x in tensors)
        out = ops.sample_triplane(planes, coordinates, reduce=reduce)
        dy = torch.ones_like(out)
        return out, *torch.autograd.grad(out, (planes, coordinates), dy)

    got = run(planes.clone(), coordinates.clone())
    with fastgen.backend("reference"):
        want = run(planes.double(), coordinates.double())
    for x, y in zip(got, want, strict=True):
        assert_accurate(x, y)


def test_threads_do_not_change_gradients():
    before = torch.get_num_threads()
    planes, coordinates = torch.randn(1, 3, 20, 7, 9), points(1, 5000)()
    results = []
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            results.append(differentiate(planes.requires_grad_(), coordinates.requires_grad_()))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for x, y in zip(result, results[0], strict=True):
            assert torch.equal(x, y)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduce", [None, "mean"])
def test_deterministic(dtype, reduce, device):
    planes = torch.randn(2, 3, 5, 6, 7).to(device, dtype)
    planes = planes.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    positions = points(2, 700)().to(device)

    def run(planes, coordinates):
        return differentiate(
            planes.detach().requires_grad_(), coordinates.detach().requires_grad_(), reduce=reduce
        )

    exact, any_order = run(planes.double(), positions.double()), run(planes, positions)
    with deterministic():
        first, second = run(planes, positions), run(planes.contiguous(), positions)
    for x, y, z, other in zip(first, second, exact, any_order, strict=True):
        assert choice() == "triton" or torch.equal(x, y)  # whose kernels add in any order
        assert_accurate(x, z, other)


@pytest.mark.parametrize("channels", [3, 300])
def test_deterministic_sums_are_in_order(channels, device):
    # All points are in the middle of a pixel. Sums of parts would differ from this one.
    planes = torch.randn(1, 3, channels, 5, 5, device=device, requires_grad=True)
    dy = torch.randn(1, 3, 600, channels)
    want = torch.zeros(3, channels)
    for m in range(600):
        want += dy[0, :, m]
    with deterministic():
        out = ops.sample_triplane(planes, torch.zeros(1, 600, 3, device=device))
        got = torch.autograd.grad(out, planes, dy.to(device))[0]
    got, sums = got.cpu(), got[0, :, :, 2, 2].cpu()
    assert_accurate(sums, want.double())
    assert choice() in ("reference", "triton") or torch.equal(sums, want)
    assert torch.count_nonzero(got) == want.numel()


def test_raw_op_refuses_what_it_would_read_out_of_bounds(device):
    planes, coordinates = torch.randn(2, 3, 4, 5, 5, device=device), torch.rand(2, 6, 3, device=device)
    if choice() == "triton":
        return  # whose launchers check nothing
    raw, rest = torch.ops.fastgen, ([0.5] * 18, False)
    for wrong in (planes[:, :2], planes[0], planes[..., :0]):
        with pytest.raises(RuntimeError, match=r"planes must be \[N, 3, C, H, W\]"):
            raw.sample_triplane(wrong, coordinates, *rest)
    for wrong in (coordinates[:1], coordinates[..., :2], coordinates[0]):
        with pytest.raises(RuntimeError, match=r"coordinates must be \[N, M, 3\]"):
            raw.sample_triplane(planes, wrong, *rest)
    with pytest.raises(RuntimeError, match="projection must be 18 numbers"):
        raw.sample_triplane(planes, coordinates, [0.5] * 6, False)
    dy = raw.sample_triplane(planes, coordinates, *rest)
    for wrong in (dy[:1], dy[:, 0], dy[..., :3], dy.double()):
        with pytest.raises(RuntimeError, match="dy has a wrong shape or dtype"):
            raw.sample_triplane_bwd(wrong, planes, coordinates, *rest, True, True)
        with pytest.raises(RuntimeError, match="dy has a wrong shape or dtype"):
            raw.sample_triplane_bwd2(planes, coordinates, wrong, planes, coordinates, *rest, True, True, True)
    given = dy, planes, coordinates, *rest
    for wrong in (planes[:1], planes[..., :4], planes.double()):
        with pytest.raises(RuntimeError, match="ddplanes has a wrong shape or dtype"):
            raw.sample_triplane_bwd2(wrong, coordinates, *given, True, True, True)
    for wrong in (coordinates[:1], coordinates[..., :2], coordinates.double()):
        with pytest.raises(RuntimeError, match="ddcoordinates has a wrong shape or dtype"):
            raw.sample_triplane_bwd2(planes, wrong, *given, True, True, True)
    with pytest.raises(RuntimeError, match="second gradient only from ddcoordinates"):
        raw.sample_triplane_bwd2(planes, None, *given, True, True, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_planes_keep_float32_positions(dtype):
    # Rounding positions to bfloat16 would move samples by a pixel of these planes.
    ramp = torch.linspace(0, 1, 256).expand(1, 3, 1, 256, 256).to(dtype)
    coordinates = torch.rand(1, 100, 3) - 0.5
    got = ops.sample_triplane(ramp, coordinates)
    assert_accurate(got, ops.sample_triplane(ramp.double(), coordinates.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x", [0, 0.25, -0.3])
def test_every_16_bit_number(dtype, x, device):
    # Planes of one pixel, whose share is 1, 1/2 and 2/5: read and rounded as PyTorch does.
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).to(device)
    coordinates = torch.tensor([x, 0, 0], dtype=torch.float32, device=device).expand(4096, 1, 3)
    planes = numbers.view(4096, 1, 16, 1, 1).expand(-1, 3, -1, -1, -1)
    got = ops.sample_triplane(planes, coordinates)[:, 0].flatten()
    share = 1 - (coordinates[0, 0, 0] * 2 + 1).sub(1).div(2).abs()
    torch.testing.assert_close(got, (numbers.float() * share).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_axes_as_a_tensor_are_the_named_ones():
    x, y, z = torch.eye(3)
    tensors = {
        "eg3d": torch.stack([torch.stack(rows) for rows in ((x, y, z), (x, z, y), (z, x, y))]),
        "fixed": torch.stack([torch.stack(rows) for rows in ((x, y, z), (x, z, y), (z, y, x))]),
    }
    planes, coordinates = torch.randn(1, 3, 2, 5, 5), torch.rand(1, 20, 3) - 0.5
    for name, axes in tensors.items():
        named = ops.sample_triplane(planes, coordinates, plane_axes=name)
        for given in (axes, axes.tolist()):
            torch.testing.assert_close(ops.sample_triplane(planes, coordinates, plane_axes=given), named)
