"""Every frame of every kind of file is found by its number; bad files are refused by name."""

import io
import random
import struct
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from bindllm.errors import MediaError, MissingExtraError
from bindllm.media import container as container_module
from bindllm.media import video as video_module
from bindllm.media.video import read_frames
from recordings import assert_refused, number_of, numbered, video_file, wav

av = pytest.importorskip("av")

FAST = {"preset": "ultrafast"}
REORDERED = {"bf": "3", "g": "20", "preset": "veryfast"}
# Frames after a key frame that are shown before it and need the group before it.
OPEN_GROUPS = {"bf": "3", "x264-params": "open-gop=1:keyint=16:scenecut=0:bframes=3"}
UNEVEN = [40 * n + n * n % 23 for n in range(60)]

FILES = {
    "mp4 h264": ("mp4", "libx264", {"options": REORDERED}),
    "mp4 h264 open groups": ("mp4", "libx264", {"options": OPEN_GROUPS}),
    "mkv h264 open groups": ("matroska", "libx264", {"options": OPEN_GROUPS}),
    "mp4 h264 without key frames": (
        "mp4", "libx264", {"options": {"x264-params": "intra-refresh=1:keyint=20:scenecut=0"}},
    ),
    "mp4 h264 late start": ("mp4", "libx264", {"options": REORDERED, "times": [n * 40 + 9000 for n in range(60)]}),
    "mp4 h264 uneven": ("mp4", "libx264", {"options": REORDERED, "times": UNEVEN}),
    "mkv h264 uneven": ("matroska", "libx264", {"options": REORDERED, "times": UNEVEN}),
    "mkv h264 odd rate": ("matroska", "libx264", {"options": REORDERED, "rate": Fraction(30000, 1001)}),
    "mkv hevc open groups": (
        "matroska", "libx265",
        {"options": {"preset": "ultrafast", "x265-params": "log-level=none:bframes=3:keyint=16:open-gop=1"}},
    ),
    "mp4 mpeg4 reordered": ("mp4", "mpeg4", {"options": {"bf": "2", "g": "15"}}),
    "avi mpeg4": ("avi", "mpeg4", {"options": {"g": "15"}}),
    "avi mpeg4 reordered": ("avi", "mpeg4", {"options": {"bf": "2", "g": "15"}}),
    "avi h264 reordered": ("avi", "libx264", {"options": REORDERED}),
    "avi mjpeg": ("avi", "mjpeg", {"pixels": "yuvj420p"}),
    "mpg mpeg2 reordered": ("mpeg", "mpeg2video", {"options": {"bf": "2", "g": "15"}}),
    "webm vp8": ("webm", "libvpx", {"options": {"g": "20", "cpu-used": "8", "b": "500k"}}),
    "webm vp9": (
        "webm", "libvpx-vp9", {"options": {"g": "20", "cpu-used": "8", "deadline": "realtime", "lag-in-frames": "16"}},
    ),
    "mkv ffv1": ("matroska", "ffv1", {"pixels": "bgr0"}),
    "gif": ("gif", "gif", {"pixels": "rgb8", "rate": 10}),
}  # fmt: skip


def clip(name: str, count: int = 60) -> bytes:
    container, codec, settings = FILES[name]
    return video_file(container, codec, [numbered(n) for n in range(count)], **settings)


def everything(count, rate):
    return range(count)


def first_and_last(count, rate):
    return sorted({0, count - 1})


