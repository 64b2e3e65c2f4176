"""The state of all random numbers of a run: of torch, numpy and Python, in every process."""

from __future__ import annotations

import random

import numpy as np
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, distributed

RandomState = dict[str, Tensor]
"""By generator, one row for each process."""


def random_state(strategy: Strategy) -> RandomState:
    """Return the state of the generators of all processes; all of them must call this.

    Args:
        strategy: connects the processes.
    """
    own = _own(strategy.root_device)
    if not distributed.is_initialized():
        return {name: value.unsqueeze(0) for name, value in own.items()}
    gathered = {}
    for name, value in own.items():
        sent = value.to(strategy.root_device)
        rows = [torch.empty_like(sent) for _ in range(distributed.get_world_size())]
        distributed.all_gather(rows, sent)
        gathered[name] = torch.stack(rows).cpu()
    return gathered


def restore_random_state(state: RandomState, strategy: Strategy) -> None:
    """Set the generators of this process to what they were.

    Args:
        state: as `random_state` returned it, of as many processes.
        strategy: connects the processes.
    """
    # A copy: torch reads a generator's state from the start of the storage.
    own = {name: rows[strategy.global_rank].clone() for name, rows in state.items()}
    torch.set_rng_state(own["torch"])
    *words, position, has_normal, normal = own["numpy"].view(torch.float64).tolist()
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), int(position), int(has_normal), normal))
    *words, has_normal, normal = own["python"].view(torch.float64).tolist()
    random.setstate((3, tuple(int(word) for word in words), normal if has_normal else None))
    if strategy.root_device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], strategy.root_device)


def _own(device: torch.device) -> RandomState:
    """The generators of this process, as bytes: a float64 holds a 32-bit word exactly."""
    _, words, position, has_normal, normal = np.random.get_state(legacy=True)
    numpy_state = [*words.tolist(), position, has_normal, normal]
    _, words, normal = random.getstate()
    python_state = [*words, normal is not None, normal or 0.0]
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(numpy_state, dtype=torch.float64).view(torch.uint8),
        "python": torch.tensor(python_state, dtype=torch.float64).view(torch.uint8),
    }
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state
