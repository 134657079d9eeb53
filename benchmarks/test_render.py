"""render_triplane at EG3D's size, 128 x 128 rays of 48 + 48 samples, and how its cost grows; sample_triplane
alone, at the samples of 64 x 64 such rays of 32.

Plain PyTorch is the composed reference, which holds all samples in memory. A row counts the FLOP of the
decoder, for gradients three times, since it is evaluated again, and as bytes the planes, rays and results.
"""

import pytest
import torch
from conftest import DEVICE, DTYPES, ROUTES, derivative, on_route, scaled

from fastgen import camera, ops, presets

SIDE, SAMPLES, F, D, C = 128, 48, 32, 64, 32


def scene(dtype, batch=1):
    random = torch.Generator().manual_seed(0)
    shapes = [(batch, 3, F, 256, 256), (D, F), (D,), (1 + C, D), (1 + C,)]
    return [(torch.randn(s, generator=random) / s[-1] ** (len(s) == 2)).to(DEVICE, dtype) for s in shapes]


def render(tensors, rays, samples=SAMPLES):
    options = {
        "depth_resolution": scaled(samples),
        "depth_resolution_importance": scaled(samples),
        "ray_start": 2.25,
        "ray_end": 3.3,
        "box_warp": 1,
    }
    return ops.render_triplane(tensors[0], tensors[1:], *rays, options).features


def cameras(side, batch=1):
    return camera.rays(presets.get("ffhq512").camera.front().expand(batch, 25).to(DEVICE), side)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_render(measure, direction, dtype, route):
    tensors, rays, few = scene(DTYPES[dtype]), cameras(scaled(SIDE)), cameras(scaled(16))
    run = on_route(route, render)
    with torch.no_grad():
        # Depths by importance follow rounding: to a hundredth, as between two correct implementations.
        exact = on_route("pytorch", render)([x.double() for x in tensors], [x.double() for x in few])
        error = (run(tensors, few).double() - exact).abs().max()
        assert error <= 1e-2 * exact.abs().max(), "wrong result, not timed"

    backward = direction == "backward"
    timed = torch.no_grad()(lambda: run(tensors, rays))
    features, timed = derivative(run, tensors, rays) if backward else (timed(), timed)
    measure(
        timed,
        5,
        op=f"render_triplane_{direction}",
        shape=f"{SIDE}x{SIDE}x{SAMPLES}+{SAMPLES}",
        dtype=dtype,
        route=route,
        bytes=(1 + backward) * (tensors[0].nbytes + features.nbytes) + 6 * 4 * SIDE**2,
        flop=2 * SIDE**2 * 2 * SAMPLES * D * (F + 1 + C) * (3 if backward else 1),
    )


@pytest.mark.parametrize("batch, side, samples", [(1, 64, 24), (1, 128, 24), (1, 64, 96), (4, 64, 24)])
@torch.no_grad()
def test_cost(measure, batch, side, samples):
    # Rays, samples and batch times four each: the table shows what that costs.
    tensors, rays = scene(torch.float32, batch), cameras(scaled(side), batch)
    plain = on_route("pytorch", render)(tensors, [x[:, ::97] for x in rays], samples)
    error = (render(tensors, rays, samples)[:, ::97] - plain).abs().max()
    assert error <= 1e-2 * plain.abs().max(), "wrong result, not timed"
    measure(
        lambda: render(tensors, rays, samples),
        7,
        op="render_triplane_cost",
        shape=f"{batch}x{side}x{side}x{samples}+{samples}",
        dtype="float32",
        route="fastgen",
        bytes=tensors[0].nbytes + batch * side**2 * 4 * (C + 6),
        flop=2 * batch * side**2 * 2 * samples * D * (F + 1 + C),
    )


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_sample(measure, direction, dtype, layout, route):
    def sample(tensors):
        return ops.sample_triplane(*tensors, reduce="mean")

    run = on_route(route, sample)
    origins, directions = cameras(scaled(64))
    depths = torch.linspace(2.25, 3.3, 32, device=DEVICE)
    points = (origins[:, :, None] + depths[:, None] * directions[:, :, None]).flatten(1, 2)
    planes = torch.randn(1, 3 * F, 256, 256).to(DEVICE, DTYPES[dtype])
    if layout == "channels_last":
        planes = planes.contiguous(memory_format=torch.channels_last)
    planes = planes.view(1, 3, F, 256, 256)

    with torch.no_grad():
        few = points[:, ::97]
        exact = on_route("pytorch", sample)([planes.double(), few.double()])
        error = (run([planes, few]).double() - exact).abs().max()
        # Positions are float32: off by 1e-5 of a pixel.
        allowed = 4 * torch.finfo(DTYPES[dtype]).eps + 1e-4
        assert error <= allowed * exact.abs().max(), "wrong result, not timed"

    backward = direction == "backward"
    timed = torch.no_grad()(lambda: run([planes, points]))
    features, timed = derivative(run, [planes, points]) if backward else (timed(), timed)
    measure(
        timed,
        5,
        op=f"sample_triplane_{direction}",
        shape=f"{'x'.join(map(str, planes.shape))} at {points.shape[1]}",
        dtype=dtype,
        layout=layout,
        route=route,
        bytes=(1 + backward) * (planes.nbytes + points.nbytes) + features.nbytes,
        # A product and a sum a corner; backward, one pair for each gradient.
        flop=3 * 8 * features.numel() * (1 + backward),
    )
