"""Audio and video become the published clips; short, long, silent and odd ones have documented results."""

from __future__ import annotations

import io
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from bindllm.encoders.imagebind import clips as clips_module
from bindllm.encoders.imagebind.clips import audio_input, clip_starts, video_input
from bindllm.errors import MediaError
from goldens import golden, make_frames, make_wave
from recordings import numbered, video_file, wav

pytest.importorskip("av")

SILENCE = (np.log(2.0**-23) + 4.268) / 9.138
PADDING = 4.268 / 9.138
SOUNDS = [
    f"wav_{rate}_{channels}ch_{seconds}"
    for rate in (16_000, 44_100)
    for channels in (1, 2)
    for seconds in (0.5, 2.0, 5.0)
]


def published(source, *, prepare=audio_input, **settings):
    return prepare(source, **{"coverage": "published", "max_clips": 64, **settings})


def noise(seconds: float, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, (channels, int(16_000 * seconds))).astype(np.float32)


@pytest.mark.parametrize("name", SOUNDS)
def test_published_filter_banks(name):
    rate, channels, seconds = int(name.split("_")[1]), int(name.split("_")[2][0]), float(name.split("_")[3])
    data = wav(make_wave(name, rate, int(rate * seconds), channels), rate)
    spectrograms = published(data)
    assert spectrograms.shape == (3, 1, 128, 204)
    assert spectrograms.dtype == torch.float32
    # Every third mel band; of the short recordings, whose clips are all the same, the first clip.
    expected = golden("prep_audio")[f"{name}/fbank_s3"]
    difference = np.abs(spectrograms[: len(expected), 0, ::3].numpy() - expected)
    assert difference.max() < 1e-3
    assert difference.mean() < 2e-5
    if seconds <= 2:
        assert torch.equal(spectrograms[0], spectrograms[1])
        assert torch.equal(spectrograms[0], spectrograms[2])


@pytest.mark.parametrize("name", SOUNDS)
def test_published_spans(name, monkeypatch):
    spans = []

    def recording(source, *, rate, cut):
        spans.extend(cut(int(16_000 * float(name.split("_")[3]))))
        return [np.ones((1, 400), np.float32)]

    monkeypatch.setattr(clips_module, "cut_audio", recording)
    published(b"")
    assert spans == [tuple(span) for span in golden("prep_audio")[f"{name}/spans"].tolist()]


@pytest.mark.parametrize(
    ("samples", "starts"),
    # 2.3 - 2 in double precision is a little less than 0.3, and 2.1 - 2 a little more than 0.1.
    [(36_800, [0, 2399, 4799]), (33_600, [0, 800, 1600]), (80_000, [0, 24_000, 48_000]), (20_000, [0, 0, 0])],
)
def test_published_starts_are_rounded_as_published(samples, starts):
    found = clip_starts(Fraction(samples, 16_000), published=3, coverage="published", max_clips=64, name="x")
    assert [int(start * 16_000) for start in found] == starts


def test_half_of_the_sounds_of_two_to_six_seconds_start_a_sample_before_the_exact_place():
    earlier = 0
    lengths = range(32_000, 96_000, 101)
    for samples in lengths:
        duration = Fraction(samples, 16_000)
        found = clip_starts(duration, published=3, coverage="published", max_clips=64, name="x")
        exact = [(duration - 2) * number / 2 for number in range(3)]
        shifts = {int(a * 16_000) - int(b * 16_000) for a, b in zip(found, exact, strict=True)}
        assert shifts <= {-1, 0}
        earlier += shifts == {-1, 0}
    assert 0.4 < earlier / len(lengths) < 0.6


def test_clips_are_computed_from_their_own_samples():
    # Overlapping clips of a sound with an offset: each is the same as when it is given alone.
    sound = noise(5) + 0.3
    spectrograms = published(sound)
    for number, start in enumerate((0, 24_000, 48_000)):
        alone = published(sound[:, start : start + 32_000])[0]
        torch.testing.assert_close(spectrograms[number], alone, atol=1e-6, rtol=0)


def test_first_channel_is_heard_less_the_mean_of_all():
    left, right = noise(2)[0], np.full(32_000, 0.4, np.float32)
    both = published(np.stack([left, right]))
    torch.testing.assert_close(both, published(left), atol=2e-3, rtol=0)
    other = published(np.stack([right, left]))
    assert (other - both).abs().mean() > 0.5


