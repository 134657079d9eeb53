"""render_triplane at EG3D's size, 128 x 128 rays of 48 + 48 samples, beside plain and compiled PyTorch; and
sample_triplane alone, at the samples of 64 x 64 such rays of 32.

Plain is the composed reference, which holds all samples in memory. A row counts the FLOP of the decoder, for
gradients three times, since it is evaluated again, and as bytes the planes, rays and results.
"""

import pytest
import torch
from test_ops import DEVICE, DTYPES, keep_memory  # noqa: F401  (a fixture of every module)

import fastgen
from fastgen import camera, ops, presets

SIDE, SAMPLES, F, D, C = 128, 48, 32, 64, 32
OPTIONS = {
    "depth_resolution": SAMPLES,
    "depth_resolution_importance": SAMPLES,
    "ray_start": 2.25,
    "ray_end": 3.3,
    "box_warp": 1,
}


def scene(dtype):
    random = torch.Generator().manual_seed(0)
    shapes = [(1, 3, F, 256, 256), (D, F), (D,), (1 + C, D), (1 + C,)]
    return [(torch.randn(s, generator=random) / s[-1] ** (len(s) == 2)).to(DEVICE, dtype) for s in shapes]


def render(tensors, rays):
    return ops.render_triplane(tensors[0], tensors[1:], *rays, OPTIONS).features


def plain(tensors, rays):
    with fastgen.backend("reference"):
        return render(tensors, rays)


@pytest.mark.parametrize("route", ["fastgen", "pytorch", "torch.compile"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_render(benchmark, direction, dtype, route):
    tensors = scene(DTYPES[dtype])
    label = presets.get("ffhq512").camera.front().to(DEVICE)
    rays, few = camera.rays(label, SIDE), camera.rays(label, 16)
    run = {"fastgen": render, "pytorch": plain, "torch.compile": plain}[route]
    if route == "torch.compile":
        torch.compiler.reset()
        run = torch.compile(plain, dynamic=False)
    with torch.no_grad():
        # Depths by importance follow rounding: to a hundredth, as between two correct implementations.
        exact = plain([x.double() for x in tensors], [x.double() for x in few])
        error = (run(tensors, few).double() - exact).abs().max()
        assert error <= 1e-2 * exact.abs().max(), "wrong result, not timed"

    backward = direction == "backward"
    tensors = [x.requires_grad_(backward) for x in tensors]
    with torch.set_grad_enabled(backward):
        features = run(tensors, rays)
    dy = torch.randn_like(features)

    def timed():
        if backward:
            torch.autograd.grad(features, tensors, dy, retain_graph=True)
        else:
            with torch.no_grad():
                run(tensors, rays)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    planes = tensors[0].nbytes
    benchmark.extra_info.update(
        op=f"render_triplane_{direction}",
        shape=f"{SIDE}x{SIDE}x{SAMPLES}+{SAMPLES}",
        dtype=dtype,
        layout="contiguous",
        route=route,
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        bytes=(1 + backward) * (planes + features.nbytes) + 6 * 4 * SIDE**2,
        flop=2 * SIDE**2 * 2 * SAMPLES * D * (F + 1 + C) * (3 if backward else 1),
    )
    benchmark.pedantic(timed, rounds=20 if DEVICE == "cuda" else 5, warmup_rounds=1)


@pytest.mark.parametrize("route", ["fastgen", "pytorch", "torch.compile"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_sample(benchmark, direction, dtype, layout, route):
    def sample(planes, points):
        return ops.sample_triplane(planes, points, reduce="mean")

    def plain(planes, points):
        with fastgen.backend("reference"):
            return sample(planes, points)

    run = {"fastgen": sample, "pytorch": plain, "torch.compile": plain}[route]
    if route == "torch.compile":
        torch.compiler.reset()
        run = torch.compile(plain, dynamic=False)
    origins, directions = camera.rays(presets.get("ffhq512").camera.front().to(DEVICE), 64)
    depths = torch.linspace(OPTIONS["ray_start"], OPTIONS["ray_end"], 32, device=DEVICE)
    points = (origins[:, :, None] + depths[:, None] * directions[:, :, None]).flatten(1, 2)
    planes = torch.randn(1, 3 * F, 256, 256).to(DEVICE, DTYPES[dtype])
    if layout == "channels_last":
        planes = planes.contiguous(memory_format=torch.channels_last)
    planes = planes.view(1, 3, F, 256, 256)

    with torch.no_grad():
        few = points[:, ::97]
        exact = plain(planes.double(), few.double())
        error = (run(planes, few).double() - exact).abs().max()
        # Positions are float32: off by 1e-5 of a pixel.
        allowed = 4 * torch.finfo(DTYPES[dtype]).eps + 1e-4
        assert error <= allowed * exact.abs().max(), "wrong result, not timed"

    backward = direction == "backward"
    tensors = [x.requires_grad_(backward) for x in (planes, points)]
    with torch.set_grad_enabled(backward):
        features = run(*tensors)
    dy = torch.randn_like(features)

    def timed():
        if backward:
            torch.autograd.grad(features, tensors, dy, retain_graph=True)
        else:
            with torch.no_grad():
                run(*tensors)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(
        op=f"sample_triplane_{direction}",
        shape=f"{'x'.join(map(str, planes.shape))} at {points.shape[1]}",
        dtype=dtype,
        layout=layout,
        route=route,
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        bytes=(1 + backward) * (planes.nbytes + points.nbytes) + features.nbytes,
        # A product and a sum a corner; backward, one pair for each gradient.
        flop=3 * 8 * features.numel() * (1 + backward),
    )
    benchmark.pedantic(timed, rounds=20 if DEVICE == "cuda" else 5, warmup_rounds=1)
