"""What a training step takes of a teacher with random weights: `python benchmarks/train_step.py`."""

import argparse
import dataclasses

import torch

from fastgen import presets
from fastgen.models.teacher import Teacher
from fastgen.train.config import PRESETS
from fastgen.train.watch import dry_run


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="ffhq512")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    torch.manual_seed(0)
    teacher = Teacher(**presets.get(args.preset).teacher).eval().requires_grad_(False)
    config = dataclasses.replace(
        PRESETS[args.preset],
        camera=args.preset,
        batch_size=args.batch,
        precision=args.precision,
        perceptual="none",
        replay=0,
        replay_reuse=1.0,
        stage2_steps=0,
    )
    print(dry_run(config, teacher))


if __name__ == "__main__":
    main()
