"""The one tolerance rule: at most twice the rounding error that the reference makes in the tested dtype."""

import math

import torch
from torch import Tensor


def assert_accurate(
    got: Tensor, exact: Tensor, same_dtype: Tensor | None = None, what: str = "result"
) -> None:
    """max|got - exact| <= 2 max|same_dtype - exact| + 4 eps max|exact|, eps of got's dtype.

    exact: the reference in float64; same_dtype: the reference in got's dtype (None: it is taken to be exact).
    NaN and infinities must be where the exact result has them.
    """
    assert got.shape == exact.shape, f"{what}: shape {list(got.shape)}, expected {list(exact.shape)}"
    if got.numel() == 0:
        return
    eps = torch.finfo(got.dtype).eps
    got, exact = got.detach().double().cpu(), exact.detach().double().cpu()
    finite = exact.isfinite()
    torch.testing.assert_close(got[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    got, exact = got[finite], exact[finite]
    assert got.isfinite().all(), f"{what}: {int((~got.isfinite()).sum())} values are not finite"
    if got.numel() == 0:
        return
    allowed = 4 * eps * exact.abs().max().item()
    if same_dtype is not None:
        allowed += 2 * (same_dtype.detach().double().cpu()[finite] - exact).abs().max().item()
    assert math.isfinite(allowed), f"{what}: the reference in the same dtype is not finite"
    error = (got - exact).abs().max().item()
    assert error <= allowed, f"{what}: largest error {error:.3g}, allowed {allowed:.3g}"
