"""Whole images and a whole training step, at full size with random weights.

FLOP are counted by PyTorch on the plain route, where the renderer's matrix products are in sight. The plain
route of a step is plain in the teacher, the student and their gradients; its images are contiguous, as in the
original code. The other routes have them channels_last on a CPU.
"""

import importlib.util
import math

import conftest
import pytest
import torch
from conftest import DEVICE, DTYPES
from torch.utils.flop_counter import FlopCounterMode

import fastgen
from fastgen import presets
from fastgen.models.layers import SynthesisBlock, compute_in
from fastgen.models.student import Student
from fastgen.models.teacher import Teacher
from fastgen.train.data import render_targets
from fastgen.train.losses import reconstruction_terms

STUDENTS = {"student": "full", "student_compact": "compact"}
ROUTES = (*conftest.ROUTES, "pytorch, channels_last")
GRAPHED = ["fastgen, CUDA graph"] * (DEVICE == "cuda")
# Of students in float32: what `fastgen export` writes.
EXPORTED = ["onnxruntime"] * (DEVICE == "cpu" and all(map(importlib.util.find_spec, ["onnx", "onnxruntime"])))
_flop: dict[str, int] = {}


def on_route(route: str, function):
    run = conftest.on_route(route.split(",")[0], function)

    def laid_out():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SynthesisBlock, "channels_last", route != "pytorch")
            return run()

    return laid_out


def models(preset: str):
    torch.manual_seed(0)
    teacher = Teacher(**presets.get(preset).teacher).to(DEVICE).eval().requires_grad_(False)
    return teacher, presets.get(preset).camera.front().to(DEVICE)


def on_onnxruntime(student: Student, ws: torch.Tensor, c: torch.Tensor):
    import onnxruntime

    from fastgen.export import synthesis_model

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(synthesis_model(student).SerializeToString(), options)
    inputs = {"ws": ws.numpy(), "c": c.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def flop(name: str, function) -> int:
    """Of a call on the plain route; counted once."""
    if name not in _flop:
        with FlopCounterMode(display=False) as counter:
            on_route("pytorch", function)()
        _flop[name] = counter.get_total_flops()
    return _flop[name]


IMAGES = [(m, d, r) for m in ("teacher", *STUDENTS) for d in DTYPES for r in (*ROUTES, *GRAPHED)]
IMAGES += [(model, "float32", route) for model in STUDENTS for route in EXPORTED]


@pytest.mark.parametrize("model, dtype, route", IMAGES)
@torch.no_grad()
def test_image(measure, model, dtype, route):
    generator, label = models("ffhq512")
    if model in STUDENTS:
        generator = Student.from_teacher(generator, STUDENTS[model]).to(DEVICE).eval().requires_grad_(False)
    z = torch.randn(1, generator.z_dim, device=DEVICE)
    ws = generator.mapping(z, label)

    def image():
        return generator.synthesis(ws, label)["image"]

    count = flop(model, image)
    exact = on_route("pytorch", image)()
    compute_in(generator, DTYPES[dtype])
    # The graph has the mapping in it, too.
    graph = fastgen.graphed(generator) if route in GRAPHED else None
    if route in EXPORTED:
        run = on_onnxruntime(generator, ws, label)
    else:
        run = on_route(route, image) if graph is None else lambda: graph(z, label)["image"]
    error = (run() - exact).square().mean().sqrt() / exact.std()
    assert error < (1e-3 if dtype == "float32" else 2e-2), "wrong result, not timed"
    parameters = sum(p.numel() for p in generator.parameters()) * DTYPES[dtype].itemsize
    measure(
        run,
        3,
        op=f"image_{model}",
        shape="x".join(map(str, exact.shape)),
        dtype=dtype,
        route=route,
        bytes=parameters + exact.nbytes,
        flop=count,
    )


@pytest.mark.parametrize("route", ROUTES)
def test_training_step(measure, route):
    """Stage 1 of the shapenetcars128 preset, batch 2: targets, student, losses, gradients, Adam."""
    teacher, label = models("shapenetcars128")
    student = Student.from_teacher(teacher).to(DEVICE)
    optimiser = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ws = teacher.mapping(torch.randn(2, teacher.z_dim, device=DEVICE), label.expand(2, 25))
    c = label.expand(2, 25).contiguous()

    def losses():
        with torch.no_grad():
            target = render_targets(teacher, ws, c)
        fake = student.render(ws, c)
        fake["image"] = student.super_resolve(fake["feature_image"], ws)
        return sum(reconstruction_terms(fake, target, None).values())

    def step(run):
        optimiser.zero_grad(set_to_none=True)
        loss = run()
        loss.backward()
        optimiser.step()
        return loss

    count = flop("step", lambda: step(losses))
    forward = on_route(route, losses)
    # Gradients, too, run on the route; only what they are of is compiled.
    whole = on_route(route, lambda: step(losses)) if "compile" not in route else lambda: step(forward)
    assert math.isfinite(whole())
    parameters = sum(p.numel() for p in [*teacher.parameters(), *student.parameters()])
    measure(
        whole,
        3,
        op="training_step",
        shape="shapenetcars128, batch 2",
        dtype="float32",
        route=route,
        bytes=parameters * 4,
        flop=count,
    )
