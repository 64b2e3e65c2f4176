"""The small network for sounds: what it hears, what it does not mind, and what it does to a sound in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bindllm.encoders.audio_tower import BANDS, MAX_SECONDS, AudioTower
from bindllm.encoders.imagebind.clips import RATE, mel_weights
from bindllm.errors import InputError, MediaError
from bindllm.media import Media


def tone(hertz: float, seconds: float, *, level: float = 0.5) -> np.ndarray:
    times = np.arange(round(seconds * RATE)) / RATE
    return (level * np.sin(2 * np.pi * hertz * times)).astype(np.float32)


def synthetic(seconds: float, seed: int = 0) -> torch.Tensor:
    noise = np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE))
    return tower().prepare(Media.audio(noise.astype(np.float32)))


def tower(**settings) -> AudioTower:
    torch.manual_seed(0)
    return AudioTower(**{"width": 4, "seconds": 1.0, **settings}).eval()


def test_a_tone_is_loudest_in_its_own_band():
    for hertz in (200, 1000, 4000):
        energies = tower().prepare(Media.audio(tone(hertz, 2.0)))
        frequency = np.arange(513) * RATE / 1024
        center = frequency[mel_weights(50.0, 8000.0, BANDS, 1024)[:, int(energies[10].argmax())].argmax()]
        assert center == pytest.approx(hertz, rel=0.06)


def test_loudness_does_not_count():
    loud = tower().prepare(Media.audio(tone(440, 1.5)))
    quiet = tower().prepare(Media.audio(tone(440, 1.5, level=0.005)))
    torch.testing.assert_close(loud, quiet, atol=1e-3, rtol=0)


def test_silence_and_a_click_are_sounds_too():
    silence = tower().prepare(Media.audio(np.zeros(10, np.float32)))
    assert silence.shape == (50, BANDS)
    assert silence.unique().tolist() == [pytest.approx(np.log(1e-5))]
    click = tower().prepare(Media.audio(np.eye(1, 400, 200, dtype=np.float32)[0]))
    assert click.shape == (50, BANDS)
    assert click.isfinite().all()
    assert click.max() > -5


def test_a_long_sound_is_heard_at_three_places():
    third = MAX_SECONDS / 3
    parts = [tone(300, 20), tone(1000, 20), tone(3000, 20)]
    energies = tower().prepare(Media.audio(np.concatenate(parts)))
    assert len(energies) == pytest.approx(MAX_SECONDS * 50, abs=2)
    heard = [int(energies[round((n + 0.5) * third * 50)].argmax()) for n in range(3)]
    alone = [int(tower().prepare(Media.audio(part))[10].argmax()) for part in parts]
    assert heard == alone


def test_a_row_depends_on_its_own_sound_alone():
    network, sounds = (
        tower(),
        [synthetic(seconds, seed) for seed, seconds in enumerate((0.3, 1.0, 2.7, 5.0, 1.4))],
    )
    together = network(sounds)
    assert together.shape == (5, 32)
    for row, sound in zip(together, sounds, strict=True):
        torch.testing.assert_close(network([sound])[0], row, atol=1e-5, rtol=1e-4)
    assert torch.pdist(together).min() > 1e-4


def test_windows_cover_the_sound():
    sound = torch.arange(117.0)[:, None].expand(-1, BANDS)
    windows = tower()._windows(sound)
    assert windows.shape == (3, 50, BANDS)
    assert set(windows[:, :, 0].flatten().tolist()) == set(range(117))
    assert torch.equal(tower()._windows(sound[:50]), sound[None, :50])


def test_augmentation_is_that_of_its_generator_and_leaves_the_sound_alone():
    network, sound = tower(), synthetic(2.0)
    before = sound.clone()
    first, again = (network.augment(sound, torch.Generator().manual_seed(5)) for _ in range(2))
    other = network.augment(sound, torch.Generator().manual_seed(6))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.1
    assert torch.equal(sound, before)


def test_augmentation_gives_one_window_of_any_sound():
    network = tower()
    for seed in range(40):
        sound = synthetic(0.2 + seed / 8, seed)
        window = network.augment(sound, torch.Generator().manual_seed(seed))
        assert window.shape == (50, BANDS)
        assert window.isfinite().all()


def test_both_sounds_are_in_a_mix():
    network = tower()
    low, high = (network.prepare(Media.audio(tone(hertz, 1.0))) for hertz in (300, 3000))
    mixed = network.mix(low, high, torch.Generator().manual_seed(0))
    for sound in (low, high):
        assert mixed[10, int(sound[10].argmax())] > -3


def test_gradients_reach_every_layer():
    network = tower().train()
    network([synthetic(1.0, 1), synthetic(1.0, 2)]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_what_is_no_sound_is_named(tmp_path):
    file = tmp_path / "bark.wav"
    file.write_bytes(b"no sound")
    with pytest.raises(MediaError, match=r"bark\.wav"):
        tower().prepare(Media.audio(str(file)))


@pytest.mark.parametrize("settings", [{"width": 0}, {"seconds": 0.1}, {"seconds": 100.0}])
def test_a_tower_that_cannot_be_is_refused(settings):
    with pytest.raises(InputError, match="takes a width of at least 1 and windows of 0.5 to 24 seconds"):
        tower(**settings)
