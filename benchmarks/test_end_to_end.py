"""Whole images, the cases of `fastgen bench`, and a whole training step, at full size with random weights.

The plain route of a step is plain in the teacher, the student and their gradients; its images are contiguous,
as in the original code. The other routes have them channels_last on a CPU.
"""

import math

import conftest
import pytest
import torch
from conftest import DEVICE
from torch.utils.flop_counter import FlopCounterMode

from fastgen.models.layers import SynthesisBlock
from fastgen.models.student import Student
from fastgen.train.data import render_targets
from fastgen.train.losses import reconstruction_terms

bench = pytest.importorskip("fastgen.bench")  # an older commit may have none
ROUTES = (*conftest.ROUTES, "pytorch, channels_last")
CASES = bench.cases((1,), torch.device(DEVICE))


@pytest.fixture(scope="module")
def generators():
    return bench.Generators("ffhq512", torch.device(DEVICE), 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.case}-{case.route}-{case.dtype}")
@torch.no_grad()
def test_image(measure, generators, case):
    exact, gmac = generators.exact(case.case)
    call = generators.call(case)
    images = call()
    bench.require_right(case, images, exact)
    measure(
        call,
        3,
        op=f"image_{case.case}",
        shape="x".join(map(str, images.shape)),
        dtype=case.dtype,
        route=case.route,
        bytes=generators.bytes(case.case, case.dtype) + images.nbytes,
        flop=round(2e9 * gmac),
    )


def on_route(route: str, function):
    run = conftest.on_route(route.split(",")[0], function)

    def laid_out():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SynthesisBlock, "channels_last", route != "pytorch")
            return run()

    return laid_out


@pytest.mark.parametrize("route", ROUTES)
def test_training_step(measure, route):
    """Stage 1 of the shapenetcars128 preset, batch 2: targets, student, losses, gradients, Adam."""
    generators = bench.Generators("shapenetcars128", torch.device(DEVICE), 2)
    teacher, c = generators.model("teacher", bench.MIXED), generators.c
    student = Student.from_teacher(teacher).to(DEVICE)
    optimiser = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ws = teacher.mapping(generators.z, c)

    def losses():
        with torch.no_grad():
            target = render_targets(teacher, ws, c)
        fake = student.render(ws, c)
        fake["image"] = student.super_resolve(fake["feature_image"], ws)
        return sum(reconstruction_terms(fake, target, None).values())

    def step(run):
        optimiser.zero_grad(set_to_none=True)
        loss = run()
        loss.backward()
        optimiser.step()
        return loss

    with FlopCounterMode(display=False) as counter:
        on_route("pytorch", lambda: step(losses))()
    forward = on_route(route, losses)
    # Gradients, too, run on the route; only what they are of is compiled.
    whole = on_route(route, lambda: step(losses)) if "compile" not in route else lambda: step(forward)
    assert math.isfinite(whole())
    parameters = sum(p.numel() for p in [*teacher.parameters(), *student.parameters()])
    measure(
        whole,
        3,
        op="training_step",
        shape="shapenetcars128, batch 2",
        dtype="float32",
        route=route,
        bytes=parameters * 4,
        flop=counter.get_total_flops(),
    )
