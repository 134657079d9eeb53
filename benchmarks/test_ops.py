"""upfirdn2d and bias_act at the shapes of EG3D's largest layers, filtered_lrelu at one of StyleGAN3's, beside
plain PyTorch and its compilation.

Every case first compares its result with the reference in float64; a wrong result is not timed. A row says
how many bytes the op has to move at least (each input and output once) and how many FLOP it takes.
"""

import os
from dataclasses import dataclass

import pytest
import torch

import fastgen
from fastgen import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# On two cores a third of the channels says the same in a third of the time.
CHANNELS = 128 if DEVICE == "cuda" or os.environ.get("FASTGEN_BENCH_FULL") else 32


@dataclass(frozen=True)
class Case:
    name: str
    size: int
    run: object  # (x, f, b) -> result
    flop: float  # for each element of the result
    f: torch.Tensor = ops.setup_filter([1, 3, 3, 1])


def low_pass(taps: int) -> torch.Tensor:
    """Half the band, by a Kaiser window."""
    window = torch.kaiser_window(taps, periodic=False, beta=6.0)
    return ops.setup_filter(window * torch.sinc((torch.arange(taps) - (taps - 1) / 2) / 2))


def filtered_lrelu(x, f, b):
    """At twice the size, which comes out as it went in."""
    return ops.filtered_lrelu(x, f, f, b, up=2, down=2, padding=[11, 10, 11, 10], clamp=256)


CASES = [
    Case("upsample2d", 256, lambda x, f, b: ops.upsample2d(x, f), 8),
    Case("downsample2d", 512, lambda x, f, b: ops.downsample2d(x, f), 32),
    Case("filter2d", 512, lambda x, f, b: ops.filter2d(x, f), 32),
    Case("bias_act_lrelu_clamp", 512, lambda x, f, b: ops.bias_act(x, b, act="lrelu", clamp=256), 5),
    Case("bias_act_swish", 512, lambda x, f, b: ops.bias_act(x, b, act="swish"), 12),
    # 12 + 24 products up, 24 + 12 down, and 4 activations.
    Case("filtered_lrelu", 128, filtered_lrelu, 164, low_pass(12)),
]


def plain(case: Case):
    def run(*args):
        with fastgen.backend("reference"):
            return case.run(*args)

    return run


def compiled(case: Case):
    torch.compiler.reset()  # nothing that an earlier case compiled, no more general shapes because of it
    function = torch.compile(case.run, fullgraph=True, dynamic=False)

    def run(*args):
        with fastgen.backend("reference"):
            return function(*args)

    return run


ROUTES = {"fastgen": lambda case: case.run, "pytorch": plain, "torch.compile": compiled}


@pytest.fixture(scope="module", autouse=True)
def keep_memory():
    fastgen.keep_memory()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_op(benchmark, case, dtype, layout, route):
    torch.manual_seed(0)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(1, CHANNELS, case.size, case.size, dtype=DTYPES[dtype], device=DEVICE)
    x = x.contiguous(memory_format=memory_format)
    b = torch.randn(CHANNELS, dtype=DTYPES[dtype], device=DEVICE)
    f = case.f.to(DEVICE)
    run = ROUTES[route](case)

    small = x[:, :8, :64, :64].contiguous(memory_format=memory_format)
    got = run(small, f, b[:8])
    exact = plain(case)(small.double(), f.double(), b[:8].double())
    eps = torch.finfo(DTYPES[dtype]).eps
    assert (got.double() - exact).abs().max() <= 4 * eps * exact.abs().max(), "wrong result, not timed"

    def timed():
        run(x, f, b)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    result = run(x, f, b)
    benchmark.extra_info.update(
        op=case.name,
        shape="x".join(map(str, x.shape)),
        dtype=dtype,
        layout=layout,
        route=route,
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        bytes=x.nbytes + result.nbytes,
        flop=case.flop * result.numel(),
    )
    benchmark.pedantic(timed, rounds=20 if DEVICE == "cuda" else 7, warmup_rounds=2)
