"""What kernels and launchers share: dtypes, layouts, and functions that Triton's interpreter lacks."""

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# There a program takes its time for each step, whatever the size of its tile: tiles are larger.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
AUTOTUNE = os.environ.get("FASTGEN_AUTOTUNE") == "1" and not INTERPRETED
fastest: dict[tuple, dict] = {}
T = TypeVar("T")


def serves(*tensors: Tensor | None) -> bool:
    """Are all of a dtype that the kernels take, and is there anything to do?"""
    given = [x for x in tensors if x is not None]
    return all(x.dtype in FLOATS for x in given) and given[0].numel() > 0


def precision(x: Tensor, dtype: torch.dtype | None = None) -> str:
    """What products of a dtype, or of x's, are made in: 16 bits fit in TF32, of float32 it would lose 13."""
    short = (dtype or x.dtype) != torch.float32 or torch.backends.cuda.matmul.allow_tf32
    return "tf32" if short else "tf32x3"


def registers(warps: int) -> int:
    """Of a thread, at most: without a limit a few are spilled for the sake of one more program at once."""
    return min(255, 65536 // (32 * warps))


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x in the strides of `like`, copied only if it has others."""
    return x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)


def packed(x: Tensor | None) -> Tensor | None:
    """x, or a copy without gaps."""
    return None if x is None else x.contiguous()


@triton.jit
def widened(x):
    """x in float32; Triton's interpreter takes the smallest numbers of bfloat16 for others."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """x, float32, in dtype, to the nearest; Triton's interpreter would cut off what bfloat16 lacks."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


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


def tuned(key: tuple, configs: Sequence[dict], launch: Callable[[dict], T]) -> T:
    """`launch` with the first of configs, or, with FASTGEN_AUTOTUNE=1, with the fastest one for this key.

    The key is of shape classes, not sizes: each new one is measured once a process, and that waits for the
    device, so that no CUDA graph may be under capture; then the first serves.
    """
    key = key, torch.cuda.current_device() if AUTOTUNE and torch.cuda.is_available() else 0
    if AUTOTUNE and key not in fastest and not _is_capturing():
        fastest[key] = min(configs, key=lambda config: milliseconds(lambda: launch(config)))
    return launch(fastest.get(key, configs[0]))


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def milliseconds(call: Callable[[], object]) -> float:
    try:
        return triton.testing.do_bench(call, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def size_class(*sizes: int) -> tuple[int, ...]:
    """Their binary orders of magnitude."""
    return tuple(size.bit_length() for size in sizes)
