"""A forward pass never waits for its device, so that a CUDA graph can hold all of it."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastgen
from fastgen import presets
from fastgen.camera import CameraDistribution
from fastgen.models.student import Student
from fastgen.models.teacher import Teacher


@pytest.fixture
def small(small_config):
    return Teacher(**small_config)


class Apart(TorchDispatchMode):
    """What moves numbers between devices raises; so does, with fake tensors, what reads them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in pytree.tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        assert len({x.device.type for x in tensors if x.numel()}) <= 1, f"{function} moves data"
        return out


def trace(model, function):
    """Run function(z, c) of a model whose tensors are said to be on a GPU, and have no numbers."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with FakeTensorMode(), torch.no_grad():
        fake = {k: torch.empty(x.shape, dtype=x.dtype, device="cuda") for k, x in state.items()}
        z, c = (torch.empty(2, n, device="cuda") for n in (model.z_dim, 25))
        with Apart(), torch.nn.utils.stateless._reparametrize_module(model, fake):
            return function(z, c)


@pytest.mark.parametrize("preset", ["toy", "shapenetcars128", "ffhq512"])
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_forward_does_not_wait_for_the_device(preset, kind):
    model = Teacher(**presets.get(preset).teacher)
    if kind == "student":
        model = Student.from_teacher(model)
    out = trace(model, lambda z, c: model(z, c, noise_mode="random", truncation_psi=0.7))
    assert out["image"].shape == (2, 3, model.img_resolution, model.img_resolution)
    assert out["image"].device.type == "cuda"


def test_the_trace_sees_what_waits(small):
    with pytest.raises(DataDependentOutputException):
        trace(small, lambda z, c: z.sum().item())
    with pytest.raises(AssertionError, match="moves data"):
        trace(small, lambda z, c: z.cpu())


def test_graphed_needs_a_cuda_device(small):
    with pytest.raises(ValueError, match="^graphed: model must be on a CUDA device, got cpu$"):
        fastgen.graphed(small)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_graphed_is_the_model(small, kind):
    model = (small if kind == "teacher" else Student.from_teacher(small)).cuda().eval()
    run = fastgen.graphed(model, 2, truncation_psi=0.7)
    for seed in range(3):
        torch.manual_seed(seed)
        z, c = torch.randn(2, model.z_dim), CameraDistribution().sample(2)
        got = run(z, c)
        with torch.no_grad():
            want = model(z.cuda(), c.cuda(), truncation_psi=0.7)
        for name in want:
            torch.testing.assert_close(got[name], want[name])
    with pytest.raises(ValueError, match=r"^graphed: z must have shape \[batch, z_dim\] = \[2, "):
        run(z[:1], c)
    with pytest.raises(ValueError, match="^graphed: batch must be an int of at least 1, got 0$"):
        fastgen.graphed(model, 0)
