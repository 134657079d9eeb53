"""Every op against the original implementations' arrays: values, gradients, and gradients of gradients."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen import ops

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "ops.json").read_text())
ARRAYS = np.load(DATA / "ops.npz")

# The arrays are float32 sums of at most a few hundred terms, in another order. Where all should be zero, 1e-3
# stands for the largest value, so that rounding errors of cancelling terms of size 1 pass.
RELATIVE = 3e-6


def array(name, device="cpu"):
    return torch.from_numpy(ARRAYS[name]).to(device) if name in ARRAYS else None


def assert_close(got, want, what):
    error, largest = (got.cpu() - want).abs().max().item(), want.abs().max().item()
    assert error <= RELATIVE * max(largest, 1e-3), f"{what}: largest error {error:.3g} of {largest:.3g}"


@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: f"{i}-{CASES[i]['op']}")
def test_golden(i, device):
    case = CASES[i]
    tensors = {name: array(f"{i}.in.{name}", device) for name in case["inputs"]}
    dy, r = tensors.pop("dy"), tensors.pop("r")
    names = [name for name in case["grads"] if not name.startswith("second_")]
    wanted = [tensors[name].requires_grad_() for name in names]
    planes = case["op"] == "sample_triplane"
    arguments = {"planes" if planes and name == "x" else name: x for name, x in tensors.items()}
    params = {k: v for k, v in case["params"].items() if k not in ("filter_taps", "k")}

    out = getattr(ops, case["op"])(**arguments, **params)
    assert_close(out, array(f"{i}.out"), "out")
    grads = torch.autograd.grad(out, wanted, dy, create_graph=True)
    for name, grad in zip(names, grads, strict=True):
        assert_close(grad, array(f"{i}.grad.{name}"), name)

    second = [name for name in case["grads"] if name.startswith("second_")]
    if not second:
        return
    dx = grads[names.index("x")]
    inputs = [tensors[name.removeprefix("second_")] for name in second]
    if not dx.requires_grad:
        seconds = [torch.zeros_like(x) for x in inputs]
    else:
        seconds = torch.autograd.grad(dx, inputs, r, allow_unused=True, materialize_grads=True)
    for name, grad in zip(second, seconds, strict=True):
        want = array(f"{i}.grad.{name}")
        assert_close(grad, torch.zeros_like(grad).cpu() if want is None else want, name)