def test_silence_is_the_floor():
    spectrograms = published(np.zeros(48_000, np.int16))
    assert spectrograms.shape == (3, 1, 128, 204)
    torch.testing.assert_close(
        spectrograms[..., :198], torch.full((3, 1, 128, 198), SILENCE), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        spectrograms[..., 198:], torch.full((3, 1, 128, 6), PADDING), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("samples", "frames"), [(1, 1), (160, 1), (399, 1), (400, 1), (559, 1), (560, 2)])
def test_very_short_sounds(samples, frames):
    spectrograms = published(noise(1)[:, :samples])
    assert torch.isfinite(spectrograms).all()
    filled = (spectrograms[0, 0] - PADDING).abs().amax(dim=0) > 1e-3
    assert filled.tolist() == [True] * frames + [False] * (204 - frames)


def test_ten_milliseconds_are_filled_up_with_zeros():
    short = noise(0.01)
    longer = np.concatenate([short - short.mean(), np.zeros((1, 240), np.float32)], axis=1)
    # Less the mean of the longer sound, which is zero as well.
    torch.testing.assert_close(published(short), published(longer), atol=1e-4, rtol=0)


def test_full_coverage_tiles_the_sound():
    sound = noise(7)
    spectrograms = published(sound, coverage="full")
    assert spectrograms.shape == (4, 1, 128, 204)
    for number, start in enumerate((0, 2, 4, 5)):
        alone = published(sound[:, start * 16_000 : (start + 2) * 16_000])[0]
        torch.testing.assert_close(spectrograms[number], alone, atol=1e-6, rtol=0)
    assert published(noise(1.5), coverage="full").shape[0] == 1
    assert published(noise(2), coverage="full").shape[0] == 1


def test_more_clips_than_allowed_are_spread_and_said_once(caplog):
    sound = noise(9)
    spectrograms = published(sound, coverage="full", max_clips=3)
    for number, start in enumerate((0, 3.5, 7)):
        alone = published(sound[:, int(start * 16_000) :][:, :32_000])[0]
        torch.testing.assert_close(spectrograms[number], alone, atol=1e-6, rtol=0)
    [record] = caplog.records
    assert "9 seconds need 5 clips of 2 seconds; only 3" in record.getMessage()
    assert record.name == "bindllm"
    caplog.clear()
    views = video(plain(250), coverage="full", max_clips=2)
    np.testing.assert_allclose(greys(views)[::3], [[0, 49], [200, 249]], atol=1e-3)
    [record] = caplog.records
    assert "10 seconds need 5 clips of 2 seconds; only 2" in record.getMessage()


def test_one_clip_of_a_long_sound_is_its_middle():
    settings = {"published": 3, "coverage": "full", "max_clips": 1, "name": "a.wav"}
    assert clip_starts(Fraction(10), **settings) == [4]
    assert clip_starts(Fraction(1), **settings) == [0]


def test_sound_track_of_a_video():
    import av

    tone = (8000 * np.sin(np.arange(32_000) * 0.2)).astype(np.int16)[None]
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        spectrogram = output.add_stream("mpeg4", rate=25)
        spectrogram.height, spectrogram.width = 64, 96
        sound = output.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for number in range(50):
            output.mux(spectrogram.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
        frame.sample_rate = 16_000
        output.mux(sound.encode(frame))
        for stream in (spectrogram, sound):
            output.mux(stream.encode(None))
    assert torch.equal(published(file.getvalue()), published(wav(tone, 16_000)))


# name, frames, height, width, rate
FILMS = [("A", 60, 96, 128, 12), ("B", 37, 120, 90, 25), ("C", 90, 224, 224, 30)]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711])


video = partial(published, prepare=video_input)


def greys(views: torch.Tensor) -> torch.Tensor:
    """Mean 8-bit gray of every frame of views of plain frames: [views, 2]."""
    return ((views.mean(dim=(3, 4)) * DEVIATION[:, None] + MEAN[:, None]) * 255).mean(dim=1)


