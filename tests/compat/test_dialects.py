"""Repositories in each dialect, on fastgen's ops: their numbers are those of the golden data."""

import pickle
import re
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from repositories import BROKEN, close, golden
from torch import nn

import fastgen
from fastgen import compat, ops

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
