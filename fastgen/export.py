"""Students as ONNX files, for callers without Python: ONNX Runtime, TensorRT, OpenVINO, browsers.

Two graphs, since an identity is mapped once and seen from many poses, and may condition on another pose than
the camera's:

    mapping    z [N, z_dim], c [N, c_dim], truncation_psi [1] -> ws [N, num_ws, w_dim]
    synthesis  ws [N, num_ws, w_dim], c [N, 25] -> image [N, 3, H, W], about [-1, 1]

All that goes in and comes out is float32, and N is free. The graphs are written operator by operator, for
torch.onnx (of 2.14) takes ten seconds for the smallest student and begins at opset 18. They have operators of
ONNX itself only, none of control flow, none that is random, and every weight is a constant: as in
ops/modulated_conv2d.py, styles multiply what goes into a convolution and demodulation what comes out. The
gain of an activation is in what it is applied to.

In float16 a sum might overflow before demodulation brings it back. With b[n] the root mean square of the
styles, and a[o] the norm over i of sum_k |weight[o,i,k]|, divided by sqrt(kh kw), the convolution is that of
x s / b with weight / a, at most sqrt(I kh kw) max|x|; a b is in what multiplies its result.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from . import __version__, checkpoint
from ._files import replacing
from .models.layers import FullyConnectedLayer, MappingNetwork, SynthesisBlock, SynthesisLayer, ToRGBLayer
from .models.student import RayMaps, Student
from .pictures import prepare

# The first one has all operators in the form that is used here.
OPSETS = range(13, onnx.defs.onnx_opset_version() + 1)
OPSET = 17  # of ONNX 1.12, mid-2022
OPERATORS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "ReduceSum", "Add", "Sub", "Mul", "Div", "Sqrt"}
OPERATORS |= {"LeakyRelu", "Clip", "Cast", "Concat", "Gather", "Slice", "Unsqueeze", "Reshape", "Sin", "Cos"}
OPERATORS |= {"DepthToSpace"}
GAIN = math.sqrt(2)  # of lrelu


def export(
    source: str | Path, out: str | Path, fp16: bool = False, opset: int = OPSET, noise: bool = False
) -> list[Path]:
    """Write the student of a file as OUT.onnx, the synthesis, and OUT.mapping.onnx. Returns: both.

    fp16, noise: of synthesis_model.
    Raises: FileNotFoundError; ValueError, CheckpointError among them.
    """
    if checkpoint.read(source)[0]["kind"] != "student":
        raise ValueError(f"{source} is a teacher; only students can be exported: the teacher renders volumes")
    _require_opset(opset)
    out, student = prepare(out, ".onnx"), checkpoint.load_student(source)
    models = {
        out: synthesis_model(student, fp16, opset, noise),
        out.with_suffix(".mapping.onnx"): mapping_model(student, opset),
    }
    for path, model in models.items():
        with replacing(path) as partial:
            onnx.save(model, partial)
    return list(models)


def mapping_model(student: Student, opset: int = OPSET) -> onnx.ModelProto:
    """Student.mapping. truncation_psi is of all ws."""
    graph, net = _Graph(opset), student.teacher_mapping
    if net is None:
        raise ValueError("the student has no mapping to export: its teacher had no mapping_network to copy")
    z, c = graph.input("z", "N", net.z_dim), graph.input("c", "N", net.c_dim)
    psi = graph.input("truncation_psi", 1)
    w, mean = _mapping(graph, net, z, c, student.conditioning_scale), graph.constant(net.w_avg)
    w = graph("Add", mean, graph("Mul", graph("Sub", w, mean), psi))
    graph("Concat", *[graph("Unsqueeze", w, graph.constant([1]))] * net.num_ws, axis=1)
    return graph.model("ws", ["N", net.num_ws, net.w_dim], student)


def synthesis_model(
    student: Student, fp16: bool = False, opset: int = OPSET, noise: bool = False
) -> onnx.ModelProto:
    """Student.synthesis, its image alone.

    fp16:  convolutions and what is between them are float16; styles and the sum of images stay float32. The
           error of an image, root mean square, should be below 0.003 of its standard deviation; small random
           students had 0.0016 at most, in ONNX Runtime and by ONNX's evaluator, which rounds at every node.
    noise: each layer that adds noise takes it, drawn from N(0, 1), from an input of its own, such as
           noise.renderer.b8.conv0 [N, 1, 8, 8]. Otherwise it is the constant one of the student; of a
           super-resolution, too, whose mode is 'random'.
    """
    graph = _Graph(opset, fp16, noise)
    graph.scope = "pose_mapping"
    ws, c = graph.input("ws", "N", student.num_ws, student.w_dim), graph.input("c", "N", 25)
    first, last = (graph("Gather", ws, graph.constant(i), axis=1) for i in (0, student.num_ws - 1))
    if student.style_dims is not None:
        first = graph(
            "Mul", first, graph.constant((torch.arange(student.w_dim) < student.style_dims).float())
        )
    style = _mapping(graph, student.pose_mapping, first, c)

    renderer, enlarge = student.renderer, student.superresolution
    x = image = None
    for size in renderer.block_resolutions:
        block, path = getattr(renderer, f"b{size}"), f"renderer.b{size}"
        extra = None
        if student.ray_maps is not None:
            graph.scope = f"{path}.rays"
            extra = _ray_map(graph, student.ray_maps, c, size)
        x, image = _block(graph, block, path, x, image, style, True, extra)

    graph.scope = "superresolution"
    features = image
    size, wanted = renderer.img_resolution, enlarge.input_resolution
    if size < wanted or (size > wanted and not enlarge.only_enlarge):
        features = _resized(graph, features, size, wanted, enlarge.antialias)
    image = graph("Slice", features, *(graph.constant([i]) for i in (0, 3, 1)))
    x, noisy = graph.half(features), student.superresolution_noise_mode != "none"
    x, image = _block(graph, enlarge.block0, "superresolution.block0", x, image, last, noisy)
    path = "superresolution.block1"
    if enlarge.subpixel:
        _, four = _block(graph, enlarge.block1, path, x, None, last, noisy)
        four = graph("DepthToSpace", four, blocksize=2, mode="CRD")
        image = _upsampled(graph, image, enlarge.block1.resample_filter, 3)
        image = graph("Add", image, four)
    else:
        _, image = _block(graph, enlarge.block1, path, x, image, last, noisy)
    return graph.model("image", ["N", 3, student.img_resolution, student.img_resolution], student)


def _require_opset(opset: int) -> None:
    if opset not in OPSETS:
        raise ValueError(f"opset must be from {OPSETS[0]} to {OPSETS[-1]}, got {opset}")


class _Graph:
    """An ONNX graph that grows: graph("Mul", a, b) adds a node and is the name of its output.

    half: what is float16 with fp16, else float32.
    """

    def __init__(self, opset: int, fp16: bool = False, noise: bool = False):
        _require_opset(opset)
        self.opset, self.fp16, self.noise = opset, fp16, noise
        self.scope, self.nodes, self.inputs, self.constants = "mapping", [], [], {}

    def __call__(self, operator: str, *inputs: str, **attributes) -> str:
        name = f"{self.scope}/{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def input(self, name: str, *shape: int | str) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def constant(self, value: Tensor | float | list[int], half: bool = False) -> str:
        """Ints are int64. What occurs twice is kept once."""
        value = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else np.asarray(value)
        of_floats = np.float16 if half and self.fp16 else np.float32
        value = value.astype(np.int64 if value.dtype.kind == "i" else of_floats)
        key = (value.tobytes(), value.dtype, value.shape)
        return self.constants.setdefault(key, f"{self.scope}/constant_{len(self.constants)}")

    def half(self, x: str) -> str:
        return self("Cast", x, to=TensorProto.FLOAT16) if self.fp16 else x

    def full(self, x: str) -> str:
        return self("Cast", x, to=TensorProto.FLOAT) if self.fp16 else x

    def by_channel(self, x: str) -> str:  # [N, C] -> [N, C, 1, 1]
        return self("Unsqueeze", x, self.constant([2, 3]))

    def model(self, output: str, shape: list[int | str], student: Student) -> onnx.ModelProto:
        """What the last node makes is the output."""
        self.nodes[-1].output[0] = output
        constants = [
            numpy_helper.from_array(np.frombuffer(data, dtype).reshape(shape), name)
            for (data, dtype, shape), name in self.constants.items()
        ]
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)]
        graph = helper.make_graph(self.nodes, "student", self.inputs, outputs, constants)
        versions = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(
            graph,
            opset_imports=versions,
            # The oldest one that has the opset, for older runtimes.
            ir_version=helper.find_min_ir_version_for(versions),
            producer_name="fastgen",
            producer_version=__version__,
        )
        helper.set_model_props(model, _about(student))
        others = {node.op_type for node in graph.node if node.op_type not in OPERATORS or node.domain}
        assert not others, f"operators not to be used: {others}"
        onnx.checker.check_model(model, full_check=True)
        return model


def _about(student: Student) -> dict[str, str]:
    """For the caller: sizes, and, where the student has a camera, the label of the front view, as JSON."""
    sizes = ("z_dim", "c_dim", "w_dim", "num_ws", "img_resolution")
    about = {"fastgen": __version__} | {name: str(getattr(student, name)) for name in sizes}
    camera = getattr(student, "camera", None)
    return about if camera is None else about | {"front": json.dumps(camera.front()[0].tolist())}


def _linear(graph: _Graph, layer: FullyConnectedLayer, x: str, gain: float = 1.0, scale: float = 1.0) -> str:
    """[N, I] -> [N, O], before the activation. gain: of the result, scale: of x."""
    weight, bias = layer.effective()
    return graph("Gemm", x, graph.constant(weight * (gain * scale)), graph.constant(bias * gain), transB=1)


def _root_mean_square(graph: _Graph, x: str, features: int) -> str:  # [N, I] -> [N, 1]
    # ReduceMean takes its axes in another way from opset 18 on.
    total = graph("ReduceSum", graph("Mul", x, x), graph.constant([1]), keepdims=1)
    mean = graph("Mul", total, graph.constant(1 / features))
    return graph("Sqrt", graph("Add", mean, graph.constant(1e-8)))


def _mapping(graph: _Graph, net: MappingNetwork, z: str, c: str, scale: float = 1.0) -> str:
    """w [N, w_dim]. scale: of c."""
    parts = [(z, net.z_dim), (_linear(graph, net.embed, c, scale=scale), net.w_dim)]
    parts = [graph("Div", x, _root_mean_square(graph, x, features)) for x, features in parts]
    x = graph("Concat", *parts, axis=1)
    for i in range(net.num_layers):
        x = graph("LeakyRelu", _linear(graph, getattr(net, f"fc{i}"), x, GAIN), alpha=0.2)
    return x


def _resized(graph: _Graph, x: str, size: int, wanted: int, antialias: bool) -> str:
    """Bilinear, as a matrix [wanted, size] from the left and from the right."""
    square = torch.eye(size)[None, None]
    (matrix,) = nn.functional.interpolate(square, (wanted, size), mode="bilinear", antialias=antialias)[0]
    return graph("MatMul", graph("MatMul", graph.constant(matrix), x), graph.constant(matrix.t()))


def _upsampled(graph: _Graph, x: str, f: Tensor, channels: int) -> str:
    """ops.upsample2d, in float32."""
    taps = len(f)
    before, after = taps - 1 - (taps + 1) // 2, taps - 2 - (taps - 2) // 2
    weight = graph.constant(_depthwise(f, channels))
    pads = [before, before, after, after]
    return graph("ConvTranspose", x, weight, strides=[2, 2], pads=pads, group=channels)


def _depthwise(f: Tensor, channels: int) -> Tensor:
    """The filter of an upsampling by 2, [channels, 1, taps, taps]."""
    return f.mul(4).expand(channels, 1, -1, -1)


def _ray_map(graph: _Graph, maps: RayMaps, c: str, size: int) -> str:
    """[N, channels, size, size], half."""

    def column(*indices: int) -> str:  # of c, [N, len, 1]
        return graph(
            "Unsqueeze", graph("Gather", c, graph.constant(list(indices)), axis=1), graph.constant([2])
        )

    centre = (torch.arange(size) + 0.5) / size
    v, u = (graph.constant(grid.reshape(1, 1, -1)) for grid in torch.meshgrid(centre, centre, indexing="ij"))
    fx, skew, cx, fy, cy = map(column, (16, 17, 18, 20, 21))
    y = graph("Div", graph("Sub", v, cy), fy)
    x = graph("Div", graph("Sub", graph("Sub", u, cx), graph("Mul", skew, y)), fx)
    right, down, forward, origin = (column(i, i + 4, i + 8) for i in range(4))
    d = graph("Add", graph("Add", graph("Mul", x, right), graph("Mul", y, down)), forward)
    d = graph(
        "Div", d, graph("Sqrt", graph("ReduceSum", graph("Mul", d, d), graph.constant([1]), keepdims=1))
    )
    (o1, d1), (o2, d2) = (
        [graph("Gather", vector, graph.constant(order), axis=1) for vector in (origin, d)]
        for order in ([1, 2, 0], [2, 0, 1])
    )
    line = graph("Concat", d, graph("Sub", graph("Mul", o1, d2), graph("Mul", o2, d1)), axis=1)
    scaled = [graph("Mul", line, graph.constant(frequency)) for frequency in maps.frequencies]
    waves = [graph(wave, x) for x in scaled for wave in ("Sin", "Cos")]
    weight = getattr(maps, f"r{size}").weight * maps.gain
    shape = graph.constant([0, weight.shape[1], size, size])  # 0: N
    lines = graph("Reshape", graph("Concat", line, *waves, axis=1), shape)
    return graph("Conv", graph.half(lines), graph.constant(weight, half=True))


def _block(
    graph: _Graph,
    block: SynthesisBlock,
    path: str,
    x: str | None,
    image: str | None,
    w: str,
    noisy: bool,
    extra: str | None = None,
) -> tuple[str, str]:
    """x, half, and the image, float32. w [N, w_dim] is of all layers."""
    if block.in_channels == 0:
        x = graph.constant(block.const[None], half=True)
    for name in ("conv0", "conv1")[-block.num_conv :]:
        graph.scope = f"{path}.{name}"
        if name == "conv1" and extra is not None:
            x = graph("Add", x, extra)
        x = _layer(graph, getattr(block, name), x, w, noisy)
    graph.scope = f"{path}.torgb"
    y = _to_rgb(graph, block.torgb, x, w)
    if image is None:
        return x, y
    if block.up:
        image = _upsampled(graph, image, block.resample_filter, len(block.torgb.weight))
    return x, graph("Add", image, y)


def _layer(graph: _Graph, layer: SynthesisLayer, x: str, w: str, noisy: bool) -> str:
    styles = _linear(graph, layer.affine, w)
    x, weight, back = _modulated(graph, x, layer.weight, styles, GAIN)
    powers = graph.constant(layer.weight.square().sum([2, 3]).t())
    power = graph("MatMul", graph("Mul", styles, styles), powers)
    d = graph("Div", back or graph.constant(GAIN), graph("Sqrt", graph("Add", power, graph.constant(1e-8))))
    if graph.fp16:
        d = graph("Clip", d, graph.constant(0.0), graph.constant(65504.0))
    d = graph.half(graph.by_channel(d))
    if layer.up == 1:
        y = graph("Conv", x, graph.constant(weight, half=True), pads=[layer.padding] * 4)
        y = graph("Mul", y, d)
        y = graph("Add", y, graph.constant(layer.bias[:, None, None] * GAIN, half=True))
    else:
        y = graph("ConvTranspose", x, graph.constant(weight.transpose(0, 1), half=True), strides=[2, 2])
        # The filter commutes with d, and can then add the bias.
        f, k, taps = layer.resample_filter, layer.weight.shape[2], len(layer.resample_filter)
        f = _depthwise(f, len(layer.weight)).flip([2, 3])
        before, after = layer.padding + (taps + 1) // 2 - k + 1, layer.padding + (taps - 2) // 2 - k + 2
        tail = [graph.constant(f, half=True), graph.constant(layer.bias * GAIN, half=True)]
        y = graph("Mul", y, d)
        y = graph("Conv", y, *tail, pads=[before, before, after, after], group=len(f))
    strength = float(layer.noise_strength) * GAIN
    if noisy and graph.noise:
        noise = graph.input(f"noise.{graph.scope}", "N", 1, layer.resolution, layer.resolution)
        y = graph("Add", y, graph.half(graph("Mul", noise, graph.constant(strength))))
    elif noisy and strength != 0:
        y = graph("Add", y, graph.constant(layer.noise_const[None, None] * strength, half=True))
    return _clamped(graph, graph("LeakyRelu", y, alpha=0.2), layer.conv_clamp)


def _to_rgb(graph: _Graph, layer: ToRGBLayer, x: str, w: str) -> str:
    """float32."""
    styles = _linear(graph, layer.affine, w, layer.weight_gain)
    x, weight, back = _modulated(graph, x, layer.weight, styles)
    weight = graph.constant(weight, half=True)
    if graph.fp16:
        y = graph("Mul", graph.full(graph("Conv", x, weight)), graph.by_channel(back))
        y = graph("Add", y, graph.constant(layer.bias[:, None, None]))
    else:
        y = graph("Conv", x, weight, graph.constant(layer.bias))
    return _clamped(graph, y, layer.conv_clamp, half=False)


def _modulated(
    graph: _Graph, x: str, weight: Tensor, styles: str, gain: float = 1.0
) -> tuple[str, Tensor, str | None]:
    """x times styles [N, I], the weight, and, in float16, gain a b [N, O], which is for their convolution."""
    back = None
    if graph.fp16:
        a = weight.abs().sum([2, 3]).norm(dim=1).clamp(min=1e-8) / math.sqrt(weight[0, 0].numel())
        b = _root_mean_square(graph, styles, weight.shape[1])
        styles, weight = graph("Div", styles, b), weight / a[:, None, None, None]
        back = graph("Mul", b, graph.constant(a * gain))
    x = graph("Mul", x, graph.half(graph.by_channel(styles)))
    return x, weight, back


def _clamped(graph: _Graph, x: str, bound: float | None, half: bool = True) -> str:
    if bound is None:
        return x
    return graph("Clip", x, graph.constant(-float(bound), half), graph.constant(float(bound), half))
