import io
import random

import numpy as np
import torch

from bindllm.parallel import Processes
from bindllm.training.state import generator_states, restore_generators

CPU = torch.device("cpu")


def draw():
    return (
        torch.rand(3).tolist(),
        np.random.rand(3).tolist(),
        np.random.randn(),
        random.random(),
        random.gauss(),
    )


def test_generators_go_on_where_they_were_after_a_file():
    file = io.BytesIO()
    draw()  # each kind of normal number leaves a second one behind
    torch.save(generator_states(Processes(), CPU), file)
    first = draw()
    assert draw() != first
    file.seek(0)
    restore_generators(torch.load(file, weights_only=True), Processes(), CPU)
    assert draw() == first


def test_each_process_takes_its_own_state():
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states += generator_states(Processes(), CPU)
    restore_generators(states, Processes(1, 2), CPU)
    second = torch.rand(3)
    torch.manual_seed(2)
    assert torch.equal(torch.rand(3), second)
