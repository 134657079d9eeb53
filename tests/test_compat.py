"""Throw-away repositories in each dialect, on fastgen's ops: their numbers are those of the golden data."""

import json
import os
import pickle
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen import compat, ops
from fastgen.compat import eg3d, scan

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "ops.json").read_text())
ARRAYS = np.load(DATA / "ops.npz")
RENDER = json.loads((DATA / "render.json").read_text())
RENDERED = np.load(DATA / "render.npz")
# What a repository has that does not compile: importing it must never happen.
BROKEN = "raise RuntimeError('Setting up PyTorch plugin ... Failed!')\n"
UPFIRDN2D = "def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl='cuda'): ...\n"
OTHER_UPFIRDN2D = "def upfirdn2d(input, kernel, up=1, down=1, pad=(0, 0)): ...\n"


def fused_act(second: str) -> str:
    return (
        "class FusedLeakyReLU:\n"
        f"    def __init__(self, channel, {second}, scale=2**0.5): ...\n"
        "def fused_leaky_relu(input, bias, negative_slope=0.2, scale=2**0.5): ...\n"
    )


@pytest.fixture(autouse=True)
def clean(tmp_path):
    path = list(sys.path)
    yield
    compat.uninstall()
    sys.path[:] = path
    inside = [
        name
        for name, module in sys.modules.items()
        if any(
            str(place).startswith(str(tmp_path))
            for place in (vars(module).get("__file__"), *(vars(module).get("__path__") or ()))
        )
    ]
    for name in inside:
        del sys.modules[name]
    assert not [finder for finder in sys.meta_path if type(finder).__module__ == "fastgen.compat"]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Writes files, {name: text}, of a repository whose folder has a space in it, and puts it on the path."""

    def write(files: dict[str, str]) -> Path:
        root = tmp_path / "a repository"
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        monkeypatch.syspath_prepend(str(root))
        return root

    return write


def golden(op: str):
    """Cases of an op: its arguments and its result."""
    for i, case in enumerate(CASES):
        if case["op"] == op:
            inputs = {
                n: torch.from_numpy(ARRAYS[k]) for n in case["inputs"] if (k := f"{i}.in.{n}") in ARRAYS
            }
            params = {k: v for k, v in case["params"].items() if k not in ("filter_taps", "k")}
            left = {name: x for name, x in inputs.items() if name not in ("dy", "r")}
            yield left, params, torch.from_numpy(ARRAYS[f"{i}.out"])


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5 * max(1, want.abs().max().item()))


NVIDIA = {
    "torch_utils/__init__.py": "",
    "torch_utils/misc.py": "here = 1\n",
    "torch_utils/ops/__init__.py": "",
}
NVIDIA |= {f"torch_utils/ops/{name}.py": BROKEN for name in import_module("fastgen.compat.nvidia").MODULES}
NVIDIA["torch_utils/ops/mine.py"] = "mine = 2\n"


@pytest.mark.parametrize("own", [True, False], ids=["with its torch_utils", "without"])
def test_nvidia(repository, own):
    repository(NVIDIA if own else {"README": ""})
    compat.install("nvidia")
    compat.install("nvidia")
    assert compat.installed() == [("nvidia", None)]
    from torch_utils.ops import bias_act, conv2d_resample, filtered_lrelu, fma, grid_sample_gradfix, upfirdn2d

    modules = {"bias_act": bias_act, "conv2d_resample": conv2d_resample, "filtered_lrelu": filtered_lrelu}
    modules |= dict.fromkeys(("upfirdn2d", "upsample2d", "downsample2d", "filter2d"), upfirdn2d)
    for op, module in modules.items():
        for inputs, params, want in golden(op):
            inputs.setdefault("f", None) if module is upfirdn2d else None
            impl = {} if op == "conv2d_resample" else {"impl": "ref"}
            close(getattr(module, op)(**inputs, **params, **impl), want)
    assert bias_act.activation_funcs["lrelu"].def_gain == pytest.approx(2**0.5)
    x = torch.randn(2, 3)
    close(bias_act.activation_funcs["swish"].func(x, alpha=0), x * x.sigmoid())
    close(bias_act.activation_funcs["lrelu"].func(x, alpha=0.1), F.leaky_relu(x, 0.1))
    assert upfirdn2d._init() and fma.fma(x, x, x).shape == x.shape
    assert upfirdn2d.setup_filter([1, 3, 3, 1]).shape == (4, 4)
    image, grid = torch.randn(1, 2, 4, 4), torch.rand(1, 3, 3, 2) * 2 - 1
    close(grid_sample_gradfix.grid_sample(image, grid), F.grid_sample(image, grid, align_corners=False))
    with pytest.raises(ValueError, match="upsample2d: impl must be 'cuda' or 'ref', got 'cpu'"):
        upfirdn2d.upsample2d(x, None, impl="cpu")
    if own:
        import torch_utils.misc
        import torch_utils.ops.mine

        assert (torch_utils.misc.here, torch_utils.ops.mine.mine) == (1, 2)
        assert "a repository" in torch_utils.ops.__path__[0]


def test_weights_without_gradients():
    compat.install("nvidia")
    from torch_utils.ops import conv2d_gradfix, conv2d_resample

    conv2d_gradfix.enabled = True
    x, w = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    calls = [
        lambda: conv2d_gradfix.conv2d(x, w, padding=1),
        lambda: conv2d_gradfix.conv_transpose2d(x, w.transpose(0, 1), stride=2),
        lambda: conv2d_resample.conv2d_resample(x, w, padding=1),
    ]
    for call in calls:
        x.grad = w.grad = None
        with conv2d_gradfix.no_weight_gradients():
            # As R1: the image's gradient within, the penalty's outside, where weights have theirs.
            (dx,) = torch.autograd.grad(call().sum(), x, create_graph=True)
            call().sum().backward(retain_graph=True)
        assert w.grad is None and x.grad is not None
        dx.square().sum().backward()
        assert w.grad.abs().sum() > 0
        close(
            torch.autograd.grad(call().square().sum(), w)[0], torch.autograd.grad(call().square().sum(), w)[0]
        )


@pytest.mark.parametrize("name", ["torch_utils.ops", "stylegan_human.torch_utils.ops", "custom.gan_ops"])
def test_names_of_packages(name):
    compat.install("nvidia", prefix=name)
    module = import_module(f"{name}.upfirdn2d")
    assert module.upfirdn2d.__wrapped__ is ops.upfirdn2d
    compat.uninstall()
    assert not [m for m in sys.modules if m.split(".")[0] == name.split(".")[0]]
    with pytest.raises(ModuleNotFoundError):
        import_module(f"{name}.upfirdn2d")


@pytest.mark.parametrize("package", ["op", "models.stylegan2.op", "model.stylegan.op", "training.op"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "missing"])
def test_rosinality(repository, package, own):
    folder = package.replace(".", "/")
    files = {f"{parent}/__init__.py": "" for parent in map(str, Path(folder).parents) if parent != "."}
    if own:
        files |= {f"{folder}/{name}.py": BROKEN for name in ("fused_act", "upfirdn2d", "conv2d_gradfix")}
        files[f"{folder}/__init__.py"] = (
            "from .fused_act import FusedLeakyReLU, fused_leaky_relu\nfrom .upfirdn2d import upfirdn2d\n"
        )
    repository(files | {"README": ""})
    compat.install("rosinality", prefix=None if own or package == "op" else package)
    op = import_module(package)
    inner = {n: import_module(f"{package}.{n}") for n in ("fused_act", "upfirdn2d", "conv2d_gradfix")}
    assert op.FusedLeakyReLU is inner["fused_act"].FusedLeakyReLU
    for inputs, params, want in golden("upfirdn2d"):
        f = inputs.get("f")
        if f is None or f.ndim == 1 or params.get("flip_filter"):
            continue
        pad = tuple(params.get("padding", (0, 0)))
        up, down = params.get("up", 1), params.get("down", 1)
        close(op.upfirdn2d(inputs["x"], f * params.get("gain", 1), up, down, pad), want)
    seen = 0
    for inputs, params, want in golden("bias_act"):
        if params.get("act") == "lrelu" and not params.get("clamp") and params.get("dim", 1) == 1:
            alpha, gain = params.get("alpha") or 0.2, params.get("gain") or 2**0.5
            close(op.fused_leaky_relu(inputs["x"], inputs.get("b"), alpha, gain), want)
            seen += 1
    assert seen
    layer = op.FusedLeakyReLU(3, True, 0.1)
    assert (layer.negative_slope, list(layer.state_dict())) == (0.1, ["bias"])
    assert op.FusedLeakyReLU(3, bias=False).bias is None
    x = torch.randn(2, 3, 5, 6)
    # A pair is before and after, on both axes.
    kernel = torch.rand(3, 2)
    close(op.upfirdn2d(x, kernel, pad=(2, 1)), ops.upfirdn2d(x, kernel, padding=[2, 1, 2, 1]))


def test_raw_extensions():
    compat.install("rosinality")
    from op.fused_act import fused
    from op.upfirdn2d import upfirdn2d_op

    x, b, none = torch.randn(2, 3, 4), torch.randn(3), torch.empty(0)
    v = x + b[:, None]
    y = F.leaky_relu(v, 0.2) * 1.5
    close(fused.fused_bias_act(x, b, none, 3, 0, 0.2, 1.5), y)
    close(fused.fused_bias_act(x, none, y, 3, 1, 0.2, 1.5), x * torch.where(y > 0, 1, 0.2) * 1.5)
    close(fused.fused_bias_act(x, b, y, 3, 1, 0.2, 1.5), v * torch.where(y > 0, 1, 0.2) * 1.5)
    assert not fused.fused_bias_act(x, none, y, 3, 2, 0.2, 1.5).any()
    close(fused.fused_bias_act(x, b, none, 1, 0, 0.2, 1.5), v * 1.5)
    with pytest.raises(ValueError, match="fused_bias_act: act must be 1 or 3 .* got 2 and 0"):
        fused.fused_bias_act(x, b, none, 2, 0, 0.2, 1.5)
    x, kernel = torch.randn(6, 4, 5, 2), torch.rand(2, 3)
    want = ops.upfirdn2d(x.permute(0, 3, 1, 2), kernel, [2, 3], [1, 2], [3, 0, 1, 2]).permute(0, 2, 3, 1)
    close(upfirdn2d_op.upfirdn2d(x, kernel, 2, 3, 1, 2, 3, 0, 1, 2), want)


@pytest.mark.parametrize("layout", ["basicsr", "face_model", "missing"])
def test_basicsr(repository, layout):
    package = "face_model.op" if layout == "face_model" else "basicsr.ops"
    if layout == "face_model":
        files = {"face_model/__init__.py": "", "face_model/op/__init__.py": "from .fused_act import *\n"}
        files |= {f"face_model/op/{name}.py": BROKEN for name in ("fused_act", "upfirdn2d")}
    elif layout == "basicsr":
        files = {
            "basicsr/__init__.py": "",
            "basicsr/ops/__init__.py": "",
            "basicsr/ops/dcn.py": "other = 3\n",
        }
        for name, names in (("fused_act", "FusedLeakyReLU, fused_leaky_relu"), ("upfirdn2d", "upfirdn2d")):
            files[f"basicsr/ops/{name}/__init__.py"] = f"from .{name} import {names}\n"
            files[f"basicsr/ops/{name}/{name}.py"] = BROKEN
    repository(files if layout != "missing" else {"README": ""})
    compat.install("basicsr")
    act = import_module(f"{package}.fused_act")
    resample = import_module(f"{package}.upfirdn2d")
    layer = act.FusedLeakyReLU(3, 0.1)
    assert layer.negative_slope == 0.1
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 4, 5)
    close(layer(x), F.leaky_relu(x + layer.bias[:, None, None], 0.1) * 2**0.5)
    close(act.fused_leaky_relu(x, layer.bias, device="cpu"), ops.bias_act(x, layer.bias, act="lrelu"))
    close(
        resample.upfirdn2d(x, torch.ones(3, 3), up=2, pad=(2, 0)),
        ops.upfirdn2d(x, torch.ones(3, 3), 2, 1, [2, 0, 2, 0]),
    )
    if layout == "basicsr":
        import basicsr.ops.dcn
        from basicsr.ops.fused_act.fused_act import fused_act_ext

        assert basicsr.ops.dcn.other == 3 and fused_act_ext.fused_bias_act


@pytest.mark.parametrize("own", ["whole", "lite", "missing"])
def test_mmcv(repository, own):
    files = {
        "mmcv/__init__.py": "",
        "mmcv/ops/__init__.py": "from .bias_act import bias_act\nfrom .nms import nms\n",
    }
    files |= {"mmcv/ops/bias_act.py": BROKEN, "mmcv/ops/nms.py": "nms = 4\n"}
    if own == "lite":
        files["mmcv/ops/nms.py"] = BROKEN
    if own == "whole":
        files["mmcv/_ext.py"] = ""
    repository(files if own != "missing" else {"README": ""})
    compat.install("mmcv")
    from mmcv.ops import bias_act
    from mmcv.ops.filtered_lrelu import filtered_lrelu
    from mmcv.ops.fused_bias_leakyrelu import FusedBiasLeakyReLU
    from mmcv.ops.upfirdn2d import upfirdn2d, upsample2d

    if own == "whole":
        from mmcv.ops import nms

        assert nms == 4
    for inputs, params, want in golden("bias_act"):
        close(bias_act(inputs["x"], inputs.get("b"), **params, use_custom_op=False), want)
    for inputs, params, want in golden("upfirdn2d"):
        close(upfirdn2d(inputs["x"], inputs.get("f"), **params, use_custom_op=True), want)
    for inputs, params, want in golden("filtered_lrelu"):
        inputs = {
            {"x": "input", "fu": "filter_up", "fd": "filter_down", "b": "bias"}[k]: v
            for k, v in inputs.items()
        }
        close(filtered_lrelu(**inputs, **params), want)
    x, kernel = torch.randn(1, 3, 4, 4), torch.rand(3, 3)
    close(upfirdn2d(x, kernel=kernel, pad=(2, 1)), ops.upfirdn2d(x, kernel, padding=[2, 1, 2, 1]))
    assert upsample2d(x, kernel, use_custom_op=False).shape == (1, 3, 8, 8)
    close(FusedBiasLeakyReLU(3)(x), F.leaky_relu(x, 0.2) * 2**0.5)


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


def test_modules_that_were_imported_before(repository):
    repository(
        NVIDIA | {"torch_utils/ops/upfirdn2d.py": "def upfirdn2d(x, f, impl='cuda'):\n    return 'old'\n"}
    )
    from torch_utils.ops import upfirdn2d

    compat.install("nvidia")
    assert upfirdn2d.upfirdn2d(torch.ones(1, 1, 2, 2), None, up=2).shape == (1, 1, 4, 4)
    assert upfirdn2d.setup_filter is ops.setup_filter
    compat.uninstall("rosinality")
    compat.uninstall("nvidia")
    assert upfirdn2d.upfirdn2d(None, None) == "old" and not hasattr(upfirdn2d, "setup_filter")


def test_wrong_names():
    with pytest.raises(ValueError, match="install: dialect must be one of nvidia, .* got 'stylegan'"):
        compat.install("stylegan")
    with pytest.raises(ValueError, match="uninstall: dialect must be one of"):
        compat.uninstall("stylegan")
    with pytest.raises(ValueError, match="install: prefix must be a dotted name .* got 'models/op'"):
        compat.install("nvidia", prefix="models/op")
    assert not compat.installed()


ALL = {
    "torch_utils/ops/upfirdn2d.py": UPFIRDN2D,
    "human/torch_utils/ops/bias_act.py": "def bias_act(x, b=None, impl='cuda'): ...\n",
    "models/stylegan2/op/fused_act.py": fused_act("bias=True, negative_slope=0.2"),
    "models/stylegan2/op/upfirdn2d.py": OTHER_UPFIRDN2D,
    "gpen/face_model/op/fused_act.py": fused_act("negative_slope=0.2"),
    "gpen/face_model/op/upfirdn2d.py": OTHER_UPFIRDN2D,
    "src/gan_ops/fused_act.py": fused_act("bias=True, negative_slope=0.2"),
    "basicsr/ops/fused_act/fused_act.py": fused_act("negative_slope=0.2"),
    "basicsr/ops/upfirdn2d/upfirdn2d.py": OTHER_UPFIRDN2D,
    "training/volumetric_rendering/renderer.py": "class ImportanceRenderer:\n    pass\n",
    "train.py": "from gan_ops.fused_act import FusedLeakyReLU\nfrom mmcv.ops import bias_act\n",
    "old.py": "print 'Python 2'\n",
    ".venv/op/fused_act.py": fused_act("bias=True"),
    "env/pyvenv.cfg": "",
    "env/op/fused_act.py": fused_act("bias=True"),
}


def test_scan(repository):
    root = repository(ALL)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    found = {(f.dialect, f.package): f for f in scan.scan(root)}
    assert set(found) == {
        ("basicsr", "basicsr.ops"),
        ("basicsr", "gpen.face_model.op"),
        ("eg3d", "training.volumetric_rendering"),
        ("mmcv", "mmcv.ops"),
        ("nvidia", "human.torch_utils.ops"),
        ("nvidia", "torch_utils.ops"),
        ("rosinality", "gan_ops"),
        ("rosinality", "models.stylegan2.op"),
    }
    assert found["rosinality", "gan_ops"].line == 'fastgen.compat.install("rosinality", prefix="gan_ops")'
    assert found["nvidia", "human.torch_utils.ops"].line == 'fastgen.compat.install("nvidia")'
    assert [str(f) for f in found["basicsr", "basicsr.ops"].files] == sorted(
        k for k in ALL if k.startswith("basicsr")
    )
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def command(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "fastgen", "patch", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(fastgen.__file__).parents[1])},
    )


def test_patch_lists_and_runs(repository, tmp_path):
    root = repository(
        {
            f"op/{name}.py": BROKEN + text
            for name, text in (("fused_act", fused_act("bias=True")), ("upfirdn2d", OTHER_UPFIRDN2D))
        }
        | {
            "op/__init__.py": "from .fused_act import FusedLeakyReLU\nfrom .upfirdn2d import upfirdn2d\n",
            "train.py": (
                "import multiprocessing, sys\nimport torch\nfrom op import FusedLeakyReLU\n"
                "def work(n):\n    return FusedLeakyReLU(n)(torch.ones(1, n)).sum().item()\n"
                "if __name__ == '__main__':\n"
                # A process that is spawned imports everything anew.
                "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
                "        print(sys.argv[1:], round(pool.map(work, [4])[0], 3))\n"
                "    sys.exit(7)\n"
            ),
        }
    )
    listed = command(root)
    assert listed.returncode == 0 and 'fastgen.compat.install("rosinality")' in listed.stdout, listed.stderr
    assert "op/fused_act.py, op/upfirdn2d.py" in listed.stdout
    done = command(root, "--run", "train.py", "--outdir=x", "--run", cwd=tmp_path)
    assert not done.stderr
    assert (done.returncode, done.stdout) == (7, "['--outdir=x', '--run'] 5.657\n"), done.stderr
    for arguments, message in (
        ((tmp_path / "none",), f"fastgen patch: {tmp_path / 'none'}: no such folder"),
        ((root, "--run", "none.py"), f"fastgen patch: none.py: no such file, here or in {root}"),
    ):
        wrong = command(*arguments)
        assert (wrong.returncode, wrong.stderr.strip()) == (2, message)
    (tmp_path / "empty").mkdir()
    assert (
        command(tmp_path / "empty").stdout == f"{tmp_path / 'empty'}: none of the ops that fastgen replaces\n"
    )


def test_scan_of_odd_repositories(repository):
    act, other = fused_act("bias=True, negative_slope=0.2"), OTHER_UPFIRDN2D
    root = repository(
        {
            "third-party/my_gan/custom_ops/fused_act.py": act,  # a name cannot have a hyphen
            "src/models/__init__.py": "",
            "src/models/net.py": "from .gan_ops import FusedLeakyReLU\n",
            "src/models/gan_ops/upfirdn2d.py": other,
            "src/models/gan_ops/fused_act.py": "print 'broken'\n",
            "loose/gan_ops/upfirdn2d.py": other,
            "face_model/op/fused_act.py": act,  # where the usual dialect is another
        }
    )
    lines = {f.package: f.line for f in scan.scan(root)}
    assert lines == {
        "my_gan.custom_ops": 'fastgen.compat.install("rosinality", prefix="my_gan.custom_ops")',
        "models.gan_ops": 'fastgen.compat.install("rosinality", prefix="models.gan_ops")',
        "loose.gan_ops": 'fastgen.compat.install("rosinality", prefix="loose.gan_ops")',
        "face_model.op": 'fastgen.compat.install("rosinality", prefix="face_model.op")',
    }
    assert [f.package for f in scan.scan(root / "loose" / "gan_ops")] == ["gan_ops"]


def test_run_finds_ops_from_the_scripts_folder(repository):
    root = repository(
        {
            "src/lib/gan_ops/upfirdn2d.py": BROKEN + OTHER_UPFIRDN2D,
            "src/lib/net.py": "from .gan_ops.upfirdn2d import upfirdn2d\n",
            "src/run.py": "from lib.net import upfirdn2d\nprint(upfirdn2d.__module__)\n",
        }
    )
    done = command(root, "--run", "src/run.py")
    assert (done.stdout, done.stderr) == ("fastgen.compat.rosinality\n", "")


def test_what_is_not_an_op_stays(repository):
    repository(
        {
            "utils/__init__.py": "",
            "utils/op.py": "def relu():\n    return 6\n",
            "training.py": "here = 7\n",
            "models/__init__.py": "",
            "space/op/upfirdn2d.py": BROKEN,
        }
    )
    compat.install("rosinality")
    compat.install("eg3d")
    from training import here
    from utils.op import relu

    assert (relu(), here) == (6, 7)
    for name in ("json.op", "models.op", "models.torch_utils.ops"):
        with pytest.raises(ImportError):
            import_module(name)
    # A folder without an __init__.py exports modules.
    from space.op import upfirdn2d

    assert upfirdn2d.upfirdn2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1)).shape == (1, 1, 2, 2)


def test_names_that_are_not_listed_come_from_the_repositorys_file(repository):
    ran = "import builtins\nbuiltins.ran_own = getattr(builtins, 'ran_own', 0) + 1\n"
    own = ran + "def upfirdn2d(x):\n    return 'own'\ndef upfirdn2d_native(x):\n    return 'native'\n"
    files = {"op/__init__.py": "from .upfirdn2d import upfirdn2d, upfirdn2d_native\n", "op/upfirdn2d.py": own}
    repository(files | {"op/fused_act/__init__.py": BROKEN})
    compat.install("rosinality")
    import builtins

    import op
    import op.fused_act

    try:
        assert (
            op.upfirdn2d_native(None) == "native" and op.upfirdn2d.__module__ == "fastgen.compat.rosinality"
        )
        assert op.fused_act.FusedLeakyReLU and builtins.ran_own == 1
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = sys.modules["op.upfirdn2d"].nothing
        assert builtins.ran_own == 1
    finally:
        del builtins.ran_own


@pytest.mark.parametrize("first", ["rosinality", "basicsr"])
def test_the_dialect_that_fits_best_serves(first):
    for dialect in (first, *{"rosinality", "basicsr"} - {first}):
        compat.install(dialect)
    from face_model.op import FusedLeakyReLU

    assert FusedLeakyReLU(3, 0.1).negative_slope == 0.1


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


def test_arguments_of_others():
    compat.install("nvidia")
    compat.install("rosinality")
    compat.install("mmcv")
    from mmcv.ops import filtered_lrelu
    from op import fused_leaky_relu
    from op import upfirdn2d as resample
    from torch_utils.ops import bias_act, conv2d_gradfix, grid_sample_gradfix, upfirdn2d

    x, kernel = torch.randn(1, 3, 8, 8), torch.rand(3, 3)
    assert upfirdn2d.upfirdn2d(x, None, 1, 1, 0, False, 1, "ref").equal(x)
    assert bias_act.bias_act(x, None, 1, "linear", None, None, None, "cuda").equal(x)
    assert bias_act.activation_funcs["lrelu"]["def_gain"] == pytest.approx(2**0.5)
    assert grid_sample_gradfix.grid_sample(input=x, grid=torch.zeros(1, 2, 2, 2)).shape == (1, 3, 2, 2)
    assert pickle.loads(pickle.dumps(bias_act.bias_act)) is bias_act.bias_act
    want = resample(x, kernel, 2, 1, (2, 1))
    for up, pad in (
        (np.int64(2), np.array([2, 1])),
        (torch.tensor(2), [np.int64(2), 1]),
        ([2, 2], (2, 1, 2, 1)),
    ):
        assert resample(x, kernel, up, 1, pad).equal(want)
    for call, message in (
        (lambda: resample(x, kernel, 2.0), "upfirdn2d: up must be an int or two, got 2.0"),
        (lambda: resample(x, kernel, pad=1), "upfirdn2d: pad must be two or four, got 1"),
        (lambda: resample(x, kernel, pad=None), "upfirdn2d: pad must be two or four, got None"),
        (lambda: resample(x, [[1.0]]), "upfirdn2d: kernel must be a tensor, got list"),
        (lambda: resample(x, None), "upfirdn2d: kernel must be a tensor, got NoneType"),
        (lambda: resample(x[0], kernel), "upfirdn2d: input must have 4 dimensions"),
        (lambda: fused_leaky_relu(x, torch.ones(2)), "fused_leaky_relu: bias must have"),
        (lambda: filtered_lrelu(x, filter_up="no"), "filtered_lrelu: filter_up must be"),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            call()
    w = torch.randn(4, 3, 3, 3)
    grad = torch.func.grad(lambda w: conv2d_gradfix.conv2d(x, w).sum())(w)
    change = torch.func.jvp(
        lambda w: conv2d_gradfix.conv2d(x, w).sum(), (w.requires_grad_(),), (w.detach(),)
    )[1]
    torch.testing.assert_close(change, (grad * w).sum())


def test_mmcv_whose_extension_does_not_load(repository):
    repository(
        {
            "mmcv/__init__.py": "",
            "mmcv/_ext.py": "raise ImportError('undefined symbol')\n",
            "mmcv/ops/__init__.py": BROKEN,
        }
    )
    fastgen.compat.install("mmcv")
    from mmcv.ops import bias_act

    assert bias_act(torch.ones(1, 2)).shape == (1, 2)
