"""Teacher, student and discriminator at home in PyTorch: compiled, exported, copied, distributed."""

import copy
import io
import re

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import nn

from fastgen.camera import CameraDistribution
from fastgen.models.discriminator import DualDiscriminator
from fastgen.models.student import Student
from fastgen.models.teacher import Teacher


@pytest.fixture
def teacher(small_config) -> Teacher:
    return Teacher(**small_config).eval()


@pytest.fixture
def student(teacher) -> Student:
    student = Student.from_teacher(teacher, "toy").eval()
    # As it begins, most of its blocks add nothing.
    for name, parameter in student.named_parameters():
        if name.endswith("torgb.weight"):
            nn.init.normal_(parameter)
    return student


@pytest.fixture
def discriminator() -> DualDiscriminator:
    return DualDiscriminator(img_resolution=32, channel_base=256, channel_max=16).eval()


@pytest.fixture(params=["teacher", "student", "discriminator"])
def case(request):
    """A network as a function of two tensors, and these."""
    network, c = request.getfixturevalue(request.param), CameraDistribution().sample(2)
    if request.param == "discriminator":
        image = torch.randn(2, 3, 32, 32)
        return (
            network,
            lambda image, c: network({"image": image, "image_raw": image[..., ::2, ::2]}, c),
            (image, c),
        )
    ws = torch.randn(2, network.num_ws, network.w_dim)
    return network, lambda ws, c: network.synthesis(ws, c, noise_mode="const")["image"], (ws, c)


def gradients(network, function, inputs):
    x = inputs[0].clone().requires_grad_()
    out = function(x, *inputs[1:])
    parameters = [p for p in network.parameters() if p.requires_grad]
    return out, torch.autograd.grad(out.square().mean(), [x, *parameters], allow_unused=True)


def close(got, want, tolerance):
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() <= tolerance * max(want.abs().max(), 1e-30)


def test_compiles_forward_and_backward(case):
    torch.compiler.reset()
    network, function, inputs = case
    out, grads = gradients(network, function, inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, got_grads = gradients(network, compiled, inputs)
    # Decomposed operations round differently, which the teacher's second pass amplifies.
    close(got, out, 1e-3)
    for a, b in zip(got_grads, grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b, 5e-3)


def test_exports(student):
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = student

        def forward(self, ws, c):
            return self.student.synthesis(ws, c, noise_mode="const")["image"]

    ws, c = torch.randn(3, student.num_ws, student.w_dim), CameraDistribution().sample(3)
    n = torch.export.Dim("n", min=1, max=64)
    with torch.no_grad():
        exported = torch.export.export(Images(), (ws[:2], c[:2]), dynamic_shapes=({0: n}, {0: n}))
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        again = torch.export.load(file).module()
        want = student.synthesis(ws, c, noise_mode="const")["image"]
        close(again(ws, c), want, 1e-4)
        close(again(ws[:1], c[:1]), want[:1], 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case, dtype):
    network, function, inputs = case
    out, grads = gradients(network, function, inputs)
    with torch.autocast("cpu", dtype):
        got = function(*inputs)
    # Linear layers and convolutions in 16 bits.
    assert (got.float() - out).abs().mean() <= 0.05 * out.abs().mean()
    x = inputs[0].clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = function(x, *inputs[1:]).float().square().mean()
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.isfinite().all() and torch.cosine_similarity(grad.flatten(), grads[0].flatten(), 0) > 0.9


def test_copies(case):
    network, function, inputs = case
    other = copy.deepcopy(network)
    other.load_state_dict(network.state_dict(), strict=True)
    assert all(
        a is not b and torch.equal(a, b)
        for a, b in zip(other.parameters(), network.parameters(), strict=True)
    )
    fresh = type(network)(**network.config)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        want = function(*inputs)
        network.load_state_dict({k: torch.zeros_like(v) for k, v in network.state_dict().items()})
        network.load_state_dict(fresh.state_dict())
        assert torch.equal(function(*inputs), want)


def test_func(student):
    ws, c = torch.randn(2, student.num_ws, student.w_dim), CameraDistribution().sample(2)
    module = Synthesis(student)
    parameters = {k: p for k, p in module.named_parameters() if ".b4." in k and p.requires_grad}

    def loss(parameters, ws):
        return torch.func.functional_call(module, parameters, (ws, c)).mean()

    grads = torch.func.grad(loss)(parameters, ws)
    want = torch.autograd.grad(module(ws, c).mean(), list(parameters.values()))
    for grad, (name, _) in zip(want, parameters.items(), strict=True):
        close(grads[name], grad, 1e-3)
    # Per-sample gradients.
    each = torch.func.vmap(lambda w, c: torch.func.grad(lambda w: module(w[None], c[None]).mean())(w))(ws, c)
    x = ws.clone().requires_grad_()
    (dws,) = torch.autograd.grad(module(x, c).mean((1, 2, 3)).sum(), x)
    close(each, dws, 1e-3)
    tangent = torch.randn_like(ws)
    change = torch.func.jvp(lambda ws: module(ws, c).mean((1, 2, 3)).sum(), (ws,), (tangent,))[1]
    torch.testing.assert_close(change, (dws * tangent).sum(), rtol=1e-3, atol=1e-6)


class Synthesis(nn.Module):
    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, ws, c):
        return self.student.synthesis(ws, c, noise_mode="const")["image"]


def test_meta(case):
    network, function, inputs = case
    shape = function(*inputs).shape
    network.to("meta")
    out = function(*(x.to("meta") for x in inputs))
    assert out.shape == shape and out.is_meta


@pytest.mark.parametrize("key", ["MPS", "XPU", "HPU", "PrivateUse1"])
def test_other_devices_have_the_reference(key):
    from fastgen.ops import _dispatch

    assert _dispatch._defaults
    for op in _dispatch._defaults:
        table = torch._C._dispatch_dump_table(f"fastgen::{op}")
        found = re.search(rf"^{key}: .*\[(.*)\]$", table, re.M)
        assert found and found[1] == "default backend kernel", (op, table)


def work(rank, folder, config, weights, ws, c, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    student = Student(**config)
    student.load_state_dict(weights)
    parallel = nn.parallel.DistributedDataParallel(Synthesis(student))
    parallel(ws[rank : rank + 1], c[rank : rank + 1]).square().mean().backward()
    if rank == 0:
        torch.save({k: p.grad for k, p in student.named_parameters() if p.requires_grad}, out)
    torch.distributed.destroy_process_group()


def test_distributed(student, tmp_path):
    ws, c = torch.randn(2, student.num_ws, student.w_dim), CameraDistribution().sample(2)
    Synthesis(student)(ws, c).square().mean().backward()
    arguments = tmp_path, student.config, student.state_dict(), ws, c, tmp_path / "grads.pt"
    torch.multiprocessing.spawn(work, arguments, nprocs=2)
    for name, grad in torch.load(tmp_path / "grads.pt").items():
        close(grad, dict(student.named_parameters())[name].grad, 1e-4)