def decoded(data: bytes) -> list[np.ndarray]:
    """All frames, by decoding the whole file."""
    with av.open(io.BytesIO(data)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


@pytest.mark.parametrize("name", FILES)
def test_every_frame_is_the_one_that_its_number_says(name):
    data = clip(name)
    frames = decoded(data)
    assert [number_of(frame) for frame in frames] == list(range(60))
    asked = []
    found = list(read_frames(data, pick=lambda count, rate: asked.append((count, rate)) or range(count)))
    assert asked[0][0] == 60
    assert [number for number, _ in found] == list(range(60))
    # Alone, each is sought from the start of the file; it must not depend on what was decoded before.
    for wanted in range(60):
        [(number, frame)] = read_frames(data, pick=lambda *_, wanted=wanted: [wanted])
        assert number == wanted
        np.testing.assert_array_equal(frame, frames[wanted])
        np.testing.assert_array_equal(found[wanted][1], frames[wanted])


@pytest.mark.parametrize("name", ["mp4 h264 open groups", "webm vp9", "avi mpeg4", "avi h264 reordered"])
def test_several_frames_of_one_file(name):
    data, draw = clip(name), random.Random(0)
    for _ in range(10):
        wanted = sorted(draw.sample(range(60), 5))
        found = read_frames(data, pick=lambda *_, wanted=wanted: wanted)
        assert [(number, number_of(frame)) for number, frame in found] == [(n, n) for n in wanted]


def test_seeking_decodes_a_part_of_the_file_only(monkeypatch):
    data = video_file("mp4", "libx264", [numbered(n) for n in range(400)], options={"g": "20", "bf": "2"})
    passed = []
    original = video_module._frames

    def counting(*arguments):
        for frame in original(*arguments):
            passed.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_module, "_frames", counting)
    found = read_frames(data, pick=lambda *_: [5, 200, 399])
    assert [number_of(frame) for _, frame in found] == [5, 200, 399]
    assert len(passed) <= 3 * 22


def test_rate_and_number_of_frames():
    asked = []
    for name in ("mkv h264 odd rate", "gif"):
        list(read_frames(clip(name), pick=lambda count, rate: asked.append((count, rate)) or [0]))
    assert asked == [(60, Fraction(30000, 1001)), (60, Fraction(10))]


def test_frames_hidden_by_an_edit_list_do_not_count():
    times = [40 * n - 400 for n in range(60)]
    data = video_file("mp4", "libx264", [numbered(n) for n in range(60)], options=REORDERED, times=times)
    numbers = [number_of(frame) for _, frame in read_frames(data, pick=everything)]
    assert numbers == list(range(10, 60))


def test_fragmented_file_without_a_frame_count():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov"}) as output:
        stream = output.add_stream("libx264", rate=25, options=REORDERED)
        stream.height, stream.width = 64, 96
        for number in range(50):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        output.mux(stream.encode(None))
    numbers = [number_of(frame) for _, frame in read_frames(file.getvalue(), pick=lambda *_: [0, 24, 49])]
    assert numbers == [0, 24, 49]


def test_invisible_packets_of_vp8_are_no_frames():
    class Context:
        name = "vp8"

    class Stream:
        codec_context = Context

    assert video_module._is_invisible(bytes([0x00, 0, 0]), Stream)
    assert not video_module._is_invisible(bytes([0x10, 0, 0]), Stream)


