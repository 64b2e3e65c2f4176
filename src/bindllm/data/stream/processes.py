"""The processes of a training run, as its trainer knows them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from bindllm.parallel.ranks import Ranks

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def processes_of(trainer: Trainer | None) -> Ranks:
    """Return which process of a run this is; without a trainer, the only one."""
    if trainer is None or trainer.world_size == 1:
        return Ranks()
    threads = max(1, (os.cpu_count() or 1) // trainer.num_devices)
    return Ranks(trainer.global_rank, trainer.world_size, gather=_gather, threads=threads)


def _gather(value: Any) -> list[Any]:
    """Return the values of all processes; waits for all of them."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
