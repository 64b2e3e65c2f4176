"""What ImageBind's IMU trunk sees of a signal: 2000 steps of acceleration and rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from bindllm.encoders.imagebind.stems import SIGNAL
from bindllm.media import Source
from bindllm.media.motion import open_imu


def imu_input(source: Source) -> Tensor:
    """Return the signal of a motion sensor (https://arxiv.org/abs/2305.05665, section 4).

    The whole signal, however long, is resampled to 2000 steps, about ten seconds at Ego4D's 200 readings a second;
    ImageBind was trained on pieces of a few seconds, so cut longer ones first. No loader and no scale were published:
    values are not standardised.

    Args:
        source: what `bindllm.media.motion.open_imu` takes.

    Returns:
        [6, 2000], float32: acceleration x y z, then rotation x y z.

    Raises:
        MediaError: the signal cannot be read.
    """
    return torch.from_numpy(open_imu(source, steps=SIGNAL[1]))