def plain(count: int) -> np.ndarray:
    """A film of plain frames, as bright as their numbers."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 20, 30, 3))


@pytest.mark.parametrize(("name", "count", "height", "width", "rate"), FILMS)
def test_published_clips(name, count, height, width, rate):
    frames = make_frames(f"vid_{name}", count, height, width)
    views = video(video_file("avi", "rawvideo", frames, rate=rate, pixels="bgr24"))
    expected = {
        key: golden("prep_video")[f"vid_{name}/{key}"]
        for key in ("tensor_s16", "view1_frame0_s4", "view_sums")
    }
    assert views.shape == (15, 3, 2, 224, 224)
    np.testing.assert_allclose(views[:, :, :, ::16, ::16], expected["tensor_s16"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(views[1, :, 0, ::4, ::4], expected["view1_frame0_s4"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(views.double().sum(dim=(1, 2, 3, 4)), expected["view_sums"], rtol=1e-5)


@pytest.mark.parametrize(("name", "count", "height", "width", "rate"), FILMS)
def test_published_frames(name, count, height, width, rate, monkeypatch):
    asked = []
    original = clips_module._first_and_last
    monkeypatch.setattr(clips_module, "_first_and_last", lambda *a: asked.append(original(*a)) or asked[-1])
    monkeypatch.setattr(
        clips_module,
        "read_frames",
        lambda source, *, pick: ((n, np.zeros((8, 8, 3), np.uint8)) for n in pick(count, Fraction(rate))),
    )
    video(b"")
    assert asked == [tuple(pair) for pair in golden("prep_video")[f"vid_{name}/frame_idx"].tolist()]


@pytest.mark.parametrize(
    ("coverage", "clips"),
    [
        ("published", [(0, 49), (1, 50), (2, 50), (2, 51), (3, 51)]),
        ("full", [(0, 49), (2, 51)]),
    ],
)
def test_the_borders_of_clips_are_rounded_as_published(coverage, clips, monkeypatch):
    """Published: the product of rate and time is in doubles, so the third of five clips ends with frame 50, not 51."""
    asked = []
    original = clips_module._first_and_last
    monkeypatch.setattr(clips_module, "_first_and_last", lambda *a: asked.append(original(*a)) or asked[-1])
    frame = np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(
        clips_module, "read_frames", lambda _, *, pick: ((n, frame) for n in pick(52, Fraction(25)))
    )
    video(b"", coverage=coverage)
    assert asked == clips


def test_full_coverage_tiles_the_video():
    views = video(plain(130), coverage="full")
    # 5.2 seconds: clips at 0, 2 and 3.2 seconds, at 25 frames a second.
    assert views.shape[0] == 9
    np.testing.assert_allclose(greys(views)[::3], [[0, 49], [50, 99], [80, 129]], atol=1e-3)


def test_one_frame_is_shown_in_all_places():
    views = video(plain(200)[150:151])
    assert views.shape == (15, 3, 2, 224, 224)
    np.testing.assert_allclose(greys(views), np.full((15, 2), 150), atol=1e-3)
    assert video(plain(1), coverage="full").shape[0] == 3


def test_fewer_than_one_frame_in_two_seconds():
    # Three frames, one in five seconds: some clips contain no start of a frame.
    pairs = [clips_module._first_and_last(Fraction(start), 3, Fraction(1, 5)) for start in (0, 6, 13)]
    assert pairs == [(0, 0), (2, 2), (2, 2)]
    rows = [0, 100, 200]
    frames = np.stack([np.full((64, 96, 3), row, np.uint8) for row in rows])
    data = video_file("matroska", "ffv1", frames, pixels="bgr0", times=[0, 5000, 10_000])
    assert torch.isfinite(video(data)).all()


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (64, 64), (1, 100)])
def test_crops_lie_along_the_longer_side(height, width):
    y, x = np.mgrid[0:height, 0:width]
    ramp = (x if width >= height else y).astype(np.float32)
    frame = np.repeat((ramp / ramp.max() * 255).astype(np.uint8)[..., None], 3, axis=2)
    crops = clips_module._crops(frame, "a.mp4") * DEVIATION[:, None, None] + MEAN[:, None, None]
    levels = crops.mean(dim=(1, 2, 3)).tolist()
    share = min(height, width) / max(height, width)
    expected = [share / 2, 0.5, 1 - share / 2]
    np.testing.assert_allclose(levels, expected, atol=0.02)


def test_frames_that_are_too_long_are_refused():
    with pytest.raises(MediaError, match="frames of 101 x 1 pixels"):
        video(np.zeros((1, 1, 101, 3), np.uint8))


@pytest.mark.parametrize(("kind", "prepare"), [("audio", audio_input), ("video", video_input)])
def test_files_of_something_else_are_named(tmp_path, kind, prepare):
    path = tmp_path / "words.mp4"
    path.write_text("just some words")
    with pytest.raises(MediaError, match=rf"words\.mp4: cannot be opened as {kind}"):
        published(path, prepare=prepare)
