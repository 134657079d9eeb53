"""EG3D's renderer: fused where it may be, step by step where it must."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from repositories import DATA, close
from torch import nn

from fastgen import compat, ops
from fastgen.compat import eg3d

RENDER = json.loads((DATA / "render.json").read_text())


RENDERED = np.load(DATA / "render.npz")


class Layer(nn.Module):
    """A linear layer as EG3D has it: gains at run time."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight * 4), nn.Parameter(bias * 2)
        self.activation, self.weight_gain, self.bias_gain = "linear", 0.25, 0.5

    def forward(self, x):
        return F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)


class Decoder(nn.Module):
    def __init__(self, w1, b1, w2, b2):
        super().__init__()
        self.net = nn.Sequential(Layer(w1, b1), nn.Softplus(), Layer(w2, b2))

    def forward(self, features, directions):
        x = self.net(features.mean(1))
        return {"rgb": x[..., 1:].sigmoid() * 1.002 - 0.001, "sigma": x[..., :1]}


class OwnDecoder(Decoder):
    def forward(self, features, directions):
        out = super().forward(features, directions)
        return out | {"rgb": out["rgb"].square()}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "step by step"])
@pytest.mark.parametrize("i", range(len(RENDER)))
def test_eg3d_renders_the_golden_data(i, fused, monkeypatch):
    compat.install("eg3d")
    from training.volumetric_rendering.ray_marcher import MipRayMarcher2
    from training.volumetric_rendering.renderer import ImportanceRenderer

    case, x = (
        RENDER[i],
        {k.split(".", 1)[1]: torch.from_numpy(RENDERED[k]) for k in RENDERED if k.startswith(f"{i}.")},
    )
    renderer, decoder = ImportanceRenderer(), Decoder(*(x[name] for name in ("w1", "b1", "w2", "b2")))
    assert isinstance(renderer.ray_marcher, MipRayMarcher2)
    if not fused:
        monkeypatch.setattr(eg3d, "decoder_layers", lambda *_: None)
    else:
        monkeypatch.setattr(eg3d, "composite", None)  # which only the steps take
    draws = [x["u_coarse"], *([x["u_fine"].flatten(0, 1)] if "u_fine" in x else [])]
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: draws.pop(0))
    options = case.get("options", case)
    rays = (x.get("rays_o", x.get("ray_origins")), x.get("rays_d", x.get("ray_directions")))
    out = renderer(x["planes"], decoder, *rays, {"density_noise": 0, **options})
    for got, name in zip(out, ("features", "depth", "weight"), strict=True):
        want = x[name]
        error = (got - want).abs().max()
        assert error <= 1e-3 * want.abs().max(), name
    assert not draws


def test_eg3d_takes_the_steps_where_it_must(monkeypatch):
    weights = torch.randn(8, 4), torch.randn(8), torch.randn(4, 8), torch.randn(4)
    planes = torch.randn(1, 3, 4, 8, 8)
    assert eg3d.decoder_layers(Decoder(*weights), planes) is not None
    assert eg3d.decoder_layers(OwnDecoder(*weights), planes) is None
    assert eg3d.decoder_layers(nn.Linear(4, 4), planes) is None
    more = Decoder(*weights)
    more.extra = nn.Linear(3, 3)  # of which nothing is to be seen yet
    assert eg3d.decoder_layers(more, planes) is None

    options = {
        "ray_start": 2.0,
        "ray_end": 3.0,
        "depth_resolution": 6,
        "depth_resolution_importance": 6,
        "box_warp": 1.0,
        "clamp_mode": "softplus",
        "disparity_space_sampling": False,
    }
    rays = (
        torch.tensor([[[0.0, 0.0, 2.5]]]).expand(1, 5, 3),
        F.normalize(torch.randn(1, 5, 3) * 0.05 + torch.tensor([0, 0, -1.0]), dim=-1),
    )

    class Counting(eg3d.ImportanceRenderer):
        calls = 0

        def run_model(self, *args):
            self.calls += 1
            return super().run_model(*args)

    torch.manual_seed(0)
    plain = eg3d.ImportanceRenderer()(planes, Decoder(*weights), *rays, options)
    torch.manual_seed(0)
    counting = Counting()
    stepped = counting(planes, Decoder(*weights), *rays, options)
    assert counting.calls == 2
    for a, b in zip(plain, stepped, strict=True):
        close(a, b)
    single = eg3d.ImportanceRenderer()(
        planes, OwnDecoder(*weights), *rays, options | {"depth_resolution_importance": 0}
    )
    assert single[0].shape == (1, 5, 3)
    torch.manual_seed(0)
    noisy = eg3d.ImportanceRenderer()(planes, Decoder(*weights), *rays, options | {"density_noise": 5.0})
    assert (noisy[0] - plain[0]).abs().max() > 1e-3
    planes.requires_grad_()
    decoder = Decoder(*weights)
    eg3d.ImportanceRenderer()(planes, decoder, *rays, options)[0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (planes, *decoder.parameters()))


