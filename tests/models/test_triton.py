"""Whole generators on Triton's kernels: on a GPU, or interpreted where there is none."""

import pytest
import torch

import fastgen
from fastgen.camera import CameraDistribution
from fastgen.models.layers import compute_in
from fastgen.models.student import Student
from fastgen.models.teacher import Teacher

pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["teacher", "student"])
def generator(request, small_config):
    teacher = Teacher(**small_config)
    for name, parameter in teacher.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(parameter, 0.1)
    model = teacher if request.param == "teacher" else Student.from_teacher(teacher, "toy")
    return model.to(DEVICE)


@pytest.fixture
def inputs(generator):
    return torch.randn(2, generator.z_dim, device=DEVICE), CameraDistribution().sample(2).to(DEVICE)


def on(backend, run):
    with fastgen.backend(backend):
        return run()


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_images(generator, inputs, dtype, allowed):
    with torch.no_grad():
        want = on("reference", lambda: generator(*inputs))
        compute_in(generator, dtype)
        got = on("triton", lambda: generator(*inputs))
    for name in want:
        assert (got[name] - want[name]).abs().max() <= allowed * want[name].abs().max(), name


def test_gradients(generator, inputs):
    wanted = [p for p in generator.parameters() if p.requires_grad]

    def run():
        out = generator(*inputs)
        loss = out["image"].square().mean() + out["feature_image"].square().mean()
        return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)

    for got, want in zip(on("triton", run), on("reference", run), strict=True):
        assert (got - want).abs().max() <= 1e-3 * want.abs().max() + 1e-6


def test_compiles_without_graph_breaks(generator, inputs):
    torch.compiler.reset()
    with fastgen.backend("triton"), torch.no_grad():
        want = generator(*inputs)
        got = torch.compile(generator, fullgraph=True, backend="aot_eager")(*inputs)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)
