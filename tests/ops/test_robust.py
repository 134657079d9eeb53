"""Threads, forked processes, and tensors of more than 2^31 elements."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fastgen
from fastgen import ops
from fastgen.ops.conv3x3 import conv3x3


def results(dtype=torch.float64):
    """Outputs and gradients of every op, large enough that threads share the work."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(dtype).requires_grad_()

    f = ops.setup_filter([1, 3, 3, 1])
    x, b, w, styles = normal(2, 8, 64, 48), normal(8), normal(8, 8, 3, 3), normal(2, 8)
    planes, decoder = normal(2, 3, 8, 16, 16), [normal(16, 8), normal(16), normal(5, 16), normal(5)]
    rays = normal(2, 300, 3).detach(), normal(2, 300, 3).detach()
    options = {"ray_start": 0.5, "ray_end": 2.0, "depth_resolution": 12}
    image, kernel = (normal(*s).detach().float().requires_grad_() for s in ((2, 40, 20, 18), (33, 40, 3, 3)))
    calls = {
        "conv3x3": (conv3x3(image, kernel), [image, kernel]),
        "upfirdn2d": (ops.upfirdn2d(x, f, 2, padding=[2, 1, 2, 1]), [x]),
        "bias_act": (ops.bias_act(x, b, act="swish"), [x, b]),
        "filtered_lrelu": (ops.filtered_lrelu(x, f, f, b, up=2, down=2, padding=3), [x, b]),
        "modulated_conv2d": (ops.modulated_conv2d(x, w, styles, padding=1), [x, w, styles]),
        "sample_triplane": (ops.sample_triplane(planes, rays[0]), [planes]),
        "render_triplane": (
            ops.render_triplane(planes, decoder, *rays, options).features,
            [planes, *decoder],
        ),
    }
    named = {}
    for name, (out, inputs) in calls.items():
        dy = torch.randn(out.shape, generator=random).to(out)
        named[name] = out.detach()
        for i, grad in enumerate(torch.autograd.grad(out, inputs, dy)):
            named[f"gradient {i} of {name}"] = grad
    return named


def assert_right(got):
    # In float64 what is left is the order of sums, far below the default tolerances.
    with fastgen.backend("reference"):
        want = results()
    for name, value in want.items():
        scale = value.abs().max().item()
        tolerance = 1e-9 if value.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance * scale)


@pytest.fixture
def threads():
    """Sets the number of threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_numbers_of_threads_agree(threads):
    found = []
    for count in (1, 2, 3):
        threads(count)
        assert_right(results())
        found.append(results(torch.float32))
    for name in ("upfirdn2d", "bias_act", "render_triplane", "conv3x3"):
        assert torch.equal(found[0][name], found[1][name]) and torch.equal(found[0][name], found[2][name])


def test_one_thread_by_the_environment(tmp_path):
    code = (
        "import sys, torch; sys.path[:0] = sys.argv[2:]\n"
        "from ops.test_robust import results\n"
        "assert torch.get_num_threads() == 1\n"
        "torch.save(results(), sys.argv[1])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "results.pt"), *sys.path]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=300)
    assert_right(torch.load(tmp_path / "results.pt"))


def test_fork_while_another_thread_computes():
    # In a process of its own: a child that waits for ever shall not keep the tests.
    code = (
        "import os, threading, torch, fastgen\n"
        "from fastgen import ops\n"
        "torch.set_num_threads(1)\n"
        "def call():\n"
        "    with torch.no_grad():\n"
        "        x, w = torch.ones(1, 32, 96, 96), torch.ones(32, 32, 3, 3)\n"
        "        ops.modulated_conv2d(x, w, torch.ones(1, 32), padding=1)\n"
        "call()  # a first call's initialisation, PyTorch's too, does not survive a fork in its middle\n"
        "stop = False\n"
        "def loop():\n"
        "    while not stop: call()\n"
        "threads = [threading.Thread(target=loop) for _ in range(3)]\n"
        "[t.start() for t in threads]\n"
        "for _ in range(40):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        call(); os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "stop = True\n"
        "[t.join() for t in threads]\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True, timeout=120)


class Results(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {name: value.detach() for name, value in results().items()}


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_workers(threads):
    threads(2)
    before = results()
    loader = DataLoader(
        Results(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120
    )
    for got in loader:
        assert got.keys() == before.keys()
        assert_right(got)
    # The parent's threads still work.
    assert_right(results())


# FASTGEN_BIG=1 asks for what needs 14 GB of memory and a minute or two.
if os.environ.get("FASTGEN_BIG") == "1":

    @pytest.fixture(params=["contiguous", "channels_last"])
    def big(request):
        """[1, 2, H, W], more than 2^31 elements; not zero at its ends and around element 2^31."""
        free = 1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])
        assert free > 14e9, f"needs 14 GB of free memory, there are {free / 1e9:.1f}"
        h = w = 32770
        last = request.param == "channels_last"
        memory = torch.zeros((1, h, w, 2) if last else (1, 2, h, w), dtype=torch.bfloat16)
        flat = memory.view(-1)
        for at in (0, 2**31 - 2**17, flat.numel() - 2**18):
            flat[at : at + 2**18] = torch.randn(2**18)
        return memory.permute(0, 3, 1, 2) if last else memory

    def ends(x, rows=4):
        """The first and last rows, and those around element 2^31, of every channel."""
        middle = x.shape[2] - 7
        return [x[:, :, :rows], x[:, :, middle : middle + rows], x[:, :, -rows:]]

    def test_bias_act_beyond_32_bits(big):
        b = torch.tensor([0.5, -0.25]).bfloat16()
        out = ops.bias_act(big, b, act="lrelu", clamp=1.0)
        assert out.shape == big.shape and out.stride() == big.stride()
        for got, x in zip(ends(out), ends(big), strict=True):
            assert torch.equal(got, ops.bias_act(x, b, act="lrelu", clamp=1.0))

    def test_upfirdn2d_beyond_32_bits(big):
        f = torch.tensor([1.0, 3.0, 1.0])
        out = ops.upfirdn2d(big, f, padding=1)
        assert out.shape == big.shape and out.stride() == big.stride()
        # Rows at a window's edge see zeros there, those inside see the same as in the whole.
        for got, x in zip(ends(out), ends(big), strict=True):
            assert torch.equal(got[:, :, 1:-1], ops.upfirdn2d(x, f, padding=1)[:, :, 1:-1])
            assert got[:, :, 1:-1].any()
        last = ops.upfirdn2d(big[:, :, -2:], f, padding=1)[:, :, -1]
        assert torch.equal(out[:, :, -1], last) and last.any()
