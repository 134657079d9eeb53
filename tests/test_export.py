"""Students as ONNX files: ONNX Runtime makes of them what PyTorch does, by plain operators."""

import json
import sys

import numpy as np
import pytest
import torch

import fastgen
from fastgen import checkpoint
from fastgen.__main__ import main
from fastgen.camera import CameraDistribution
from fastgen.models.layers import SynthesisLayer
from fastgen.models.student import Student

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx.reference import ReferenceEvaluator  # noqa: E402

from fastgen import export  # noqa: E402

CASES = {
    "2X": {},
    "2X, rays, half the style": {"pose_input": "rays", "style_dims": 8},
    "2X, shrunk": {"neural_rendering_resolution": 128, "conditioning_scale": 0.0},
    "2X, shrunk without antialias": {"neural_rendering_resolution": 128, "sr_antialias": False},
    "2X, sub-pixel": {"superresolution_kwargs": {"channels": [6, 6], "subpixel": True}},
    "4X": {
        "img_resolution": 256,
        "neural_rendering_resolution": 32,
        "superresolution": "SuperresolutionHybrid4X",
        "superresolution_kwargs": {"channels": [6, 4], "num_fp16_res": 0},
    },
    "8X": {"img_resolution": 512, "superresolution": "SuperresolutionHybrid8X"},
    "8XDC": {
        "img_resolution": 512,
        "superresolution": "SuperresolutionHybrid8XDC",
        "superresolution_noise_mode": "const",
    },
    "8XDC, sub-pixel": {
        "img_resolution": 512,
        "superresolution": "SuperresolutionHybrid8XDC",
        "superresolution_kwargs": {"channels": [6, 6], "subpixel": True},
        "superresolution_noise_mode": "const",
    },
}


def student(**overrides) -> Student:
    """Of random weights, those too that a new one has at 0."""
    config = {
        "z_dim": 8,
        "w_dim": 16,
        "num_ws": 10,
        "conditioning_scale": 0.5,
        "img_resolution": 128,
        "neural_rendering_resolution": 16,
        "channel_base": 256,
        "channel_max": 16,
        "style_dim": 24,
        "superresolution": "SuperresolutionHybrid2X",
        "superresolution_kwargs": {"channels": [6, 4]},
    }
    made = Student(**config | overrides).eval().requires_grad_(False)
    for name, value in made.named_parameters():
        if "torgb.weight" in name or "ray_maps" in name:
            value.normal_()
        if "bias" in name or "noise_strength" in name:
            value += torch.randn_like(value) / 4
    made.teacher_mapping.w_avg.normal_()
    made.camera = CameraDistribution()
    return made


def run(model, **inputs) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    data = model if isinstance(model, str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {name: np.asarray(x, np.float32) for name, x in inputs.items()})
    return torch.from_numpy(result)


