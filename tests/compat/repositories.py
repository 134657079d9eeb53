"""What the tests of dialects share: files of repositories, and the golden data."""

import json
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parents[1] / "data"


CASES = json.loads((DATA / "ops.json").read_text())


ARRAYS = np.load(DATA / "ops.npz")


# What a repository has that does not compile: importing it must never happen.
BROKEN = "raise RuntimeError('Setting up PyTorch plugin ... Failed!')\n"


UPFIRDN2D = "def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl='cuda'): ...\n"


OTHER_UPFIRDN2D = "def upfirdn2d(input, kernel, up=1, down=1, pad=(0, 0)): ...\n"


def fused_act(second: str) -> str:
    return (
        "class FusedLeakyReLU:\n"
        f"    def __init__(self, channel, {second}, scale=2**0.5): ...\n"
        "def fused_leaky_relu(input, bias, negative_slope=0.2, scale=2**0.5): ...\n"
    )


def golden(op: str):
    """Cases of an op: its arguments and its result."""
    for i, case in enumerate(CASES):
        if case["op"] == op:
            inputs = {
                n: torch.from_numpy(ARRAYS[k]) for n in case["inputs"] if (k := f"{i}.in.{n}") in ARRAYS
            }
            params = {k: v for k, v in case["params"].items() if k not in ("filter_taps", "k")}
            left = {name: x for name, x in inputs.items() if name not in ("dy", "r")}
            yield left, params, torch.from_numpy(ARRAYS[f"{i}.out"])


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5 * max(1, want.abs().max().item()))
