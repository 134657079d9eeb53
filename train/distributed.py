"""Several processes that train one student, a GPU each: started by torchrun, or by SLURM's srun.

Each has the whole networks and computes its share of every batch, rows r, r + size, ...; gradients and logs
are means over all. So a step is that of one process with the same batch, within rounding, and a run may go on
with another number of them. Shares are strided because the discriminator's groups are (samples of one
remainder), and stay together so; shares too small for its groups, of four as a rule, are refused. Gradients
are averaged in one go after the backward pass, not by DistributedDataParallel: that waits for parameters
which a phase of growth has no use for.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


class LostProcess(ConnectionError):
    """Another process of the run has ended, or does not answer."""


@dataclass(frozen=True)
class World:
    """The processes of a run; all but `rows` and `share` are collective: every process calls them."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """The one that writes."""
        return self.rank == 0

    @property
    def rows(self) -> slice:
        """This process's share of a batch."""
        return slice(self.rank, None, self.size)

    def share(self, x: Tensor) -> Tensor:
        return x[self.rows]

    def gather(self, x: Tensor) -> Tensor:
        """Everyone's rows, of which x is this process's share."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with self._watched():
            dist.all_gather(parts, x.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """In place, the means over all processes; of one dtype."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([x.reshape(-1) for x in tensors])
        with self._watched():
            dist.all_reduce(flat)
        for x, mean in zip(tensors, (flat / self.size).split([x.numel() for x in tensors]), strict=True):
            x.copy_(mean.view_as(x))

    def agree(self, wishes: Sequence[bool], device: torch.device) -> list[bool]:
        """Of each wish, whether any process has it."""
        if self.size == 1:
            return list(wishes)
        found = torch.tensor([float(wish) for wish in wishes], device=device)
        self.average([found])
        return [share > 0 for share in found.tolist()]

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            raise LostProcess(f"rank {self.rank} of {self.size} has lost the others: {reason}") from error


@contextlib.contextmanager
def start(device: torch.device, timeout: float) -> Iterator[tuple[World, torch.device]]:
    """The processes that the environment names, and this one's device, for as long as the run lasts.

    Of RANK and WORLD_SIZE (torchrun), or SLURM_PROCID and SLURM_NTASKS, with MASTER_ADDR and MASTER_PORT.
    timeout: seconds after which a process that does not answer counts as lost.
    """
    rank, size, local = _from_environment()
    if size == 1:
        yield World(), device
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LostProcess(f"rank {rank} of {size} could not meet the others: {reason}") from error
    try:
        yield World(rank, size), device
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _from_environment() -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine.

    Raises: ValueError where SLURM has started several and nothing says where they meet.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "WORLD_SIZE" not in os.environ:
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))  # of this srun; a shell's NTASKS are to come
        if "MASTER_ADDR" in os.environ and "SLURM_NTASKS" in os.environ:
            names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        elif tasks > 1:
            raise ValueError(
                f"SLURM has started {tasks} tasks, but MASTER_ADDR is not set: for one run of all set it to "
                "the first one's host, and MASTER_PORT; for a run each, WORLD_SIZE=1"
            )
    return tuple(int(os.environ.get(name, default)) for name, default in zip(names, (0, 1, 0), strict=True))
