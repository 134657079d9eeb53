"""What a run would do, before it does, and how it is going: `fastgen train --dry-run` and `--watch DIR`."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from torch import nn

from .config import UNWATCHED, TrainConfig
from .data import TargetStream
from .loop import distil
from .metrics import milliseconds


def dry_run(config: TrainConfig, teacher: nn.Module | None = None) -> str:
    """The resolved configuration, what the networks hold, and what a step of each stage takes here.

    Does three steps of each stage with whole feature maps and the final image's terms, in a folder of its
    own; the first and the last are timed. `teacher` as for `distil`. Of several processes the first has
    something to say, and the others ''.
    """
    stages = {
        "stage 1": config.stage1_steps > sum(p[1] for p in config.growth),
        "stage 2": config.stage2_steps > 0,
    }
    steps = {name: 3 * there for name, there in stages.items()}
    with tempfile.TemporaryDirectory() as folder:
        short = dataclasses.replace(
            config,
            out=folder,
            growth=(),
            stage1_steps=steps["stage 1"],
            stage2_steps=steps["stage 2"],
            hr_interval=1,
            log_every=1,
            resume=False,
            **UNWATCHED,
        )
        run = distil(short, teacher, progress=False)
        if not run.is_first:
            return ""
        lines = [json.loads(line) for line in (Path(folder) / "stats.jsonl").read_text().splitlines()]
    parts = {"student": run.student, "teacher": run.teacher, "discriminator": run.discriminator}
    counts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None
    }
    text = [json.dumps(dataclasses.asdict(config), indent=2), ""]
    text += [f"{name}: {count:,} parameters" for name, count in counts.items()]
    # The average is frozen, all of it.
    named = run.student.named_parameters()
    trained = sum(p.numel() for name, p in named if not name.startswith("teacher_mapping"))
    judging = counts.get("discriminator", 0)
    # Of each a weight, its gradient and Adam's two numbers, all but the gradient twice for the copy of a good
    # state; the student's average twice, too.
    memory = 4 * (9 * trained + 7 * judging)
    text.append(
        f"trained: {trained:,} of the student's, {judging:,} of the discriminator's; with gradients, Adam, "
        f"average and the copy of a good state {memory >> 20} MiB"
    )
    done = 0
    for name, count in steps.items():
        if count:
            first, *_, seconds = (line["seconds_per_step"] for line in lines[done : done + count])
            every = config.batch_size / seconds
            text.append(
                f"{name}: {first:.2f} s the first step, then {seconds:.2f} s a step of {config.batch_size} "
                f"images, {every:.1f} images/s"
            )
        done += count
    device = next(run.student.parameters()).device
    # A stock of targets makes some of a step's; without one, a step waits for all.
    fresh = dataclasses.replace(short, replay=0, replay_reuse=1.0, lambda_consistency=0.0)
    stream = TargetStream(run.teacher, run.poses, fresh, device, run.world)
    seconds = milliseconds(lambda: stream.batch(0), repeats=1, warmup=1) / 1e3 / config.replay_reuse
    text.append(f"of each step, the teacher's targets: {seconds:.2f} s")
    text.append(f"most memory in these steps: {_peak() >> 20} MiB")
    return "\n".join(text)


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes << (0 if sys.platform == "darwin" else 10)


def summary(out: Path) -> Group:
    """One screen of a run's folder.

    Raises: FileNotFoundError where there is no run.
    """
    config, lines = _read(out)
    logged = [line for line in lines if "loss" in line]  # the others are of grids
    if not logged:
        return Group(Text(f"{out}: no step logged yet, of {config.steps}"))
    last = lines[-1]
    step = last["step"]
    recent, first = logged[-50:], logged[:50]
    seconds = median(line["seconds_per_step"] for line in recent)
    left = (config.steps - step) * seconds
    stage = "reconstruction + adversarial" if recent[-1]["adversarial_weight"] else "reconstruction"
    phase = config.phase(step - 1)
    head = (
        f"{out}: step {step} of {config.steps} ({100 * step / config.steps:.0f} %), {stage}; "
        f"{phase.batch_size / seconds:.1f} images/s, {_duration(left)} left"
    )
    table = Table("", "now", "mean of the last 50", "mean of the first 50", box=None)
    # "seconds_per_step" and such are in the line above.
    for name in recent[-1]:
        if name in ("step", "images", "adversarial_weight", "learning_rate", "seconds_per_step"):
            continue
        means = [[line[name] for line in part if name in line] for part in (recent, first)]
        shown = [f"{sum(part) / len(part):.4g}" if part else "" for part in means]
        table.add_row(name.replace("_", " "), f"{recent[-1][name]:.4g}", *shown)
    held = [line for line in lines if "heldout_psnr_db" in line]
    tail = [f"held out: {held[-1]['heldout_psnr_db']:.2f} dB at step {held[-1]['step']}"] if held else []
    if (kept := out / "resume.pt").exists():
        tail.append(f"checkpoint: {_duration(time.time() - kept.stat().st_mtime)} old")
    return Group(Text(head), table, Text("; ".join(tail)))


def watch(out: Path) -> None:
    """Show the summary; on a terminal anew every two seconds, until the run is done or Ctrl-C."""
    console = Console()
    if not console.is_terminal:
        return console.print(summary(out))
    with Live(summary(out), console=console, auto_refresh=False) as live:
        while not _is_done(out):
            time.sleep(2)
            live.update(summary(out), refresh=True)
    return None


def _read(out: Path) -> tuple[TrainConfig, list[dict]]:
    if not (out / "config.json").is_file():
        raise FileNotFoundError(f"watch: {out} holds no run")
    text = (out / "stats.jsonl").read_text() if (out / "stats.jsonl").is_file() else ""
    # The last line may be half written.
    return TrainConfig.load(out / "config.json"), [
        json.loads(x) for x in text.splitlines(True) if x[-1] == "\n"
    ]


def _is_done(out: Path) -> bool:
    config, lines = _read(out)
    return bool(lines) and lines[-1]["step"] >= config.steps


def _duration(seconds: float) -> str:
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {int(seconds) % 60:02} s"
