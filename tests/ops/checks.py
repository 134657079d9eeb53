"""What every op must do, over its list of named cases. tests/ops/test_<op>.py derives from OpChecks."""

import dataclasses
import re
from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastgen

STATIC_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@dataclasses.dataclass
class Case:
    """One call of an op: tensors by name, and the rest of the arguments.

    inputs: shapes of normal random numbers; or a tensor, or a function of nothing that makes one; or None.
    fixed:  inputs without a gradient, which keep their dtype.
    """

    name: str
    inputs: dict[str, tuple | Tensor | Callable | None]
    params: dict = dataclasses.field(default_factory=dict)
    fixed: tuple[str, ...] = ()

    def make(self, dtype=torch.float32, device="cpu", seed=0) -> dict[str, Tensor | None]:
        random = torch.Generator().manual_seed(seed)
        made = {}
        for name, x in self.inputs.items():
            x = torch.randn(x, generator=random, dtype=torch.float64) if isinstance(x, tuple) else x
            x = x() if callable(x) else x
            if x is not None:
                x = x.to(device) if name in self.fixed else x.to(device, dtype).requires_grad_()
            made[name] = x
        return made


def exact_copy(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same numbers in float64."""
    return {
        k: x if x is None else x.detach().double().requires_grad_(x.requires_grad) for k, x in inputs.items()
    }


def nudged(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Every number that has a gradient, moved by one rounding up or down."""
    random = torch.Generator().manual_seed(2)

    def move(x):
        if x is None or not x.requires_grad:
            return x
        signs = torch.randint(2, x.shape, generator=random).to(x) * 2 - 1
        return (x.detach() * (1 + torch.finfo(x.dtype).eps * signs)).requires_grad_()

    return {name: move(x) for name, x in inputs.items()}


def gradients(out: Tensor, inputs: dict[str, Tensor | None], **kwargs) -> dict[str, Tensor]:
    """Gradients of sum(out * dy), dy always the same."""
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = {k: x for k, x in inputs.items() if x is not None and x.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(out, [*wanted.values()], dy.to(out), **kwargs), strict=True))


