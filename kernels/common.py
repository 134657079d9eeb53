"""What kernels and launchers share: dtypes, layouts, and functions that Triton's interpreter lacks."""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Elements that a program of an elementwise kernel takes: two to four 16-byte loads a thread.
BLOCK = 1024


def serves(*tensors: Tensor | None) -> bool:
    """Are all of a dtype that the kernels take, and is there anything to do?"""
    given = [x for x in tensors if x is not None]
    return all(x.dtype in FLOATS for x in given) and given[0].numel() > 0


def precision(x: Tensor) -> str:
    """What products of x's dtype are made in: 16 bits lose nothing in TF32, float32 would lose 13."""
    return "tf32" if x.dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x in the strides of `like`, copied only if it has others."""
    return x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)


def packed(x: Tensor | None) -> Tensor | None:
    """x, or a copy without gaps."""
    return None if x is None else x.contiguous()


@triton.jit
def expm1(x):
    """e^x - 1; near 0 by its series, for the difference would keep no digits."""
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040))))))
    return tl.where(tl.abs(x) < 0.35, series, tl.exp(x) - 1)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    # Of |x| and not beyond 20, where it is 1: so that nothing overflows. Comparisons leave NaN alone.
    e = expm1(2 * tl.where(tl.abs(x) > 20, 20.0, tl.abs(x)))
    return tl.where(x < 0, -e, e) / (e + 2)


@triton.jit
def softplus(x):
    """log(1 + e^x)."""
    e = tl.exp(-tl.abs(x))
    series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e / 5))))
    return tl.where(x > 0, x, 0.0) + tl.where(e < 0.05, series, tl.log(1 + e))


def tuned(configs: list[triton.Config], key: list[str]):
    """The first configuration, or, with FASTGEN_AUTOTUNE=1, what is measured to be the fastest for each key.

    The key is of shape classes, not sizes: each new one is measured, and that waits for the device.
    """

    def decorate(kernel):
        chosen = configs if os.environ.get("FASTGEN_AUTOTUNE") == "1" else configs[:1]
        kernel = triton.autotune(chosen, key, cache_results=True)(kernel)
        kernel.every_config = configs
        return kernel

    return decorate
