"""What all ops share: the choice of backend, the reference as fallback, compilation and export."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops.checks import gradients
from torch.utils._python_dispatch import TorchDispatchMode

import fastgen
from fastgen import _backends, ops
from fastgen.ops import _define, _dispatch

ROOT = Path(__file__).parents[2]
F4 = ops.setup_filter([1, 3, 3, 1])


def test_choosing_what_is_missing_raises_with_the_reason():
    missing = {name: reason for name, (usable, reason) in _backends.status().items() if not usable}
    for name, reason in missing.items():
        with pytest.raises(RuntimeError) as error:
            fastgen.backend(name)
        assert str(error.value) == f"backend {name!r} is not available: {reason}"
    with pytest.raises(ValueError, match="backend must be one of auto, cpu, .*, reference, got 'gpu'"):
        fastgen.backend("gpu")


def test_a_library_that_is_there_can_be_chosen():
    for name, (usable, _) in _backends.status().items():
        if usable and name != "triton":
            with fastgen.backend(name):
                assert _dispatch._choice == name


def test_auto_and_reference_look_for_nothing(monkeypatch):
    monkeypatch.setattr(_backends, "status", None)
    for name in ("auto", "reference"):
        assert _dispatch._check_choice(name) == name
    with pytest.raises(TypeError):
        _dispatch._check_choice("cpu")


def test_the_choice_ends_with_its_block():
    before = _dispatch._choice
    with fastgen.backend("reference"):
        with fastgen.backend("auto"):
            assert _dispatch._choice == "auto"
        assert _dispatch._choice == "reference"
        with pytest.raises(ZeroDivisionError), fastgen.backend("auto"):
            raise ZeroDivisionError
        assert _dispatch._choice == "reference"
    assert _dispatch._choice == before


def test_reference_is_plain_pytorch():
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    assert "fastgen" in ops.upfirdn2d(x, F4, padding=2).grad_fn.name()
    with fastgen.backend("reference"):
        assert "fastgen" not in ops.upfirdn2d(x, F4, padding=2).grad_fn.name()


def python(code: str, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_environment_variable():
    code = "from fastgen.ops import _dispatch; print(_dispatch._choice)"
    assert python(code, FASTGEN_BACKEND="reference").stdout.strip() == "reference"
    failed = python(code, FASTGEN_BACKEND="fast")
    assert "backend must be one of auto, cpu, cuda, triton, cuda-host, reference, got 'fast'" in failed.stderr


def test_ops_run_without_the_compiled_library():
    """The registered backward on the reference's kernels, as where nothing is compiled."""
    code = """if True:
        import sys, torch
        sys.modules["fastgen._cpu"] = None
        from fastgen import _backends, ops
        assert not _backends.status()["cpu"][0]
        x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
        b = torch.randn(3, dtype=torch.float64, requires_grad=True)
        f = ops.setup_filter([1, 3, 3, 1])
        def function(x, b):
            y = ops.bias_act(x.to(memory_format=torch.channels_last), b, act="swish", clamp=1)
            y = ops.upfirdn2d(y, f, up=2, padding=1)
            assert "fastgen" in y.grad_fn.name() and y.is_contiguous(memory_format=torch.channels_last)
            return y
        assert torch.autograd.gradcheck(function, (x, b), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x, b), fast_mode=True)
        print("ran")
    """
    done = python(code)
    assert done.stdout.strip() == "ran", done.stderr


class Network(torch.nn.Module):
    def forward(self, x, b):
        y = ops.upfirdn2d(x, F4, up=2, padding=[2, 1, 2, 1], gain=4)
        return ops.filtered_lrelu(ops.bias_act(y, b, act="swish", clamp=2), F4, F4, b, down=2, padding=2)


def test_inductor(device):
    torch.compiler.reset()
    inputs = {"x": torch.randn(2, 3, 8, 8, requires_grad=True), "b": torch.randn(3, requires_grad=True)}
    inputs = {k: x.detach().to(device).requires_grad_() for k, x in inputs.items()}
    out = torch.compile(Network(), fullgraph=True)(**inputs)
    want = Network()(**inputs)
    torch.testing.assert_close(out, want)
    got, want = gradients(out, inputs), gradients(want, inputs)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_compile_with_changing_sizes():
    torch.compiler.reset()
    compiled = torch.compile(Network(), fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (8, 10, 13):
        x, b = torch.randn(2, 3, size, size + 1), torch.randn(3)
        torch.testing.assert_close(compiled(x, b), Network()(x, b))


def test_export():
    x, b = torch.randn(2, 3, 8, 8), torch.randn(3)
    exported = torch.export.export(Network(), (x, b))
    assert "fastgen.upfirdn2d" in str(exported.graph)
    torch.testing.assert_close(exported.module()(x, b), Network()(x, b))


EXPORTED = {
    "conv2d_resample": lambda x: ops.conv2d_resample(x, torch.ones(2, 3, 3, 3), F4, up=2, padding=1),
    "modulated_conv2d": lambda x: ops.modulated_conv2d(
        x, torch.ones(2, 3, 3, 3), x.mean([2, 3]), padding=1, act="lrelu"
    ),
    "sample_triplane": lambda x: ops.sample_triplane(
        x[:, :, None], x.flatten(2).mT, plane_axes=[[[1, 0, 0], [0, 1, 0], [0, 0, 1]]] * 3, reduce="mean"
    ),
    "render_triplane": lambda x: ops.render_triplane(
        x[:, :, None].expand(-1, -1, 4, -1, -1),
        [torch.ones(5, 4), torch.ones(5), torch.ones(3, 5), torch.ones(3)],
        torch.full((2, 6, 3), 0.1),
        torch.full((2, 6, 3), 0.5),
        {"ray_start": 0.1, "ray_end": 1, "depth_resolution": 4, "depth_resolution_importance": 4},
    ),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_export_of_composed_ops(name):
    class Call(torch.nn.Module):
        def forward(self, x):
            return EXPORTED[name](x)

    x = torch.rand(2, 3, 8, 7)
    exported = torch.export.export(Call(), (x,))
    assert f"fastgen.{name}" in str(exported.graph)
    got, want = exported.module()(x), EXPORTED[name](x)
    for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_what_an_op_returns_is_its_own():
    x = torch.ones(2)
    for out in (_define._fresh(lambda x: x)(x), *_define._fresh(lambda x: [x, x + 1])(x)):
        assert out.data_ptr() != x.data_ptr()


class _Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), function.name()]
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("grad", [False, True])
def test_modes_see_ops_that_nothing_records(grad):
    """Such calls go below autograd, and past the dispatcher where they are composed."""
    x, weight, styles = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3), torch.randn(1, 4)
    with torch.set_grad_enabled(grad), _Seen() as seen:
        y = ops.modulated_conv2d(ops.bias_act(x, act="lrelu"), weight, styles, padding=1, act="relu")
    assert "fastgen::bias_act" in seen.names and "aten::convolution" in seen.names
    assert not y.requires_grad
    weight.requires_grad_()
    with torch.set_grad_enabled(grad):
        assert ops.modulated_conv2d(x, weight, styles, padding=1).requires_grad == grad
