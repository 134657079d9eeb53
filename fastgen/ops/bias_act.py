"""Bias, activation, gain, clamp."""

import torch
import torch.nn.functional as F
from torch import Tensor

# name -> (function of (x, alpha), default alpha, default gain)
_ACTS = {
    "linear": (lambda x, _: x, 0.0, 1.0),
    "relu": (lambda x, _: F.relu(x), 0.0, 2**0.5),
    "lrelu": (F.leaky_relu, 0.2, 2**0.5),
    "tanh": (lambda x, _: x.tanh(), 0.0, 1.0),
    "sigmoid": (lambda x, _: x.sigmoid(), 0.0, 1.0),
    "elu": (lambda x, _: F.elu(x), 0.0, 1.0),
    "selu": (lambda x, _: F.selu(x), 0.0, 1.0),
    "softplus": (lambda x, _: F.softplus(x), 0.0, 1.0),
    "swish": (lambda x, _: x.sigmoid() * x, 0.0, 2**0.5),
}


def bias_act(x: Tensor, b: Tensor | None = None, dim: int = 1, act: str = "linear", alpha=None, gain=None, clamp=None) -> Tensor:
    function, default_alpha, default_gain = _ACTS[act]
    gain = default_gain if gain is None else gain
    if b is not None:
        x = x + b.to(x.dtype).reshape([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])
    x = function(x, default_alpha if alpha is None else alpha)
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)
