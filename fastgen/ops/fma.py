"""Multiply-add."""

from torch import Tensor


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a * b + c
