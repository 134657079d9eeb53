"""What an H200 should take, from bytes and operations: `python benchmarks/predict.py`.

NOTHING HERE IS MEASURED on a card. A launch takes as long as the slowest of what it needs: its tensors, read
or written once, at the speed of a copy; its products; and, of Triton's kernels, operations of each kind, as
Triton's interpreter counts them on a piece of the work: a multiply-add is one, but every element has an
address of its own, which on a card eight share. That is the low end. At the high end nothing overlaps.
"""

import collections
import contextlib
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.runtime.interpreter as interpreter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fastgen
from fastgen import camera, ops, presets
from fastgen.models.layers import compute_in
from fastgen.models.student import Student
from fastgen.models.teacher import Teacher

SMS, CLOCK = 132, 1.755e9
# A second's worth. Products: of the peaks, what a good kernel gets. Level 1 and 2 are the caches.
PEAKS = {
    "bytes": 4.3e12,
    "bfloat16": 0.75 * 989e12,
    "tf32": 0.6 * 494e12,
    "lanes": SMS * 128 * CLOCK,
    "special": SMS * 16 * CLOCK,
    "loaded": SMS * 128 * CLOCK,
    "atomics": 2.5e12,
}
LAUNCH = 1e-6  # in a CUDA graph
SPECIAL = np.exp, np.exp2, np.log, np.log2, np.sqrt, np.sin, np.cos, np.divide


@contextlib.contextmanager
def operations():
    """Counts within what the interpreter does: operations, special functions, bytes loaded and added to."""
    found = dict.fromkeys(PEAKS, 0.0)
    builder = interpreter.InterpreterBuilder
    before = dict(vars(builder))

    def counted(name, count):
        original = before[name]

        def run(self, *args):
            out = original(self, *args)
            count(out, *args)
            return out

        setattr(builder, name, run)

    multiplied = collections.deque(maxlen=64)

    def lanes(out, *args):
        if args[-1] is np.multiply:
            multiplied.append(out.data)
        fused = args[-1] is np.add and any(x.data is y for x in args[:2] for y in multiplied)
        found["lanes"] += 0 if fused else out.data.size
        if any(args[-1] is function for function in SPECIAL):
            found["special"] += out.data.size

    def load(out, pointers, mask, *_):
        found["loaded"] += mask.data.sum() * out.data.itemsize

    def dot(out, a, b, d, precision, *_):
        three = precision == interpreter._ir.INPUT_PRECISION.TF32x3
        kind = "tf32" if a.data.itemsize == 4 else "bfloat16"
        found[kind] += 2 * out.data.size * a.data.shape[-1] * (1 + 2 * three)

    def atomic(out, kind, pointers, value, mask, *_):
        found["atomics"] += mask.data.sum() * value.data.itemsize

    for name in ("binary_op", "unary_op", "ternary_op", "cast_impl", "create_idiv", "create_gather"):
        counted(name, lanes)
    counted("create_masked_load", load)
    counted("create_dot", dot)
    counted("create_atomic_rmw", atomic)
    try:
        yield found
    finally:
        for name, value in before.items():
            if callable(value) and getattr(builder, name) is not value:
                setattr(builder, name, value)


class Launches(TorchDispatchMode):
    """Every op that moves numbers: bytes of its tensors, and products."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.name().split("::")[1].split(".")[0]
        tensors = [x for x in pytree.tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        nothing = function.is_view or "empty" in name or name in ("detach", "_unsafe_view", "device")
        if nothing or not tensors:
            return out
        moved = sum(x.numel() * x.element_size() for x in tensors)
        products = 0
        if name.startswith("styled_conv2d"):
            x, weight, up = args[0], args[1], name == "styled_conv2d" and args[-1] == 2
            pixels = x[:, 0].numel() if up else out[:, 0].numel()
            products = 2 * pixels * weight.numel()
        elif function.overloadpacket in flop_registry:
            products = flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        self.made.append((name, {"bytes": moved, str(tensors[0].dtype).removeprefix("torch."): products}))
        return out


def seconds(needs: dict[str, float]) -> tuple[float, float]:
    times = [
        amount / PEAKS["tf32" if kind == "float32" else kind] for kind, amount in needs.items() if amount
    ]
    return max(times, default=0.0), sum(times)


def of_op(call, part: float = 1.0) -> dict[str, float]:
    """What a call of one Triton kernel needs, from a call that is this part of it."""
    with operations() as found, fastgen.backend("triton"), torch.no_grad():
        call()
    return {kind: amount / part for kind, amount in found.items()}


def images(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)


def traced(function):
    """The launches of a function of nothing, of tensors that are said to be on a GPU."""
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), Launches() as launches:
        function()
    return launches.made


def model(kind: str, batch: int):
    """A whole generator's launches."""
    preset = presets.get("ffhq512")
    made = Teacher(**preset.teacher)
    made = made if kind == "teacher" else Student.from_teacher(made)
    compute_in(made, torch.bfloat16)
    state = {**dict(made.named_parameters()), **dict(made.named_buffers())}

    def run():
        fake = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in state.items()}
        with torch.nn.utils.stateless._reparametrize_module(made, fake):
            made(torch.empty(batch, made.z_dim), torch.empty(batch, 25))

    return traced(run)