def test_frames_are_counted_where_their_times_mislead(monkeypatch):
    scan = video_module._scan

    def misled(*arguments):
        timeline = scan(*arguments)
        return replace(timeline, times=timeline.times[:40] + 1)

    monkeypatch.setattr(video_module, "_scan", misled)
    asked = []
    found = read_frames(clip("mp4 h264"), pick=lambda count, rate: asked.append(count) or [count // 2])
    assert [(number, number_of(frame)) for number, frame in found] == [(30, 30)]
    assert asked == [40, 60]


def test_frame_that_cannot_be_decoded_is_an_error_once_others_were_given(monkeypatch):
    scan = video_module._scan

    def misled(*arguments):
        timeline = scan(*arguments)
        return replace(timeline, times=np.append(timeline.times, timeline.times[-1] + 512))

    monkeypatch.setattr(video_module, "_scan", misled)
    with pytest.raises(MediaError, match="frame 60 cannot be decoded"):
        list(read_frames(clip("mp4 h264"), pick=lambda *_: [0, 60]))


# --- upright, opaque RGB ---


@pytest.mark.parametrize(
    ("rotation", "size", "corner"), [(90, (96, 64), "bl"), (-90, (96, 64), "tr"), (180, (64, 96), "br")]
)
def test_rotation_of_telephones_is_applied(rotation, size, corner):
    frame = numbered(0)
    frame[:20, :20] = (255, 0, 0)
    data = video_file("mp4", "libx264", [frame] * 3, options=FAST, rotation=rotation)
    [(_, upright)] = read_frames(data, pick=lambda *_: [1])
    assert upright.shape[:2] == size
    row, column = {"bl": (-6, 5), "tr": (5, -6), "br": (-6, -6)}[corner]
    assert np.abs(upright[row, column].astype(int) - [255, 0, 0]).max() < 60


@pytest.mark.parametrize(
    ("aspect", "size"), [((2, 1), (64, 192)), ((1, 2), (128, 96)), ((16, 15), (64, 102))]
)
@pytest.mark.parametrize("times", [None, [0, 0, 0]])  # found by time, or by counting
def test_pixels_that_are_not_square_are_stretched(aspect, size, times):
    data = video_file("mp4", "libx264", [numbered(5)] * 3, options=FAST, aspect=Fraction(*aspect))
    if times is not None:
        data = video_file("avi", "mpeg4", [numbered(5)] * 3, options={"bf": "2"}, aspect=Fraction(*aspect))
    for _, frame in read_frames(data, pick=everything):
        assert frame.shape == (*size, 3)
        assert number_of(np.asarray(Image.fromarray(frame).resize((96, 64)))) == 5


def test_a_disc_in_a_wide_frame_stays_a_disc():
    rows, columns = np.mgrid[:64, :96]
    squeezed = ((rows - 32) ** 2 + (2 * (columns - 48)) ** 2 < 30**2)[..., None]
    frame = np.where(squeezed, np.uint8(255), np.zeros((64, 96, 3), np.uint8))
    data = video_file("matroska", "libx264", [frame] * 2, options=FAST, aspect=Fraction(2), rotation=90)
    [(_, shown)] = read_frames(data, pick=lambda *_: [1])
    is_white = shown[..., 0] > 128
    height, width = np.ptp(np.argwhere(is_white), axis=0)
    # The rotation turns the stretched frame, so its long side is upright.
    assert shown.shape == (192, 64, 3)
    assert abs(height - width) <= 3


def test_the_limit_is_on_the_stretched_size(monkeypatch):
    data = video_file("mp4", "libx264", [numbered(5)] * 2, options=FAST, aspect=Fraction(4))
    monkeypatch.setattr("bindllm.media.container.MAX_PIXELS", 4 * 96 * 64 - 1)
    with pytest.raises(MediaError, match="frames of 384 x 64 pixels"):
        list(read_frames(data, pick=everything))


def test_rotation_by_odd_angles_is_left_alone():
    data = video_file("mp4", "libx264", [numbered(5)] * 2, options=FAST, rotation=30)
    assert [number_of(frame) for _, frame in read_frames(data, pick=everything)] == [5, 5]


def test_transparent_parts_become_white():
    frames = [Image.new("RGBA", (20, 10), (0, 0, 0, 0)) for _ in range(2)]
    for number, frame in enumerate(frames):
        frame.paste((255, 0, 0, 255), (0, 0, 5 + number, 10))
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
    [(_, first), _] = read_frames(file.getvalue(), pick=everything)
    assert first[5, 15].tolist() == [255, 255, 255]
    assert first[5, 2].tolist() == [255, 0, 0]


def test_lossless_colors_are_exact():
    draw = np.random.default_rng(0)
    frames = draw.integers(0, 256, (3, 20, 30, 3), np.uint8)
    data = video_file("matroska", "ffv1", frames, pixels="bgr0")
    for number, frame in read_frames(data, pick=everything):
        np.testing.assert_array_equal(frame, frames[number])


def test_one_frame(tmp_path):
    path = tmp_path / "still \u2603.mp4"
    path.write_bytes(clip("mp4 h264", count=1))
    [(number, frame)] = read_frames(path, pick=first_and_last)
    assert (number, number_of(frame)) == (0, 0)


# --- arrays ---


def test_array_is_a_video_at_25_frames_a_second():
    frames = np.stack([numbered(n) for n in range(10)])
    asked = []
    found = list(read_frames(frames, pick=lambda count, rate: asked.append((count, rate)) or [2, 7]))
    assert asked == [(10, Fraction(25))]
    assert [(number, number_of(frame)) for number, frame in found] == [(2, 2), (7, 7)]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 5, 3), np.uint8),
        np.zeros((2, 4, 5, 4), np.uint8),
        np.zeros((2, 4, 5, 3)),
        np.zeros((0, 4, 5, 3), np.uint8),
    ],
)
def test_arrays_of_other_shapes_are_refused(array):
    with pytest.raises(MediaError, match=r"expected a non-empty array \[N, H, W, 3\]"):
        list(read_frames(array, pick=everything))


