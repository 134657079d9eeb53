"""What the compiler makes of the Triton kernels, and how they take the place of others."""

import csv
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgen
from fastgen import ops

cubins = pytest.importorskip("fastgen.kernels.cubins")

GOOD = cubins.Cubin("some_kernel", "BLOCK=16", "float32", 90, 4, 64, 0, 1024, 2, "wgmma")


def run(*command, **environment):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.triton
def test_every_kernel_compiles_for_every_architecture():
    """No spills in forwards, shared memory that is there, matrix instructions where products are meant."""
    done = run("-m", "fastgen.kernels.cubins")
    assert done.returncode == 0, done.stderr
    table = list(csv.DictReader(io.StringIO(done.stdout)))
    for file in Path(cubins.__file__).parent.glob("*.py"):
        text = file.read_text()
        names = [
            line.split("(")[0][4:]
            for line in text.splitlines()
            if line.startswith("def ") and "_kernel(" in line
        ]
        for name in names:
            found = {(int(row["arch"]), row["dtype"]) for row in table if row["kernel"] == name}
            assert found == set(cubins.TARGETS), f"{name} compiled for {found}"


@pytest.mark.parametrize(
    "change, fault",
    [
        ({}, None),
        ({"stack": 8}, "8 bytes a thread are spilled"),
        ({"stack": 8, "kernel": "some_bwd_kernel"}, None),
        ({"shared": 233_000}, "233000 bytes of shared memory, sm_90 has 227 KiB"),
        ({"matrix": ""}, "tl.dot without matrix instructions"),
        ({"matrix": "", "dots": 0}, None),
    ],
)
def test_faults_of_a_kernel(change, fault):
    found = cubins.dataclasses.replace(GOOD, **change).faults()
    assert found == ([] if fault is None else [f"some_kernel (BLOCK=16) float32 sm_90: {fault}"])


def test_what_waits_for_the_device_is_seen():
    x = torch.ones(3)
    with cubins.Blind():
        x.sum()
        for read in (lambda: x.sum().item(), lambda: bool((x > 0).all()), lambda: x[x > 0]):
            with pytest.raises(RuntimeError, match="waits for the device"):
                read()


@pytest.mark.triton
def test_triton_stands_above_the_others_while_it_is_chosen(monkeypatch):
    launched = []
    module = importlib.import_module("fastgen.kernels.bias_act")
    launch = module.bias_act
    monkeypatch.setattr(module, "bias_act", lambda *args: launched.append(args) or launch(*args))
    x = torch.randn(3, 4)
    want = ops.bias_act(x, act="swish")
    with fastgen.backend("triton"):
        with fastgen.backend("triton"):
            pass
        torch.testing.assert_close(ops.bias_act(x, act="swish"), want)
        assert len(launched) == 1
        with fastgen.backend("reference"):
            ops.bias_act(x, act="swish")
        # What kernels do not serve, the reference does.
        assert ops.bias_act(x.double(), act="swish").dtype == torch.float64
    ops.bias_act(x, act="swish")
    assert len(launched) == 2
    assert launch(x.double(), None, 0, "swish", 0.0, 1.4, -1.0) is NotImplemented


@pytest.mark.triton
def test_the_fastest_configuration_is_measured_once_for_a_class_of_shapes(monkeypatch):
    common = importlib.import_module("fastgen.kernels.common")
    bias_act = importlib.import_module("fastgen.kernels.bias_act")
    measured = []

    def milliseconds(call):
        call()
        measured.append(call)
        return -len(measured)  # the last is the fastest

    monkeypatch.setattr(common, "milliseconds", milliseconds)
    monkeypatch.setattr(common, "fastest", {})
    x = torch.randn(5, 700)
    with fastgen.backend("triton"):
        default = ops.bias_act(x, act="swish")
        assert not measured
        monkeypatch.setattr(common, "AUTOTUNE", True)
        for y in (x, x[:, 1:].contiguous(), x.bfloat16()):
            torch.testing.assert_close(
                ops.bias_act(y, act="swish").float(),
                ops.bias_act(y.float(), act="swish"),
                rtol=1e-2,
                atol=1e-2,
            )
        torch.testing.assert_close(ops.bias_act(x, act="swish"), default)
    assert len(measured) == 2 * len(bias_act.CONFIGS)
    assert list(common.fastest.values()) == [bias_act.CONFIGS[-1]] * 2


def test_no_list_of_configurations_is_long():
    for name in ("bias_act", "upfirdn2d", "filtered_bias_act", "sample_triplane", "render_triplane"):
        assert len(importlib.import_module(f"fastgen.kernels.{name}").CONFIGS) <= 6
    assert all(len(t) <= 6 for t in importlib.import_module("fastgen.kernels.styled_conv2d").TILES.values())


def test_triton_by_the_environment():
    code = (
        "import sys, torch, fastgen\nfastgen.ops.bias_act(torch.zeros(2, 3))\n"
        "print('fastgen.kernels.bias_act' in sys.modules)"
    )
    done = run("-c", code, FASTGEN_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.stdout == "True\n", done.stderr
    if not torch.cuda.is_available():
        done = run("-c", code, FASTGEN_BACKEND="triton")
        assert "backend 'triton' is not available: no CUDA device is visible" in done.stderr
