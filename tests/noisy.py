"""An objective for tests of what random numbers do to a run."""

from __future__ import annotations

import random

import numpy as np
import torch

from bindllm.objectives import NextToken


class Noisy(NextToken):
    """A loss that hangs on random numbers of all kinds."""

    def loss(self, model, batch):
        loss, metrics = super().loss(model, batch)
        return loss * (0.5 + (torch.rand(()) + np.random.rand() + random.random()) / 3), metrics