def test_eg3d_keeps_a_repositorys_own_planes(repository):
    axes = eg3d.generate_planes().tolist()
    axes[2] = axes[2][0], axes[2][2], axes[2][1]  # (z, y)
    repository(
        {
            "training/__init__.py": "",
            "training/volumetric_rendering/__init__.py": "",
            "training/volumetric_rendering/renderer.py": (
                "import torch\nfrom training.volumetric_rendering.ray_marcher import MipRayMarcher2\n"
                f"def generate_planes():\n    return torch.tensor({axes}, dtype=torch.float32)\n"
                "def sample_from_3dgrid(grid, coordinates):\n    return 5\n"
                "class ImportanceRenderer:\n    pass\n"
            ),
            "training/volumetric_rendering/ray_marcher.py": "class MipRayMarcher2:\n    pass\n",
        }
    )
    compat.install("eg3d")
    from training.volumetric_rendering import renderer

    assert renderer.sample_from_3dgrid(None, None) == 5 and renderer.MipRayMarcher2 is eg3d.MipRayMarcher2
    mine = renderer.ImportanceRenderer()
    assert isinstance(mine, eg3d.ImportanceRenderer) and mine.plane_axes[2, 1].tolist() == [0, 1, 0]
    planes, points = torch.randn(1, 3, 2, 4, 4), torch.rand(1, 5, 3) - 0.5
    close(
        renderer.sample_from_planes(mine.plane_axes, planes, points, padding_mode="zeros", box_warp=1.0),
        ops.sample_triplane(planes, points, plane_axes="fixed"),
    )
    compat.uninstall()
    from training.volumetric_rendering import renderer

    assert not issubclass(renderer.ImportanceRenderer, eg3d.ImportanceRenderer)


def test_eg3d_samples_as_torch_does():
    axes, planes, points = eg3d.generate_planes(), torch.randn(2, 3, 2, 4, 5), torch.randn(2, 6, 3)
    x, y, z = (points * 2).unbind(-1)
    grid = torch.stack([torch.stack(p, -1) for p in ((x, y), (x, z), (z, x))], 1)
    close(eg3d.project_onto_planes(axes, points * 2), grid.flatten(0, 1))
    for mode, padding in (("bilinear", "zeros"), ("nearest", "zeros"), ("bilinear", "border")):
        want = F.grid_sample(
            planes.flatten(0, 1), grid.flatten(0, 1)[:, None], mode, padding, align_corners=False
        )
        got = eg3d.sample_from_planes(axes, planes, points, mode, padding, box_warp=1.0)
        close(got, want[:, :, 0].mT.unflatten(0, (2, 3)))


def test_eg3d_installed_after_the_import_keeps_the_planes(repository):
    repository(
        {
            "training/volumetric_rendering/renderer.py": (
                "import torch\ndef generate_planes():\n    return torch.ones(3, 3, 3)\n"
                "class ImportanceRenderer:\n    pass\n"
            )
        }
    )
    from training.volumetric_rendering import renderer

    compat.install("eg3d")
    assert renderer.generate_planes().sum() == 27
    assert renderer.ImportanceRenderer().plane_axes.sum() == 27


class Training(Decoder):
    def forward(self, features, directions):
        return super().forward(features * (2 if self.training else 1), directions)


class Annealed(Decoder):
    alpha = 0.0

    def forward(self, features, directions):
        return super().forward(features * (1 + self.alpha), directions)


class Sum(Decoder):
    def forward(self, features, directions):
        return super().forward(features.sum(1, keepdim=True), directions)


def test_a_decoder_is_looked_at_again():
    planes, weights = (
        torch.randn(1, 3, 4, 8, 8),
        (torch.randn(8, 4), torch.randn(8), torch.randn(4, 8), torch.randn(4)),
    )

    def is_plain(decoder):
        return eg3d.decoder_layers(decoder, planes) is not None

    decoder = Training(*weights).eval()
    assert is_plain(decoder) and not is_plain(decoder.train())
    decoder = Annealed(*weights)
    assert is_plain(decoder)
    decoder.alpha = 0.5
    assert not is_plain(decoder)
    assert not is_plain(Sum(torch.zeros(8, 4), torch.zeros(8), torch.zeros(4, 8), torch.zeros(4)))
    decoder = Decoder(*weights)
    assert is_plain(decoder)
    decoder.net[0].register_forward_hook(lambda module, inputs, output: output + 1)
    assert not is_plain(decoder)
