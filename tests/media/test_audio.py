"""Parts of audio equal those of the whole, from every kind of file, in flat memory; bad files are refused."""

import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bindllm.errors import MediaError, MissingExtraError
from bindllm.media import audio as audio_module
from bindllm.media import container as container_module
from bindllm.media.audio import Resampler, cut_audio
from goldens import golden, make_wave
from recordings import assert_refused, numbered, sound_file, video_file, wav

pytest.importorskip("av")

SECOND = np.arange(48_000) / 48_000
TONES = 0.5 * np.stack([np.sin(2 * np.pi * hertz * SECOND) for hertz in (440, 880)])


def whole(length):
    return [(0, length)]


def resampled_directly(samples: np.ndarray, source_rate: int, rate: int) -> np.ndarray:
    """The formula over the whole recording, every output against every sample, in double precision."""
    divisor = math.gcd(source_rate, rate)
    o, n = source_rate // divisor, rate // divisor
    f = 0.99 * min(o, n)
    outputs = np.arange(-(-n * samples.shape[1] // o))[:, None]
    t = (np.arange(samples.shape[1]) / o - outputs / n) * f
    kernel = np.where(np.abs(t) < 6, np.sinc(t) * np.cos(np.pi * t / 12) ** 2, 0) * f / o
    return samples.astype(np.float64) @ kernel.T


# --- resampling ---


@pytest.mark.parametrize("rate", [7, 1000, 8000, 11025, 16001, 22050, 44099, 44100, 48000, 96000, 384_000])
def test_any_part_equals_the_formula_over_the_whole(rate):
    samples = np.random.default_rng(0).uniform(-1, 1, (2, 20 if rate < 8000 else 1000)).astype(np.float32)
    expected = resampled_directly(samples, rate, 16_000)
    resampler, length, total = Resampler(rate, 16_000), expected.shape[1], samples.shape[1]
    assert resampler.length(total) == length
    for start, stop in [(0, length), (0, 1), (length - 1, length), (length // 3, length // 2), (5, 5)]:
        low, high = resampler.needs(start, stop)
        low, high = max(0, low), min(total, high)
        part = resampler.apply(samples[:, low:high], low, start=start, stop=stop)
        np.testing.assert_allclose(part, expected[:, start:stop], atol=5e-7, rtol=0)


@pytest.mark.parametrize("seconds", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("channels", [1, 2])
def test_published_resampling(channels, seconds):
    name = f"wav_44100_{channels}ch_{seconds}"
    data = wav(make_wave(name, 44_100, int(44_100 * seconds), channels), 44_100)
    lengths = []
    [head] = cut_audio(data, rate=16_000, cut=lambda length: lengths.append(length) or [(0, 500)])
    assert lengths == [golden("prep_audio")[f"{name}/resampled_len"]]
    np.testing.assert_allclose(head, golden("prep_audio")[f"{name}/resampled_head"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kept", [0, 1 << 22])
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 48_000])
def test_parts_of_a_file_equal_parts_of_the_whole(rate, kept, monkeypatch):
    monkeypatch.setattr(audio_module, "_KEPT", kept)
    samples = np.random.default_rng(0).integers(-9000, 9000, (2, 3 * rate), np.int16)
    data = sound_file("flac", "flac", samples / 32767, rate, form="s16")
    spans = [
        (40_000, 48_000),
        (0, 100),
        (7, 20_000),
        (19_990, 20_010),
        (30_001, 31_000),
        (47_990, 99_000),
        (30_000, 30_000),
    ]
    [everything] = cut_audio(data, rate=16_000, cut=whole)
    assert everything.shape == (2, 48_000)
    parts = cut_audio(data, rate=16_000, cut=lambda length: spans)
    for (start, stop), part in zip(spans, parts, strict=True):
        np.testing.assert_allclose(part, everything[:, start:stop], atol=1e-6, rtol=0)


def test_a_long_file_is_decoded_twice_and_a_short_one_once(monkeypatch):
    data, opened = wav(np.zeros((1, 9000), np.int16), 16_000), []
    original = audio_module.open_track
    monkeypatch.setattr(audio_module, "open_track", lambda *a: opened.append(a) or original(*a))
    cut_audio(data, rate=16_000, cut=whole)
    assert len(opened) == 1
    monkeypatch.setattr(audio_module, "_KEPT", 8999)
    cut_audio(data, rate=16_000, cut=whole)
    assert len(opened) == 3


# --- kinds of files ---


@pytest.mark.parametrize(
    ("samples", "codec", "expected"),
    [
        (np.array([[-32768, 0, 16384, 32767]], np.int16), 1, [-1, 0, 0.5, 32767 / 32768]),
        (np.array([[0, 128, 192, 255]], np.uint8), 1, [-1, 0, 0.5, 127 / 128]),
        (np.array([[-(2**31), 0, 2**30]], np.int32), 1, [-1, 0, 0.5]),
        (np.array([[-1, 0.25, 1.5]], np.float32), 3, [-1, 0.25, 1.5]),
        (np.array([[-1, 0.25, 1.5]], np.float64), 3, [-1, 0.25, 1.5]),
    ],
)
def test_wav_values(samples, codec, expected):
    [values] = cut_audio(wav(samples, 16_000, codec=codec), rate=16_000, cut=whole)
    assert values.dtype == np.float32
    assert values.tolist() == [expected]


@pytest.mark.parametrize(
    ("container", "codec", "form", "error"),
    [
        ("flac", "flac", "s16", 1e-4),
        ("wav", "pcm_s24le", "s32", 1e-6),
        ("aiff", "pcm_s16be", "s16", 1e-4),
        ("mp3", "libmp3lame", "fltp", 0.03),
        ("ogg", "vorbis", "fltp", 0.1),
        ("ogg", "libopus", "flt", 0.03),
        ("ipod", "aac", "fltp", 0.03),
        ("mp4", "aac", "fltp", 0.03),
        ("webm", "libopus", "flt", 0.03),
        ("matroska", "flac", "s16", 1e-4),
    ],
)
def test_kinds_of_files(container, codec, form, error, tmp_path):
    path = tmp_path / "tönes.bin"
    path.write_bytes(sound_file(container, codec, TONES, 48_000, form=form))
    [values] = cut_audio(path, rate=48_000, cut=whole)
    assert len(values) == 2
    # Encoders may add silence at the end; what they add in front is taken off by the decoder.
    assert values.shape[1] + 2048 >= 48_000
    both = min(48_000, values.shape[1])
    assert np.abs(values[:, 2000 : both - 2000] - TONES[:, 2000 : both - 2000]).mean() < error


def test_six_channels_keep_their_order():
    tones = np.stack([0.1 * (n + 1) * np.sin(2 * np.pi * 100 * (n + 1) * SECOND[:4800]) for n in range(6)])
    data = sound_file("wav", "pcm_s16le", tones, 48_000, form="s16")
    [values] = cut_audio(data, rate=48_000, cut=whole)
    np.testing.assert_allclose(values, tones, atol=1e-4)


def test_mp3_behind_a_large_cover_picture():
    data = sound_file("mp3", "libmp3lame", TONES, 48_000, form="fltp")
    size = 2_500_000
    sevens = bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
    tagged = b"ID3\x04\0\0" + sevens + bytes(size) + data[data.index(b"\xff\xfb") :]
    [values] = cut_audio(tagged, rate=48_000, cut=whole)
    assert values.shape[1] >= 48_000


# --- arrays ---


def test_array_is_audio_at_16_000():
    ramp = np.array([0, 8192, 16384, -32768], np.int16)
    [values] = cut_audio(ramp, rate=16_000, cut=whole)
    assert values.tolist() == [[0, 0.25, 0.5, -1]]
    [values] = cut_audio(np.stack([ramp, -(ramp // 2)]) / 32768, rate=16_000, cut=whole)
    assert values.tolist() == [[0, 0.25, 0.5, -1], [0, -0.125, -0.25, 0.5]]
    [slow] = cut_audio(np.zeros(16_000, np.float32), rate=8_000, cut=whole)
    assert slow.shape == (1, 8_000)


def test_array_is_left_as_it_was():
    values = np.linspace(-1, 1, 500)
    before = values.copy()
    [part] = cut_audio(values.astype(np.float32), rate=16_000, cut=whole)
    part += 1
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((48_000, 2)), r"expected samples \[N\] or \[C, N\]"),
        (np.zeros((1, 2, 3)), r"expected samples \[N\] or \[C, N\]"),
        (np.zeros(9, np.int32), "int16 or floats"),
        (np.zeros((0, 9), np.int16), "at most 64 channels"),
        (np.zeros(0), "no samples"),
        (np.array([0, np.nan]), "holds a sample of nan"),
        (np.array([0, -np.inf]), "holds a sample of inf"),
        (np.array([0, 20_000.0]), "holds a sample of 20000"),
    ],
)
def test_bad_arrays(array, reason):
    with pytest.raises(MediaError, match=reason):
        cut_audio(array, rate=16_000, cut=whole)


@pytest.mark.parametrize(
    ("whole_file", "samples"),
    [(0xFFFFFFFF, 0xFFFFFFFF), (0, 0), (0x7FFFFFFF, 0x7FFFFFDB), (0xFFFFFFFF, 0), (0x80000024, 0x80000000)],
)
@pytest.mark.parametrize("chunk", [b"", b"LIST\x05\0\0\0data.\0"])
def test_a_wav_written_into_a_pipe_is_read_to_its_end(whole_file, samples, chunk, tmp_path):
    values = np.random.default_rng(0).integers(-9999, 9999, (2, 100_000)).astype(np.int16)
    data = bytearray(wav(values, 16_000))
    data[4:8], data[40:44] = whole_file.to_bytes(4, "little"), samples.to_bytes(4, "little")
    data[36:36] = chunk
    path = tmp_path / "pipe.wav"
    path.write_bytes(data)
    for source in (bytes(data), path):
        [part] = cut_audio(source, rate=16_000, cut=whole)
        np.testing.assert_array_equal(part, values / np.float32(32768))


# --- bad files ---


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_values_that_are_not_audio(value, tmp_path):
    path = tmp_path / "bad.wav"
    samples = np.zeros((1, 5000), np.float32)
    samples[0, 4000] = value
    path.write_bytes(wav(samples, 16_000, codec=3))
    with pytest.raises(MediaError, match=r"bad\.wav: holds a sample of"):
        cut_audio(path, rate=16_000, cut=lambda length: [(0, 10)])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "the file is empty"),
        (b"just some words\n" * 30, "cannot be opened as audio"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "cannot be opened as audio"),
        (wav(np.zeros((1, 0), np.int16), 16_000), "no samples"),
        (wav(np.zeros((1, 9000), np.int16), 16_000)[:4000], "damaged or truncated"),
        (wav(np.ones((1, 0), np.int16), 16_000) + b"LIST\x04\0\0\0INFO", "damaged or truncated"),
        (wav(np.zeros((1, 90), np.int16), 500_000), "500000 samples a second"),
        (wav(np.zeros((65, 90), np.int16), 16_000), "on 65 channels"),
        (video_file("mp4", "mpeg4", [numbered(0)]), r"no audio track \(it holds: video\)"),
    ],
)
def test_bad_files_are_named_with_the_reason(content, reason, tmp_path):
    assert_refused(
        lambda file: cut_audio(file, rate=16_000, cut=whole), content, tmp_path / "bad.wav", reason
    )


def test_images_and_folders_are_not_audio(tmp_path):
    with pytest.raises(MediaError, match="expected audio"):
        cut_audio(Image.new("RGB", (5, 5)), rate=16_000, cut=whole)
    with pytest.raises(MediaError, match="this is a folder"):
        cut_audio(tmp_path, rate=16_000, cut=whole)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    ("container", "codec", "form"),
    [
        ("flac", "flac", "s16"),
        ("mp3", "libmp3lame", "fltp"),
        ("ogg", "libopus", "flt"),
        ("ipod", "aac", "fltp"),
    ],
)
def test_truncated_files_give_what_they_hold_or_a_media_error(container, codec, form, share):
    data = sound_file(container, codec, TONES, 48_000, form=form)
    try:
        [values] = cut_audio(data[: int(share * len(data))], rate=48_000, cut=whole)
    except MediaError:
        return
    assert 0 < values.shape[1] < 48_000


def test_many_damaged_packets_are_refused():
    data = bytearray(sound_file("mp3", "libmp3lame", np.tile(TONES, 4), 48_000, form="fltp"))
    heads = [at for at in range(1000, len(data) - 4) if data[at : at + 2] == b"\xff\xfb"]
    for head in heads[10:150]:
        data[head + 4 : head + 40] = b"\xff" * 36
    with pytest.raises(MediaError, match="audio packets are damaged"):
        cut_audio(bytes(data), rate=48_000, cut=whole)


def test_one_damaged_packet_is_skipped_with_one_warning(caplog, monkeypatch):
    monkeypatch.setattr(audio_module, "_KEPT", 0)
    data = sound_file("flac", "flac", TONES, 48_000, form="s16")
    [values] = cut_audio(data[: len(data) // 2], rate=48_000, cut=whole)
    assert 0 < values.shape[1] < 48_000
    [message] = [record.getMessage() for record in caplog.records]
    assert message.endswith("audio packets are damaged and were skipped")


@pytest.mark.parametrize("container", ["wav", "flac", "mp3", "ogg", "ipod", "webm"])
def test_flipped_bytes_give_audio_or_a_media_error(container):
    codec, form = {
        "wav": ("pcm_s16le", "s16"), "flac": ("flac", "s16"), "mp3": ("libmp3lame", "fltp"),
        "ogg": ("libopus", "flt"), "ipod": ("aac", "fltp"), "webm": ("libopus", "flt"),
    }[container]  # fmt: skip
    data = sound_file(container, codec, TONES[:, :9600], 48_000, form=form)
    draw = np.random.default_rng(0)
    for _ in range(20):
        damaged = bytearray(data)
        for at in draw.integers(0, min(len(data), 2000), 4):
            damaged[at] = draw.integers(256)
        # Whatever else escapes fails the test.
        try:
            [values] = cut_audio(bytes(damaged), rate=16_000, cut=lambda length: [(0, min(length, 9000))])
            assert np.isfinite(values).all()
        except MediaError:
            pass


def test_endless_audio_is_refused(monkeypatch):
    monkeypatch.setattr(audio_module, "MAX_SECONDS", 1)
    with pytest.raises(MediaError, match="longer than"):
        cut_audio(np.zeros(16_001), rate=16_000, cut=whole)


def test_nothing_outside_the_file_is_opened(tmp_path):
    real = tmp_path / "real.wav"
    real.write_bytes(wav(np.zeros((1, 900), np.int16), 16_000))
    for name, text in {
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{real}\n#EXT-X-ENDLIST\n",
        "a.wav": f"ffconcat version 1.0\nfile {real}\n",
    }.items():
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(MediaError, match="cannot be opened as audio"):
            cut_audio(path, rate=16_000, cut=whole)
    for address in (f"file:{real}", f"concat:{real}|{real}", "http://127.0.0.1:9/a.wav"):
        with pytest.raises(MediaError, match="No such file"):
            cut_audio(address, rate=16_000, cut=whole)
    assert not {"hls", "dash", "concat", "image2", "lavfi"} & set(container_module._DEMUXERS)


def test_audio_without_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'bindllm\[audio\]'"):
        cut_audio(b"some bytes", rate=16_000, cut=whole)


# --- memory ---

MEASURE = """
import resource, sys
import numpy as np
from bindllm.media.audio import cut_audio
def cut(length): return [(0, 32_000), (length // 2, length // 2 + 32_000), (length - 32_000, length)]
cut_audio(sys.argv[1], rate=16_000, cut=cut)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
parts = cut_audio(sys.argv[2], rate=16_000, cut=cut)
assert [part.shape for part in parts] == [(1, 32_000)] * 3
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="units of ru_maxrss differ")
def test_two_hours_take_no_more_memory_than_two_minutes(tmp_path):
    files = []
    for seconds in (120, 7200):
        size = 2 * 16_000 * seconds
        head = wav(np.zeros((1, 0), np.int16), 16_000)[:-4] + struct.pack("<I", size)
        files.append(tmp_path / f"{seconds}.wav")
        with Path(files[-1]).open("wb") as file:
            file.write(head)
            # The rest is a hole: silence that takes no space.
            file.truncate(len(head) + size)
    done = subprocess.run([sys.executable, "-c", MEASURE, *files], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8_000, "kilobytes; the samples alone would be 230,000"
