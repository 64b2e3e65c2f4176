"""Synthetic media for testing encoders: arrays and texts."""

from __future__ import annotations

from typing import Any

import numpy as np

from bindllm.media import Media


def synthetic_media(modality: str) -> list[Media]:
    """Return different media of one modality, as arrays or texts of several sizes; none if the modality is unknown.

    Examples:
        >>> [media.name for media in synthetic_media("depth")]
        ['<array [48, 64] float32>', '<array [90, 60] float32>']
    """
    # A fixed seed, so that every run tests the same media.
    random = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return random.random(shape, dtype=np.float32)

    def gray(*shape: int) -> np.ndarray:
        return random.integers(0, 256, shape, dtype=np.uint8)

    def tone(pitch: float, seconds: float) -> np.ndarray:
        return np.sin(2 * np.pi * pitch * np.arange(round(16_000 * seconds)) / 16_000).astype(np.float32)

    plain = [np.full((100, 100, 3), color, np.uint8) for color in ((200, 30, 30), (30, 30, 200))]
    made: dict[str, list[Any]] = {
        # Several sizes and proportions, because encoders must accept all of them.
        "image": [gray(224, 224, 3), gray(180, 320, 3), gray(64, 48, 3), *plain],
        "video": [gray(1, 48, 64, 3), gray(40, 60, 48, 3)],
        "audio": [tone(220, 0.3), tone(880, 3.0), np.stack([noise(48_000) - 0.5, tone(440, 3.0)])],
        "text": ["a dog", "two cats on a mat, asleep in the sun", "word " * 200],
        "point": [noise(300, 3), noise(5000, 3) * np.float32([1, 4, 0.1])],
        "depth": [1 + 3 * noise(48, 64), 0.5 + 8 * noise(90, 60)],
        "thermal": [noise(48, 64), noise(90, 60) ** 2],
        "imu": [noise(400, 6) - 0.5, 3 * noise(5000, 6)],
    }
    return [Media(modality, source) for source in made.get(modality, [])]
