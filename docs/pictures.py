"""The pictures of docs/ops.md, each of what the op computes: python docs/pictures.py [FOLDER].

Where they go is this folder, unless another one is given. The same machine draws the same bytes.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fastgen
from fastgen import camera, ops, pictures
from fastgen.ops import _march
from fastgen.ops.bias_act import DEFAULTS

INK, BLUE, ORANGE = "0.15", "#2060a0", "#d06010"
FILTER = [1, 3, 3, 1]
SEED = 5  # a head with ears: edges at all angles
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False}


def panels(count: int, width: float = 1.9, height: float = 2.1, rows: int = 1):
    figure, axes = plt.subplots(
        rows, count, figsize=(width * count, height * rows), squeeze=False, layout="constrained"
    )
    return figure, list(axes.flat)


def show(axis, image: Tensor, title: str, **options):
    """An image [3, H, W] in [-1, 1], or a map [H, W] in grey."""
    if image.ndim == 3:
        image = pictures.pixels(image)
        axis.imshow(image, interpolation="nearest")
    else:
        axis.imshow(
            image.numpy(), **{"cmap": "gray", "vmin": -1, "vmax": 1, "interpolation": "nearest"} | options
        )
    axis.set_title(title)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(True)
        spine.set_color("0.8")


def curve(x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return x.detach().numpy(), y.detach().numpy()


def zone_plate(size: int, fastest: float) -> Tensor:
    """Rings [1, 1, H, W] whose frequency grows from the centre on, to `fastest` of a period a pixel."""
    x = torch.arange(size) - (size - 1) / 2
    return torch.cos(torch.pi * fastest / (size / 2) * (x.square()[:, None] + x.square()))[None, None]


def draw_upfirdn2d(head: Tensor):
    figure, axes = panels(6)
    small, f = F.adaptive_avg_pool2d(head, 32)[..., 2:22, 6:26], ops.setup_filter(FILTER)
    show(axes[0], small[0], "x, 20 x 20")
    show(axes[1], (ops.upfirdn2d(small + 1, None, up=2) - 1)[0], "up=2, f=None: zeros")
    show(axes[2], ops.upsample2d(small, f)[0], "upsample2d(x, f)")
    rings = zone_plate(128, 0.5)
    show(axes[3], rings[0, 0], "x, 128 x 128")
    show(axes[4], ops.upfirdn2d(rings, None, down=2)[0, 0], "down=2, f=None: aliases")
    show(axes[5], ops.downsample2d(rings, f)[0, 0], "downsample2d(x, f)")
    return figure


def draw_setup_filter(head: Tensor):
    figure, axes = panels(2, 2.6, 2.0)
    f = ops.setup_filter(FILTER).numpy()
    axes[0].imshow(f, cmap="Blues", vmin=0)
    for i in range(4):
        for j in range(4):
            axes[0].text(
                j,
                i,
                f"{f[i, j] * 64:.0f}",
                ha="center",
                va="center",
                color="white" if f[i, j] * 64 > 5 else INK,
            )
    axes[0].set_title("setup_filter([1, 3, 3, 1]) * 64")
    axes[0].set_axis_off()
    for taps, colour in (([1, 1], ORANGE), (FILTER, BLUE)):
        response = torch.fft.rfft(ops.setup_filter(taps, separable=True), 256).abs().numpy()
        axes[1].plot(np.linspace(0, 0.5, len(response)), response, color=colour, label=str(taps))
    axes[1].set(title="what it lets through", xlabel="periods per sample", ylim=(0, 1.05), xlim=(0, 0.5))
    axes[1].legend(frameon=False)
    return figure


@torch.enable_grad()
def draw_bias_act(head: Tensor):
    figure, axes = panels(5, 1.7, 1.5, rows=2)
    x = torch.linspace(-3, 3, 301, requires_grad=True)
    for axis, (act, (_, gain)) in zip(axes, DEFAULTS.items(), strict=False):
        y = ops.bias_act(x, act=act)
        (slope,) = torch.autograd.grad(y.sum(), x)
        axis.axhline(0, color="0.85", lw=0.8)
        axis.axvline(0, color="0.85", lw=0.8)
        axis.plot(*curve(x, y), color=BLUE, label="value")
        axis.plot(*curve(x, slope), color=ORANGE, ls="--", lw=1, label="derivative")
        axis.set(title=f"{act}, gain {gain:.4g}", ylim=(-2.2, 3.2), xticks=(-2, 0, 2), yticks=(-2, 0, 2))
    axes[-1].set_axis_off()
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center", frameon=False)
    return figure


def draw_filtered_lrelu(head: Tensor):
    figure, axes = panels(4, 2.1, 2.1)
    rings = zone_plate(160, 0.5)
    # Twelve taps, the lower half of the band at twice the rate: a windowed sinc.
    t = torch.arange(12) - 5.5
    taps = torch.sinc(t / 2) * torch.kaiser_window(12, periodic=False, beta=4)
    f = ops.setup_filter(taps, separable=True)
    plain = ops.bias_act(rings, act="lrelu")
    filtered = ops.filtered_lrelu(rings, f, f, up=2, down=2, padding=11)
    corner = slice(52, 108), slice(92, 148)  # from 0.08 to 0.43 of a period a pixel
    show(axes[0], rings[0, 0][corner], "x: ever finer rings")
    show(axes[1], plain[0, 0][corner], "lrelu(x)", vmin=-0.4, vmax=1.4)
    show(axes[2], filtered[0, 0][corner], "filtered_lrelu(x)", vmin=-0.4, vmax=1.4)
    # A wave of 0.35 periods a sample; its double, 0.7, is seen as 0.3, and so on.
    n = 400
    wave = torch.cos(2 * torch.pi * 0.35 * torch.arange(n)).expand(1, 1, 24, n)
    for y, colour, label in (
        (ops.bias_act(wave, act="lrelu"), ORANGE, "lrelu"),
        (ops.filtered_lrelu(wave, f, f, up=2, down=2, padding=11), BLUE, "filtered_lrelu"),
    ):
        spectrum = torch.fft.rfft(y[0, 0, 12, 100:300]).abs() / 100
        at = torch.linspace(0, 0.5, len(spectrum)) + (0.004 if colour == BLUE else -0.004)
        axes[3].vlines(at.numpy(), 0, spectrum.numpy(), color=colour, lw=2, label=label)
    axes[3].set(title="a wave of 0.35: what comes out", xlabel="periods per sample", ylim=(0, 1.2), yticks=())
    axes[3].legend(frameon=False, loc="upper center", fontsize=7)
    return figure


def draw_conv2d_resample(head: Tensor):
    figure, axes = panels(4)
    f, x = ops.setup_filter(FILTER), head
    edges = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]).expand(3, 1, 3, 3)
    for axis, (title, options) in zip(
        axes[1:],
        (("w: horizontal slope", {}), ("up=2", {"up": 2}), ("down=2", {"down": 2})),
        strict=True,
    ):
        y = ops.conv2d_resample(x, edges, f, padding=1, groups=3, **options)
        show(axis, y.mean(1)[0], f"{title}: {y.shape[2]} x {y.shape[3]}")
    show(axes[0], x[0], f"x: {x.shape[2]} x {x.shape[3]}")
    return figure


def draw_modulated_conv2d(head: Tensor):
    figure, axes = panels(5, 1.8, 2.1)
    # Six channels in: the colours, and what a blur takes from them.
    blurred = ops.filter2d(head, ops.setup_filter([1, 4, 6, 4, 1]))
    x = torch.cat([blurred, head - blurred], 1)
    weight = torch.cat([torch.eye(3), torch.eye(3)], 1)[:, :, None, None]
    cases = {"styles 1 1 1 1 1 1": [1] * 6, "1 1 1 0 0 0: blur": [1] * 3 + [0] * 3}
    cases |= {"1 1 1 4 4 4: sharp": [1] * 3 + [4] * 3, "0 0 0 1 1 1: detail": [0] * 3 + [1] * 3}
    for axis, (title, styles) in zip(axes, cases.items(), strict=False):
        y = ops.modulated_conv2d(x, weight, torch.tensor([styles]).float(), demodulate=False)
        show(axis, y[0], title)
    noise = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    w = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(1)) / 12
    scales = torch.linspace(0.05, 4, 20)
    for demodulate, colour in ((False, ORANGE), (True, BLUE)):
        out = [
            ops.modulated_conv2d(noise, w, s.expand(1, 16), padding=1, demodulate=demodulate) for s in scales
        ]
        label = f"demodulate={demodulate}"
        axes[4].plot(scales.numpy(), [y.std().item() for y in out], color=colour, label=label)
    axes[4].set(title="deviation of the result", xlabel="all styles", xlim=(0, 4), ylim=(0, 4))
    axes[4].legend(frameon=False, loc="upper left", fontsize=7)
    return figure


def draw_grid_sample(head: Tensor):
    figure, axes = panels(3)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128), indexing="ij")
    turn = 1.5 * (1 - (x.square() + y.square()).sqrt()).clamp(min=0)
    swirl = torch.stack([x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()], -1)
    show(axes[0], head[0], "x")
    for axis, grid, title in (
        (axes[1], torch.stack([x, y], -1) * 1.4, "positions times 1.4"),
        (axes[2], swirl, "positions turned"),
    ):
        # Zero outside, which is grey.
        show(axis, ops.grid_sample(head, grid[None])[0], title)
    return figure


def draw_sample_triplane(scene):
    teacher, planes, _ = scene
    figure = plt.figure(figsize=(8.4, 2.3), layout="constrained")
    grid = figure.add_gridspec(1, 4, width_ratios=(1.25, 1, 1, 1))
    axis = figure.add_subplot(grid[0], projection="3d", computed_zorder=False)
    images = feature_colours(planes[0])
    point, n = torch.tensor([0.35, 0.55, -0.3]), 33
    u = torch.linspace(-1, 1, n)
    a, b = (t.numpy() for t in torch.meshgrid(u, u, indexing="xy"))
    names = ("x", "y", "z")
    axes_of = {"fixed": ((0, 1), (0, 2), (2, 1))}[teacher.plane_axes]
    for image, (column, row) in zip(images, axes_of, strict=True):
        places = [a * 0 for _ in range(3)]
        places[column], places[row] = a, b
        small = F.adaptive_avg_pool2d(image.movedim(-1, 0), n - 1).movedim(0, -1).numpy()
        # matplotlib's z points up; ours is y.
        axis.plot_surface(
            places[0],
            places[2],
            places[1],
            facecolors=small,
            rstride=1,
            cstride=1,
            shade=False,
            alpha=0.6,
            linewidth=0,
            antialiased=False,
        )
        foot = torch.zeros(3)
        foot[column], foot[row] = point[column], point[row]
        axis.plot(*(torch.stack([point, foot])[:, k].numpy() for k in (0, 2, 1)), "k:.", lw=1, ms=4, zorder=9)
    axis.scatter(*(point[k].item() for k in (0, 2, 1)), color="black", s=18, zorder=10)
    for name, place in (("x", (1.1, 0, 0)), ("z", (-0.1, 1.2, 0)), ("y", (0, 0, 1.1))):
        axis.text(*place, name, zorder=11)
    axis.set_axis_off()
    axis.set_box_aspect((1, 1, 1), zoom=1.5)
    axis.view_init(24, -58)
    for i, (image, (column, row)) in enumerate(zip(images, axes_of, strict=True)):
        axis = figure.add_subplot(grid[i + 1])
        axis.imshow(image.numpy(), extent=(-1, 1, 1, -1), interpolation="nearest")
        axis.scatter(point[column].item(), point[row].item(), color="black", s=18)
        axis.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1), xlabel=names[column], ylabel=names[row])
        axis.set_title(f"planes[:, {i}]")
    return figure


def feature_colours(planes: Tensor) -> Tensor:
    """Of planes [3, C, H, W] the three main components as colours [3, H, W, 3]."""
    features = planes.movedim(1, -1)
    flat = features.flatten(0, 2)
    flat = flat - flat.mean(0)
    directions = torch.linalg.svd(flat, full_matrices=False)[2][:3]
    directions = directions * directions.sum(1, keepdim=True).sign()
    colours = flat @ directions.T
    return (colours / colours.std(0) / 5 + 0.5).clamp(0, 1).view(*features.shape[:3], 3)


def draw_render_triplane(scene):
    teacher, planes, c = scene
    side = 96
    origins, directions = camera.rays(c, side)
    decoder, options = teacher.decoder.effective(), teacher.render_options
    out = ops.render_triplane(planes, decoder, origins, directions, options)
    image, depth, weight = (t[0].T.unflatten(1, (side, side)) for t in out)

    figure = plt.figure(figsize=(8, 2.3), layout="constrained")
    axis, *axes = figure.subplots(1, 4, width_ratios=(1.7, 1, 1, 1))
    ray = 48 * side + 52
    start, end = options["ray_start"], options["ray_end"]
    coarse = _march.coarse_depths(start, end, torch.full((1, options["depth_resolution"]), 0.5), False)
    fine = _march.importance_depths(
        _march.weights(density(teacher, planes, origins, directions, ray, coarse), coarse),
        coarse,
        (torch.arange(options["depth_resolution_importance"])[None] + 0.5)
        / options["depth_resolution_importance"],
    )
    t = torch.linspace(start, end, 300)[None]
    along = F.softplus(density(teacher, planes, origins, directions, ray, t) - 1)
    axis.plot(*curve(t[0], along[0] / along.max()), color=INK, lw=1, label="density")
    for depths, height, colour, label in (
        (coarse, -0.1, BLUE, "coarse samples"),
        (fine, -0.22, ORANGE, "importance samples"),
    ):
        axis.plot(*curve(depths[0], torch.full_like(depths[0], height)), "|", color=colour, ms=7, label=label)
    axis.axvline(out.depth[0, ray].item(), ymax=0.68, color="0.6", lw=1, ls="--", label="depth")
    axis.set(xlabel="depth along one ray", yticks=(), ylim=(-0.35, 1.75))
    axis.set_title("where samples lie")
    axis.legend(frameon=False, fontsize=7, loc="upper center", ncols=2, columnspacing=1)
    axis.spines["left"].set_visible(False)
    show(axes[0], image[:3], "features, first three")
    for column, row in ((ray % side, ray // side),):
        axes[0].plot(column, row, "+", color="black", ms=8)
    nearest, farthest = depth.min().item(), depth.max().item()
    show(axes[1], depth[0], "depth: near is dark", vmin=nearest, vmax=farthest)
    show(axes[2], weight[0], "weight", vmin=0, vmax=1)
    return figure


def density(teacher, planes, origins, directions, ray: int, depths: Tensor) -> Tensor:
    """Before softplus, at depths [1, T] of one ray."""
    points = origins[:, ray] + depths[0, :, None] * directions[:, ray]
    options = teacher.render_options
    features = ops.sample_triplane(
        planes, points[None], options["box_warp"], options["plane_axes"], reduce="mean"
    )
    return teacher.decoder(features)[0][..., 0]


@torch.no_grad()
@plt.rc_context(STYLE)
def draw(folder: Path) -> list[Path]:
    """Write ops_NAME.png for each function draw_NAME here."""
    teacher = fastgen.load_teacher("toy")
    c = teacher.camera.at(teacher.camera.azimuth_mean + 0.5, teacher.camera.polar_mean - 0.15)
    ws = teacher.mapping(pictures.latents([SEED], teacher.z_dim), c)
    head = teacher.synthesis(ws, c)["image"]
    scene = teacher, teacher.backbone_planes(ws), c
    written = []
    for name, function in globals().copy().items():
        if name.startswith("draw_"):
            figure = function(scene if "triplane" in name else head)
            path = folder / f"ops_{name.removeprefix('draw_')}.png"
            figure.savefig(path, dpi=100, metadata={"Software": None}, bbox_inches="tight", pad_inches=0.04)
            plt.close(figure)
            written.append(path)
    return written


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent):
        print(path)