class Recorder(TorchDispatchMode):
    """Keeps the calls of fastgen's ops as the dispatcher sees them."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastgen":
            self.calls.setdefault(function, args)
        return function(*args, **(kwargs or {}))


class ComposedRecorder(TorchFunctionMode):
    """Keeps those that are composed of others, which the dispatcher never shows."""

    def __init__(self, calls: dict):
        super().__init__()
        self.calls = calls

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if isinstance(function, torch._ops.OpOverload) and function.namespace == "fastgen":
            self.calls.setdefault(function, args)
        return function(*args, **(kwargs or {}))


class OpChecks:
    """Subclasses set `op`, `cases`, and `errors`: (changed arguments, exception, message)."""

    op: Callable
    cases: list[Case]
    errors: list[tuple[dict, type[Exception], str]]
    dtypes = DTYPES
    image = "x"  # the input whose layout is varied
    keeps_layout = True  # channels_last in, channels_last out
    any_order = 0.0  # how much float64 gradients may differ from one time to the next, where atomics add them
    stops_nan = False  # gradients may be 0 where those of plain PyTorch are NaN

    def run(self, case: Case, inputs: dict, **params) -> Tensor:
        return type(self).op(**inputs, **{**case.params, **params})

    def reference(self, case: Case, inputs: dict) -> Tensor:
        with fastgen.backend("reference"):
            return self.run(case, inputs)

    def test_forward(self, case, dtype, device, poisoned):
        inputs = case.make(dtype, device)
        got = self.run(case, inputs)
        assert got.dtype == dtype
        assert_accurate(got, self.reference(case, exact_copy(inputs)), self.reference(case, inputs))

    def test_gradients(self, case, dtype, device, poisoned):
        inputs, exact = case.make(dtype, device), exact_copy(case.make(dtype, device))
        got = gradients(self.run(case, inputs), inputs)
        want = gradients(self.reference(case, exact), exact)
        # The exact result is float64's own: there, what rounding the inputs once more changes is the measure.
        nearby = nudged(inputs) if dtype == torch.float64 else inputs
        same = gradients(self.reference(case, nearby), nearby)
        for name, x in inputs.items():
            if name in got:
                assert got[name].dtype == x.dtype
                assert_accurate(got[name], want[name], same[name], f"gradient of {name}")

    def test_gradgradcheck(self, case, device):
        inputs = case.make(torch.float64, device)
        names = [k for k, x in inputs.items() if x is not None and x.requires_grad]

        def function(*tensors):
            return self.run(case, {**inputs, **dict(zip(names, tensors, strict=True))})

        tensors = [inputs[name] for name in names]
        assert torch.autograd.gradcheck(function, tensors, fast_mode=True, nondet_tol=self.any_order)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True, nondet_tol=self.any_order)

    def test_gradient_penalty(self, case, device):
        # Of a loss whose gradient dy depends on the inputs itself, unlike gradgradcheck's.
        def penalty(run):
            inputs = case.make(torch.float64, device)
            wanted = [x for x in inputs.values() if x is not None and x.requires_grad]
            grads = torch.autograd.grad(run(case, inputs).square().sum(), wanted, create_graph=True)
            total = sum(grad.square().sum() for grad in grads)
            # Where nothing comes out, nothing depends on it.
            return torch.autograd.grad(total, wanted, materialize_grads=True) if total.requires_grad else []

        for got, want in zip(penalty(self.run), penalty(self.reference), strict=True):
            scale = want.abs().max().item() if want.numel() else 0.0
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * scale)

    def test_func(self, few, device):
        inputs = few.make(torch.float64, device)
        names = [k for k, x in inputs.items() if x is not None and x.requires_grad]
        tensors = tuple(inputs[name] for name in names)
        tangents = tuple(torch.randn_like(x) for x in tensors)

        def function(*tensors):
            return self.run(few, {**inputs, **dict(zip(names, tensors, strict=True))})

        out, change = torch.func.jvp(function, tensors, tangents)
        torch.testing.assert_close(out, function(*tensors))
        dy = torch.randn_like(out)
        grads = torch.autograd.grad(function(*tensors), tensors, dy)
        want = sum((grad * tangent).sum() for grad, tangent in zip(grads, tangents, strict=True))
        torch.testing.assert_close((change * dy).sum(), want)
        argnums = tuple(range(len(tensors)))
        same = torch.func.grad(lambda *tensors: (function(*tensors) * dy).sum(), argnums)(*tensors)
        for got, grad in zip(same, grads, strict=True):
            torch.testing.assert_close(got, grad)

    @pytest.mark.parametrize("layout", ["strided", "transposed", "channels_last", "expanded"])
    def test_layout(self, case, device, layout, poisoned):
        inputs = case.make(device=device)
        x = inputs[self.image].detach()
        if layout == "strided":
            wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
            wide[..., 1::2] = x
            x = wide[..., 1::2]
        elif layout == "transposed":
            x = x.mT.contiguous().mT if x.ndim > 1 else x.flip(0)
        elif layout == "expanded":
            x = x[:1].expand(x.shape)
        elif x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        inputs[self.image] = x.requires_grad_()
        exact = exact_copy(inputs)
        got, want = self.run(case, inputs), self.reference(case, exact)
        assert_accurate(got, want, self.reference(case, inputs))
        if layout == "channels_last" and x.ndim == 4 and self.keeps_layout:
            assert got.stride() == torch.empty_like(got, memory_format=torch.channels_last).stride()
        got, want = gradients(got, inputs), gradients(want, exact)
        same = gradients(self.reference(case, inputs), inputs)
        for name in got:
            assert_accurate(got[name], want[name], same[name], f"gradient of {name}")

    def test_empty_batch(self, case, device):
        inputs = case.make(device=device)
        shape = self.run(case, inputs).shape
        inputs = self.emptied(case, inputs)
        out = self.run(case, inputs)
        assert out.shape == (0, *shape[1:])
        for name, grad in gradients(out, inputs).items():
            assert grad.shape == inputs[name].shape
            assert not grad.any()

    def emptied(self, case, inputs):
        """The inputs with batch size 0."""
        return {**inputs, self.image: inputs[self.image].detach()[:0].requires_grad_()}

    def test_not_finite(self, case, device):
        inputs = case.make(device=device)
        x = inputs[self.image].detach().clone().flatten()
        x[0], x[x.numel() // 2], x[-1] = torch.nan, torch.inf, -torch.inf
        inputs[self.image] = x.view(inputs[self.image].shape).requires_grad_()
        exact = exact_copy(inputs)
        got, want = self.run(case, inputs), self.reference(case, exact)
        assert not want.isfinite().all() or not want.any()
        assert_accurate(got, want, self.reference(case, inputs))
        got, want = gradients(got, inputs), gradients(want, exact)
        for name in want:
            own = ~inputs[name].isfinite()
            more, less = got[name].isnan() & ~want[name].isnan(), want[name].isnan() & ~got[name].isnan()
            assert not (more & ~own).any(), f"NaN in the gradient of {name}"
            assert self.stops_nan or not (less & ~own).any(), f"no NaN in the gradient of {name}"

    def test_autocast(self, case, device):
        inputs = case.make(device=device)
        out = self.run(case, inputs)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            torch.testing.assert_close(self.run(case, inputs), out, rtol=0, atol=0)

    def test_opcheck(self, few):
        inputs = few.make()
        wanted = [x for x in inputs.values() if x is not None and x.requires_grad]
        with Recorder() as recorder, ComposedRecorder(recorder.calls):
            grads = gradients(self.run(few, inputs), inputs, create_graph=True)
            total = sum(grad.square().sum() for grad in grads.values())
            if total.requires_grad:
                torch.autograd.grad(total, wanted, allow_unused=True)
        own = getattr(torch.ops.fastgen, type(self).op.__name__).default
        assert own in recorder.calls
        constants = [x.shape for x in inputs.values() if x is not None and not x.requires_grad]
        for function, args in recorder.calls.items():
            args = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), args)
            for x in pytree.tree_leaves(args):
                if isinstance(x, Tensor) and x.shape not in constants:
                    x.requires_grad_()
            # A composed op leaves sizes unknown while tracing to its parts: test_compile traces it.
            composed = torch._C._dispatch_has_kernel_for_dispatch_key(
                function.name(), "CompositeImplicitAutograd"
            )
            checks = STATIC_CHECKS if composed else (*STATIC_CHECKS, "test_aot_dispatch_dynamic")
            torch.library.opcheck(function, args, test_utils=checks)

    def test_compile(self, few, device):
        torch.compiler.reset()
        inputs = few.make(device=device)
        compiled = torch.compile(lambda inputs: self.run(few, inputs), fullgraph=True, backend="aot_eager")
        out = compiled(inputs)
        torch.testing.assert_close(out, self.run(few, inputs))
        got, want = gradients(out, inputs), gradients(self.run(few, inputs), inputs)
        for name in want:
            torch.testing.assert_close(got[name], want[name])

    def test_error(self, error):
        changed, exception, message = error
        inputs = self.cases[0].make()
        arguments = {**inputs, **self.cases[0].params, **changed}
        with pytest.raises(exception, match=f"^{re.escape(message)}$"):
            type(self).op(**arguments)