def render(side: int, dtype=torch.bfloat16, backward=False):
    shapes = [(1, 3, 32, 256, 256), (64, 32), (64,), (33, 64), (33,)]
    tensors = [(torch.randn(s) / s[-1] ** (len(s) == 2)).to(dtype) for s in shapes]
    options = {"depth_resolution": 48, "depth_resolution_importance": 48, "box_warp": 1}
    options |= {"ray_start": 2.25, "ray_end": 3.3}
    rays = camera.rays(presets.get("ffhq512").camera.front(), side)
    part = side**2 / 128**2
    if not backward:
        return of_op(lambda: ops.render_triplane(tensors[0], tensors[1:], *rays, options), part)
    tensors = [x.requires_grad_() for x in tensors]
    with fastgen.backend("triton"):
        out = ops.render_triplane(tensors[0], tensors[1:], *rays, options).features.float().sum()
        with operations() as found:
            out.backward()
    return {kind: amount / part for kind, amount in found.items()}


def layer(channels: int, outputs: int, side: int, up: int):
    """A layer's launches, and what 75 % of PyTorch's bare convolution takes in ms."""

    def run():
        layout = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
        x = torch.empty(1, channels, side, side, **layout)
        ops.modulated_conv2d(
            x, torch.empty(outputs, channels, 3, 3), torch.empty(1, channels), up=up, padding=1,
            resample_filter=torch.empty(4, 4), bias=torch.empty(outputs), act="lrelu", clamp=256.0,
        )  # fmt: skip

    return traced(run), 2 * 9 * channels * outputs * side**2 / PEAKS["bfloat16"] / 0.75 * 1e3


def main():
    planes, pixels = 3 * 32 * 256 * 256 * 2, 128 * 512 * 512 * 2
    rows = []

    def row(what, launches, target, images=1):
        """Of launches one after the other, for each of so many images."""
        times = [seconds(needs) for _, needs in launches]
        low, high = (1e3 * sum(t[i] + LAUNCH for t in times) / images for i in (0, 1))
        total = collections.Counter()
        for _, needs in launches:
            total.update({kind: amount / images for kind, amount in needs.items()})
        rows.append((what, len(launches), total, low, high, target))

    f, b = torch.ones(4, 4), torch.zeros(128)
    needs = of_op(lambda: ops.bias_act(images(1, 128, 64, 64), b, act="lrelu", clamp=256), 1 / 64)
    target = f"{2 * pixels / PEAKS['bytes'] / 0.8 * 1e3:.3f}"
    row("bias_act 128x512x512", [("", needs | {"bytes": 2 * pixels})], target)
    needs = of_op(lambda: ops.upsample2d(images(1, 128, 32, 32), f), 1 / 64)
    target = f"{1.25 * pixels / PEAKS['bytes'] / 0.8 * 1e3:.3f}"
    row("upsample2d 128x256x256", [("", needs | {"bytes": 1.25 * pixels})], target)
    for size in ((128, 128, 512, 1), (256, 128, 256, 2)):
        launches, target = layer(*size)
        row("modulated_conv2d {}->{} from {}, up {}".format(*size), launches, f"{target:.3f}")
    forward = render(8)
    row("render_triplane 128x128, 48+48", [("", forward | {"bytes": planes})], "0.35")
    row("its backward", [("", render(8, backward=True) | {"bytes": 6 * planes})], "4 x forward")
    # A generator renders planes that are summed in float32.
    forward = render(8, torch.float32)
    for kind, targets in (("teacher", ("1.0", "0.6")), ("student", ("0.8", "0.5"))):
        for batch, target in zip((1, 32), targets, strict=True):
            launches = [
                (name, {k: v * batch for k, v in forward.items()} | {"bytes": needs["bytes"]})
                if name == "render_triplane"
                else (name, needs)
                for name, needs in model(kind, batch)
            ]
            row(f"{kind}, ffhq512, batch {batch}, an image", launches, target, batch)
    kinds = ["bytes", "loaded", "bfloat16", "tf32", "lanes", "special", "atomics"]
    print("# An H200, PREDICTED and not measured\n")
    peaks = ", ".join(f"{kind} {peak:.3g}" for kind, peak in PEAKS.items())
    print(f"bfloat16, but for a teacher's planes; 10^9 of each. A second's worth: {peaks};")
    print("how that is used is in [predict.py](../predict.py), which wrote this.\n")
    print("| | launches | " + " | ".join(kinds) + " | predicted ms | target ms |")
    print("| --- " + "| ---: " * (len(kinds) + 3) + "|")
    for what, count, needs, low, high, target in rows:
        amounts = " | ".join(f"{needs[kind] / 1e9:.3g}" for kind in kinds)
        print(f"| {what} | {count} | {amounts} | {low:.3f} to {high:.3f} | {target} |")


if __name__ == "__main__":
    main()