def draw(made: Student, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ws and poses."""
    return torch.randn(n, made.num_ws, made.w_dim), CameraDistribution().sample(n)


def error(image: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square, as a share of the deviation."""
    assert exact.std() > 0.1
    return ((image - exact).square().mean().sqrt() / exact.std()).item()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case):
    made = student(**case)
    mapping, synthesis = export.mapping_model(made), export.synthesis_model(made)
    for n, psi in ((1, 1.0), (3, 0.7)):
        z, c, poses = torch.randn(n, made.z_dim), *CameraDistribution().sample(2 * n).split(n)
        exact_ws = made.mapping(z, c, truncation_psi=psi)
        exact = made.synthesis(exact_ws, poses)["image"]
        ws = run(mapping, z=z, c=c, truncation_psi=[psi])
        torch.testing.assert_close(ws, exact_ws, rtol=0, atol=1e-4)
        for given in (exact_ws, ws):
            image = run(synthesis, ws=given, c=poses)
            assert exact.std() > 0.1
            torch.testing.assert_close(image, exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("opset", [13, 18, 21])
def test_opsets(opset):
    made = student()
    (ws, c), z = draw(made, 2), torch.randn(2, made.z_dim)
    mapping, synthesis = export.mapping_model(made, opset), export.synthesis_model(made, True, opset)
    assert mapping.opset_import[0].version == synthesis.opset_import[0].version == opset
    exact = made.mapping(z, c, truncation_psi=-0.5)
    torch.testing.assert_close(run(mapping, z=z, c=c, truncation_psi=[-0.5]), exact, rtol=0, atol=1e-4)
    assert error(run(synthesis, ws=ws, c=c), made.synthesis(ws, c)["image"]) < 3e-3


@pytest.mark.parametrize("case", ["2X", "2X, rays, half the style", "2X, sub-pixel", "8XDC"])
def test_float16(case):
    made = student(**CASES[case])
    model = export.synthesis_model(made, fp16=True)
    ends = [*model.graph.input, *model.graph.output]
    assert {end.type.tensor_type.elem_type for end in ends} == {onnx.TensorProto.FLOAT}
    kinds = {constant.name: constant.data_type for constant in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert {kinds[node.input[1]] for node in convolutions} == {onnx.TensorProto.FLOAT16}
    for n in (1, 3):
        ws, c = draw(made, n)
        assert error(run(model, ws=ws, c=c), made.synthesis(ws, c)["image"]) < 3e-3


def test_float16_does_not_overflow():
    """Large styles and small weights make the same image. ONNX's own evaluator rounds at every node."""
    made = student(neural_rendering_resolution=8)
    for module in made.modules():
        if hasattr(module, "affine"):
            for value in module.affine.parameters():
                value *= 1e5
            if not isinstance(module, SynthesisLayer):
                module.weight *= 1e-5
    ws, c = draw(made, 1)
    evaluator = ReferenceEvaluator(export.synthesis_model(made, fp16=True))
    (image,) = evaluator.run(None, {"ws": ws.numpy(), "c": c.numpy()})
    assert error(torch.from_numpy(image), made.synthesis(ws, c)["image"]) < 5e-3


@pytest.mark.parametrize("mode", ["none", "random"])
def test_noise(mode):
    made = student(superresolution_noise_mode=mode)
    ws, c = draw(made, 2)
    model = export.synthesis_model(made, noise=True)
    names = [end.name for end in model.graph.input if end.name.startswith("noise")]
    wanted = [
        f"noise.renderer.{name}" for name in ("b4.conv1", "b8.conv0", "b8.conv1", "b16.conv0", "b16.conv1")
    ]
    if mode == "random":
        wanted += [f"noise.superresolution.block{i}.conv{j}" for i in (0, 1) for j in (0, 1)]
    assert names == wanted

    layers = {name: made.get_submodule(name.removeprefix("noise.")) for name in names}
    noise = {name: torch.randn(2, 1, *layer.noise_const.shape) for name, layer in layers.items()}
    images = run(model, ws=ws, c=c, **noise)
    for i in (0, 1):
        for name, layer in layers.items():
            layer.noise_const.copy_(noise[name][i, 0])
        features = made.render(ws[i : i + 1], c[i : i + 1])["feature_image"]
        exact = made.super_resolve(features, ws[i : i + 1], "const" if mode == "random" else None)
        torch.testing.assert_close(images[i : i + 1], exact, rtol=0, atol=1e-3)
    # The last ones are the student's own now.
    constant = run(export.synthesis_model(made), ws=ws[1:], c=c[1:])
    torch.testing.assert_close(constant, exact, rtol=0, atol=1e-3)
    silent = run(model, ws=ws[1:], c=c[1:], **{name: 0 * x[1:] for name, x in noise.items()})
    assert error(silent, exact) > 0.05


@pytest.mark.parametrize("fp16", [False, True])
def test_graph_is_plain(fp16):
    """Of ONNX's own operators, without control flow; weights are constants, which a runtime can prepare."""
    made = student(**CASES["2X, shrunk"])
    for model in (export.mapping_model(made), export.synthesis_model(made, fp16, noise=True)):
        assert [version.domain for version in model.opset_import] == [""]
        assert not model.functions
        assert {node.domain for node in model.graph.node} == {""}
        assert {node.op_type for node in model.graph.node} <= export.OPERATORS
        constants = {constant.name for constant in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
                assert set(node.input[1:]) <= constants
        used = {name for node in model.graph.node for name in node.input}
        assert constants <= used
        about = {entry.key: entry.value for entry in model.metadata_props}
        assert about["fastgen"] == fastgen.__version__ and about["img_resolution"] == "128"
        torch.testing.assert_close(torch.tensor([json.loads(about["front"])]), made.camera.front())


def test_command(tmp_path, capsys):
    made = student()
    file, out = tmp_path / "s.safetensors", tmp_path / "new" / "small.onnx"
    checkpoint.save(file, "student", {"G": made})
    assert main(["export", str(file), str(out)]) == 0
    both = [out, out.with_name("small.mapping.onnx")]
    assert capsys.readouterr().out.split() == [str(path) for path in both]
    assert sorted(out.parent.iterdir()) == sorted(both)
    z, c = torch.randn(2, made.z_dim), CameraDistribution().sample(2)
    ws = run(str(both[1]), z=z, c=c, truncation_psi=[0.7])
    exact = made(z, c, truncation_psi=0.7)["image"]
    torch.testing.assert_close(run(str(out), ws=ws, c=c), exact, rtol=0, atol=1e-3)

    assert main(["export", str(file), str(out), "--fp16", "--noise", "--opset", "18"]) == 0
    model = onnx.load(out)
    assert model.opset_import[0].version == 18 and len(model.graph.input) == 7
    assert any(constant.data_type == onnx.TensorProto.FLOAT16 for constant in model.graph.initializer)


def test_without_onnx(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "fastgen.export")
    monkeypatch.delattr(fastgen, "export")
    assert main(["export", "a.safetensors", str(tmp_path / "a.onnx")]) == 2
    assert capsys.readouterr().err == "fastgen export: export needs onnx: pip install onnx\n"