def test_pillow_picture_is_no_video():
    with pytest.raises(MediaError, match="expected a video"):
        list(read_frames(Image.new("RGB", (5, 5)), pick=everything))


# --- bad files ---


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "the file is empty"),
        (b"just some words\n" * 30, "cannot be opened as video"),
        (bytes(5000), "cannot be opened as video"),
        (b"RIFF\x10\0\0\0AVI LIST", "cannot be opened as video"),
    ],
)
def test_bad_files_are_named_with_the_reason(content, reason, tmp_path):
    assert_refused(
        lambda file: list(read_frames(file, pick=everything)), content, tmp_path / "bad.mp4", reason
    )


def test_picture_is_no_video():
    file = io.BytesIO()
    Image.new("RGB", (30, 30)).save(file, "PNG")
    with pytest.raises(MediaError, match="another kind of file"):
        list(read_frames(file.getvalue(), pick=everything))


def test_audio_is_not_video():
    with pytest.raises(MediaError, match=r"no video track \(it holds: audio\)"):
        list(read_frames(wav(np.zeros((1, 800), np.int16), 8000), pick=everything))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", FILES)
def test_truncated_files_give_what_they_hold_or_a_media_error(name, share):
    data = clip(name)
    try:
        found = list(read_frames(data[: int(share * len(data))], pick=everything))
    except MediaError:
        return
    # All of them, if the part that is cut off is padding.
    assert 0 < len(found) <= 60
    # The last packet is cut through; frames that do not build on it are whole.
    assert [number_of(frame) for _, frame in found[:-4]] == list(range(len(found) - 4))


@pytest.mark.parametrize("name", ["mp4 h264", "mkv h264 uneven", "avi mpeg4 reordered", "webm vp9", "gif"])
def test_flipped_bytes_give_frames_or_a_media_error(name):
    data, draw = clip(name, count=20), np.random.default_rng(0)
    for _ in range(15):
        damaged = bytearray(data)
        for at in draw.integers(0, len(data), 5):
            damaged[at] = draw.integers(256)
        # Whatever else escapes fails the test.
        try:
            for _, frame in read_frames(bytes(damaged), pick=first_and_last):
                assert frame.dtype == np.uint8
        except MediaError:
            pass


def test_huge_frames_are_refused(monkeypatch):
    data = bytearray(clip("gif", count=3))
    data[6:10] = struct.pack("<HH", 65535, 65535)
    with pytest.raises(MediaError, match="expected 1 to 100,000,000 pixels"):
        list(read_frames(bytes(data), pick=everything))
    monkeypatch.setattr(container_module, "MAX_PIXELS", 64 * 96 - 1)
    with pytest.raises(MediaError, match="frames of 96 x 64 pixels"):
        list(read_frames(clip("mp4 h264", count=3), pick=everything))


@pytest.mark.parametrize("name", ["mp4 h264", "avi h264 reordered"])
def test_endless_videos_are_refused(name, monkeypatch):
    monkeypatch.setattr(video_module, "MAX_FRAMES", 9)
    with pytest.raises(MediaError, match="more than 9 frames"):
        list(read_frames(clip(name, count=10), pick=everything))


def test_nothing_outside_the_file_is_opened(tmp_path, monkeypatch):
    real = tmp_path / "real.mp4"
    real.write_bytes(clip("mp4 h264", count=3))
    playlists = {
        "a.m3u8": f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{real}\n#EXT-X-ENDLIST\n",
        "a.ffconcat": f"ffconcat version 1.0\nfile {real}\n",
        "a.mp4": f"ffconcat version 1.0\nfile {real}\n",
        "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    }
    for name, text in playlists.items():
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(MediaError, match="cannot be opened as video"):
            list(read_frames(path, pick=everything))
    for address in (f"file:{real}", f"concat:{real}|{real}", "http://127.0.0.1:9/a.mp4", "pipe:0"):
        with pytest.raises(MediaError, match="No such file"):
            list(read_frames(address, pick=everything))


def test_video_without_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'bindllm\[video\]'"):
        list(read_frames(b"some bytes", pick=everything))
