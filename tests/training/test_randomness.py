import io
import random

import numpy as np
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from bindllm.training.state import random_state, restore_random_state


def draw():
    return (
        torch.rand(3).tolist(),
        np.random.rand(3).tolist(),
        np.random.randn(),
        random.random(),
        random.gauss(),
    )


def test_generators_go_on_where_they_were_after_a_file():
    strategy, file = SingleDeviceStrategy("cpu"), io.BytesIO()
    draw()  # each kind of normal number leaves a second one behind
    torch.save(random_state(strategy), file)
    first = draw()
    assert draw() != first
    file.seek(0)
    restore_random_state(torch.load(file, weights_only=True), strategy)
    assert draw() == first


def test_each_process_takes_its_own_row():
    strategy = SingleDeviceStrategy("cpu")
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(random_state(strategy))
    both = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    strategy.global_rank = 1
    restore_random_state(both, strategy)
    second = torch.rand(3)
    torch.manual_seed(2)
    assert torch.equal(torch.rand(3), second)
