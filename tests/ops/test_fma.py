"""fma."""

import torch
from ops.checks import Case, OpChecks

from fastgen import ops


class TestFma(OpChecks):
    op = ops.fma
    keeps_layout = False
    image = "a"
    cases = [
        Case("same", {"a": (2, 3, 4, 5), "b": (2, 3, 4, 5), "c": (2, 3, 4, 5)}),
        Case("broadcast", {"a": (2, 3, 4, 5), "b": (2, 3, 1, 1), "c": (1, 1, 4, 5)}),
        Case("scalars", {"a": (2, 7), "b": (), "c": (7,)}),
    ]
    errors = [
        ({"b": 2.0}, TypeError, "fma: b must be a tensor, got float"),
        (
            {"c": torch.zeros(3)},
            ValueError,
            "fma: a, b and c must broadcast, got [2, 3, 4, 5], [2, 3, 4, 5] and [3]",
        ),
        ({"c": torch.zeros(5, device="meta")}, ValueError, "fma: c must be on cpu like a, got meta"),
    ]

    def emptied(self, case, inputs):
        return {
            k: x.detach()[: 0 if x.shape[:1] == (2,) else None].requires_grad_() if x.ndim else x
            for k, x in inputs.items()
        }

    def test_opcheck(self):
        args = tuple(torch.randn(shape, requires_grad=True) for shape in ((2, 3), (3,), (2, 1)))
        torch.library.opcheck(torch.ops.fastgen.fma.default, args)


def test_value(device):
    a, b, c = (torch.tensor(v, device=device) for v in ([1.0, 2.0], [3.0, 4.0], [5.0, 6.0]))
    assert ops.fma(a, b, c).tolist() == [8, 14]
    assert ops.fma(a.half(), b, c.double()).dtype == torch.float16


def test_vmap(device):
    a, b, c = (torch.randn(shape, device=device) for shape in ((4, 3), (3,), (4, 3)))
    torch.testing.assert_close(torch.func.vmap(ops.fma, in_dims=(0, None, 0))(a, b, c), a * b + c)
