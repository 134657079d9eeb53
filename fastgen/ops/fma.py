"""Multiply and add in one pass."""

import torch
from torch import Tensor

from ._define import define, require_same_device, require_tensor


def fma_reference(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.addcmul(c, a, b)


_fma = define("fma(Tensor a, Tensor b, Tensor c) -> Tensor", reference=fma_reference)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c with broadcasting, as torch's.

    a, b, c: tensors of any shapes that broadcast; b and c in another dtype are converted to a's.
    Returns:   the broadcast shape, dtype of a.
    Raises:    ValueError on shapes and devices; TypeError on dtypes.
    Precision: one rounding, in float32 or better; differentiable to any order.
    """
    for name, x in (("a", a), ("b", b), ("c", c)):
        require_tensor("fma", name, x)
    require_same_device("fma", a=a, b=b, c=c)
    try:
        torch.broadcast_shapes(a.shape, b.shape, c.shape)
    except RuntimeError:
        shapes = [list(x.shape) for x in (a, b, c)]
        raise ValueError("fma: a, b and c must broadcast, got {}, {} and {}".format(*shapes)) from None
    return _fma(a, b.to(a.dtype), c.to(a.dtype))
