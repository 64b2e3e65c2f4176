"""Videos become the published clips and crops; short, long and odd ones have documented results."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from bindllm.encoders.imagebind import video as video_module
from bindllm.encoders.imagebind.video import video_input
from bindllm.errors import InputError, MediaError
from goldens import golden, make_frames
from recordings import video_file

pytest.importorskip("av")

# name, frames, height, width, rate
FILMS = [("A", 60, 96, 128, 12), ("B", 37, 120, 90, 25), ("C", 90, 224, 224, 30)]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def published(source, **settings):
    return video_input(source, **{"coverage": "published", "max_clips": 64, **settings})


def greys(views: torch.Tensor) -> torch.Tensor:
    """Mean 8-bit gray of every frame of views of plain frames: [views, 2]."""
    return ((views.mean(dim=(3, 4)) * DEVIATION[:, None] + MEAN[:, None]) * 255).mean(dim=1)


def plain(count: int) -> np.ndarray:
    """A film of plain frames, as bright as their numbers."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 20, 30, 3))


@pytest.mark.parametrize(("name", "count", "height", "width", "rate"), FILMS)
def test_published_clips(name, count, height, width, rate):
    frames = make_frames(f"vid_{name}", count, height, width)
    views = published(video_file("avi", "rawvideo", frames, rate=rate, pixels="bgr24"))
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
    original = video_module._first_and_last
    monkeypatch.setattr(video_module, "_first_and_last", lambda *a: asked.append(original(*a)) or asked[-1])
    monkeypatch.setattr(
        video_module,
        "read_frames",
        lambda source, *, pick: ((n, np.zeros((8, 8, 3), np.uint8)) for n in pick(count, Fraction(rate))),
    )
    published(b"")
    assert asked == [tuple(pair) for pair in golden("prep_video")[f"vid_{name}/frame_idx"].tolist()]


def test_full_coverage_tiles_the_video():
    views = published(plain(130), coverage="full")
    # 5.2 seconds: clips at 0, 2 and 3.2 seconds, at 25 frames a second.
    assert views.shape[0] == 9
    np.testing.assert_allclose(greys(views)[::3], [[0, 49], [50, 99], [80, 129]], atol=1e-3)


def test_more_clips_than_allowed_are_spread_and_said_once(caplog):
    views = published(plain(250), coverage="full", max_clips=2)
    np.testing.assert_allclose(greys(views)[::3], [[0, 49], [200, 249]], atol=1e-3)
    [record] = caplog.records
    assert "10 seconds need 5 clips of 2 seconds; only 2" in record.getMessage()


def test_one_frame_is_shown_in_all_places():
    views = published(plain(200)[150:151])
    assert views.shape == (15, 3, 2, 224, 224)
    np.testing.assert_allclose(greys(views), np.full((15, 2), 150), atol=1e-3)
    assert published(plain(1), coverage="full").shape[0] == 3


def test_fewer_than_one_frame_in_two_seconds():
    # Three frames, one in five seconds: some clips contain no start of a frame.
    pairs = [video_module._first_and_last(Fraction(start), 3, Fraction(1, 5)) for start in (0, 6, 13)]
    assert pairs == [(0, 0), (2, 2), (2, 2)]
    rows = [0, 100, 200]
    frames = np.stack([np.full((64, 96, 3), row, np.uint8) for row in rows])
    data = video_file("matroska", "ffv1", frames, pixels="bgr0", times=[0, 5000, 10_000])
    assert torch.isfinite(published(data)).all()


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (64, 64), (1, 100)])
def test_crops_lie_along_the_longer_side(height, width):
    y, x = np.mgrid[0:height, 0:width]
    ramp = (x if width >= height else y).astype(np.float32)
    frame = np.repeat((ramp / ramp.max() * 255).astype(np.uint8)[..., None], 3, axis=2)
    crops = video_module._crops(frame, "a.mp4") * DEVIATION[:, None, None] + MEAN[:, None, None]
    levels = crops.mean(dim=(1, 2, 3)).tolist()
    share = min(height, width) / max(height, width)
    expected = [share / 2, 0.5, 1 - share / 2]
    np.testing.assert_allclose(levels, expected, atol=0.02)


def test_frames_that_are_too_long_are_refused():
    with pytest.raises(MediaError, match="frames of 101 x 1 pixels"):
        published(np.zeros((1, 1, 101, 3), np.uint8))


def test_unknown_coverage():
    with pytest.raises(InputError, match="Did you mean 'published'"):
        published(plain(3), coverage="publish")


def test_file_that_is_no_video_is_named(tmp_path):
    path = tmp_path / "words.mp4"
    path.write_text("just some words")
    with pytest.raises(MediaError, match=r"words\.mp4: cannot be opened as video"):
        published(path)
