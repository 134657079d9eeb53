"""All that a machine with a GPU can say, in ten minutes: `make gpu`, or `make gpu STEP=bench` for one step.

build       the CUDA library for this card, where nvcc is
test-cuda   the tests marked gpu on CUDA C++, and on what serves where that has nothing
test-triton the same with Triton's kernels before all others, and whole generators on them
memcheck, racecheck, initcheck
            compute-sanitizer's tools over a few of the tests on CUDA C++, where it is installed
bench       the benchmarks of the ops, each behind its correctness gate, but for torch.compile
compile     those of torch.compile, which take longest to start
images      `fastgen bench` of ffhq512, batch 1, 8 and 32
curves      how costs grow with resolution, rays, samples and batch
train       a training step of ffhq512, batch 32, random weights: images/s, memory, the teacher's share
report, report-images
            results/<card>.csv, images-<card>.csv, tables and plots of what the folder holds

Each step has its own time and its own log in the folder; what a step does not finish is stopped, and the next
one goes on. Nothing is installed and nothing fetched: the checkout runs as it is.
"""

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Values and gradients of the ops of the CUDA library, where the test's name has no other backend.
SANITIZED = [
    *(f"tests/ops/test_{op}.py" for op in ("upfirdn2d", "bias_act", "filtered_lrelu", "filtered_bias_act")),
    "tests/ops/test_sample_triplane.py",
    *("-k", "(test_forward or test_gradients) and float32 and not triton"),
]


@dataclass
class Step:
    name: str
    seconds: int
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    skip: str = ""


def steps(out: Path, dry_run: bool) -> list[Step]:
    """What there is to do. A dry run does as much of it as Triton's interpreter can, in small."""
    python = [sys.executable]
    parallel = ["-n", str(os.cpu_count())] if importlib.util.find_spec("xdist") and not dry_run else []
    test = [*python, "-m", "pytest", *parallel, "-p", "no:cacheprovider"]
    tests = ["tests/ops/test_bias_act.py"] if dry_run else ["tests/ops", "tests/models", "tests/train", "-m"]
    cuda, both = ([], []) if dry_run else (["gpu"], ["gpu or triton"])
    tools = f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin:{os.environ['PATH']}"
    sanitizer, nvcc = shutil.which("compute-sanitizer", path=tools), shutil.which("nvcc", path=tools)
    bench = [*python, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider"]
    few = "and (test_op and bias_act_swish or test_render and forward)" if dry_run else ""
    bench += ["--rehearse"] if dry_run else []
    return [
        Step(
            "build",
            80,
            [*python, "setup.py", "build_ext", "--inplace"],
            {"FASTGEN_CUDA": "1", "MAX_JOBS": str(os.cpu_count()), "TORCH_CUDA_ARCH_LIST": _capability()},
            "a dry run builds nothing" if dry_run else "" if nvcc else "no nvcc here",
        ),
        Step(
            "test-cuda",
            70,
            [*test, *tests, *cuda, "-k", "cpu" if dry_run else "not triton", f"--junitxml={out}/cuda.xml"],
        ),
        Step("test-triton", 80, [*test, *tests, *both, "-k", "triton", f"--junitxml={out}/triton.xml"]),
        *(
            Step(
                tool,
                40,
                [str(sanitizer), "--tool", tool, "--error-exitcode", "1",
                 *python, "-m", "pytest", "-m", "gpu", *SANITIZED],
                # Every tensor in memory of its own, so that what is beyond it is seen.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                "a dry run has no device" if dry_run else "" if sanitizer else "no compute-sanitizer here",
            )
            for tool in ("memcheck", "racecheck", "initcheck")
        ),
        Step(
            "bench", 65,
            [*bench, "-k", f"not image and not compile {few}", f"--benchmark-json={out}/bench.json"],
        ),
        Step(
            "compile", 35,
            [*bench, "-k", "not image and compile", f"--benchmark-json={out}/compile.json"], {},
            "a dry run compiles nothing" if dry_run else "",
        ),
        Step(
            "images", 75,
            [*python, "-m", "fastgen", "bench", "--json", f"{out}/images.json", "--rounds", "3",
             *(["--preset", "toy", "--only", "student-tiny"] if dry_run else ["--batch", "1", "8", "32"])],
        ),
        Step(
            "curves", 30, [*python, "benchmarks/curves.py", "--out", f"{out}/results"], {},
            "a dry run measures nothing" if dry_run else "",
        ),
        Step("train", 25, [*python, "benchmarks/train_step.py", *(["--preset", "toy"] if dry_run else [])]),
        Step(
            "report", 10,
            [*python, "benchmarks/report.py", *(f"{out}/{name}.json" for name in ("bench", "compile")),
             "--out", f"{out}/results"],
        ),
        Step(
            "report-images", 10,
            [*python, "benchmarks/images.py", f"{out}/images.json", "--out", f"{out}/results"],
        ),
    ]  # fmt: skip


def _capability() -> str:
    import torch

    return "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""


def run(step: Step, out: Path, environment: dict[str, str]) -> str:
    """Do a step; a line that says how it went, with the last line that it wrote."""
    if step.skip:
        return f"{step.name}: left out: {step.skip}"
    log, start = out / f"{step.name}.log", time.monotonic()
    with log.open("w") as file:
        # A session of its own, so that all of a step stops with it.
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment | step.environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(step.seconds)
            how = "done" if code == 0 else f"FAILED with status {code}"
        except subprocess.TimeoutExpired:
            # Pytest writes what it has on an interrupt.
            os.killpg(process.pid, signal.SIGINT)
            how = f"STOPPED after {step.seconds} s"
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if re.search(r"passed|failed|error", line)), "")
    return f"{step.name}: {how} in {time.monotonic() - start:.0f} s; {said or ''.join(lines[-1:])}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in steps(Path(), False)]
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="where everything goes")
    parser.add_argument("--step", choices=names, action="append", help="only this one; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, interpreted, in small")
    args = parser.parse_args()

    import torch

    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; --dry-run rehearses without one")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if args.dry_run:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    where = "dry run" if args.dry_run else torch.cuda.get_device_name()
    said = [f"{where}; torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}"]
    print(said[0], flush=True)
    for step in steps(out, args.dry_run):
        if not args.step or step.name in args.step:
            said.append(run(step, out, environment))
            print(said[-1], flush=True)
    with (out / "summary.txt").open("a") as file:
        file.write("\n".join(said) + "\n")
    return 1 if any("FAILED" in line or "STOPPED" in line for line in said) else 0


if __name__ == "__main__":
    sys.exit(main())
