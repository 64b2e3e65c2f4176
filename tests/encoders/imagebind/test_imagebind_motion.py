"""ImageBind's motion signals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bindllm.encoders.imagebind.inputs import imu_input
from bindllm.errors import MediaError


def test_two_thousand_steps_of_six_signals():
    seconds = np.linspace(0, 10, 501)
    signal = np.stack([np.sin(seconds * (axis + 1)) for axis in range(6)])
    prepared = imu_input(signal)
    assert (prepared.shape, prepared.dtype) == ((6, 2000), torch.float32)
    expected = [np.sin(np.linspace(0, 10, 2000) * (axis + 1)) for axis in range(6)]
    np.testing.assert_allclose(prepared.numpy(), expected, atol=2e-3)


def test_two_thousand_readings_stay_as_they_are():
    signal = np.random.default_rng(0).normal(size=(6, 2000)).astype(np.float32)
    np.testing.assert_array_equal(imu_input(signal).numpy(), signal)


def test_a_bad_file_is_a_media_error():
    with pytest.raises(MediaError, match="the columns are"):
        imu_input(b"what,is,this\n1,2,3\n")
