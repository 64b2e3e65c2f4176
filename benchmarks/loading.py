"""Loading audio and video for ImageBind: seconds of media per second, and peak memory for short and long files."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from benchmarks.measure import Metric, paired
from bindllm.encoders.imagebind.clips import audio_input, video_input

SOUND_MINUTES, VIDEO_SECONDS = (1, 20), (20, 600)
HEIGHT, WIDTH, RATE, KEY_EVERY = 360, 640, 25, 100

# Peak memory of reading a second file, after a short first file has loaded every library.
GROWTH = """
import sys
from benchmarks.measure import forget_peak, peak_bytes
from bindllm.encoders.imagebind.clips import {kind}_input
{kind}_input(sys.argv[1], coverage="published", max_clips=64)
forget_peak()
before = peak_bytes()
{kind}_input(sys.argv[2], coverage="published", max_clips=64)
print(peak_bytes() - before)
"""


def metrics() -> list[Metric]:
    """Measure short and long synthetic MP3 and H.264 files in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        sounds = [_sound(Path(folder) / f"{minutes}.mp3", minutes) for minutes in SOUND_MINUTES]
        videos = [_video(Path(folder) / f"{seconds}.mp4", seconds) for seconds in VIDEO_SECONDS]
        return [
            _throughput(
                "audio", 60 * SOUND_MINUTES[0], lambda: audio_input(sounds[0], coverage="published", max_clips=64),
                lambda: _decode_sound(sounds[0]), "a stereo MP3 at 44,100 Hz; floor: decoding only",
            ),
            _throughput(
                "video", VIDEO_SECONDS[0], lambda: video_input(videos[0], coverage="published", max_clips=64),
                lambda: _decode_frames(videos[0], VIDEO_SECONDS[0]),
                f"H.264 at {WIDTH} x {HEIGHT}; floor: seeking to the ten frames and decoding them only",
            ),
            _memory("audio", sounds, f"{SOUND_MINUTES[1]} minutes over {SOUND_MINUTES[0]}"),
            _memory("video", videos, f"{VIDEO_SECONDS[1]} seconds over {VIDEO_SECONDS[0]}"),
        ]  # fmt: skip


def _throughput(
    kind: str, length: int, load: Callable[[], object], bare: Callable[[], object], note: str
) -> Metric:
    share, ours, floor = paired(load, bare, repeats=5)
    return Metric(
        f"{kind}_load_seconds_per_second",
        length / ours,
        "s/s",
        length / floor,
        f"{note}; takes {share:.2f} times that",
    )


def _memory(kind: str, files: list[Path], note: str) -> Metric:
    short, long = (_growth(kind, files[0], file) for file in files)
    return Metric(
        f"{kind}_memory_long_over_short", long / short, "ratio", 1.0,
        f"{note}: peak grows by {long / 1e6:.0f} MB and {short / 1e6:.0f} MB",
    )  # fmt: skip


def _growth(kind: str, first: Path, second: Path) -> int:
    command = [sys.executable, "-c", GROWTH.format(kind=kind), str(first), str(second)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Zero growth would make the ratio infinite.
    return max(int(done.stdout), 1 << 20)


def _sound(file: Path, minutes: int) -> Path:
    """Write an MP3: one minute is encoded once and its frames are repeated."""
    draw = np.random.default_rng(0)
    time = np.arange(60 * 44_100) / 44_100
    tones = [np.sin(2 * np.pi * hertz * time) + 0.1 * draw.standard_normal(len(time)) for hertz in (440, 660)]
    samples = (np.stack(tones) * 0.4).astype(np.float32)
    minute = file.with_suffix(".part")
    with av.open(str(minute), "w", format="mp3", options={"write_xing": "0", "id3v2_version": "0"}) as output:
        stream = output.add_stream("libmp3lame", rate=44_100, layout="stereo")
        stream.codec_context.format = "fltp"
        for start in range(0, samples.shape[1], 1152):
            block = np.ascontiguousarray(samples[:, start : start + 1152])
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 44_100, start
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    file.write_bytes(minute.read_bytes() * minutes)
    return file


def _video(file: Path, seconds: int) -> Path:
    """Write a drifting image as H.264 with reordered frames."""
    wide = np.random.default_rng(0).integers(0, 256, (HEIGHT // 40, WIDTH // 20, 3), np.uint8)
    wide = wide.repeat(40, axis=0).repeat(40, axis=1)
    with av.open(str(file), "w") as output:
        options = {"preset": "ultrafast", "bf": "2", "g": str(KEY_EVERY)}
        stream = output.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(RATE * seconds):
            shift = number % WIDTH
            image = np.ascontiguousarray(wide[:, shift : shift + WIDTH])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        output.mux(stream.encode(None))
    return file


def _decode_sound(file: Path) -> None:
    with av.open(str(file)) as container:
        container.streams.audio[0].thread_count = 1
        for _ in container.decode(audio=0):
            pass


def _decode_frames(file: Path, seconds: int) -> None:
    """Decode up to the first and last frame of five clips, also on one thread."""
    starts = [number * (seconds - 2) / 4 for number in range(5)]
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        for start in starts:
            container.seek(int(start / stream.time_base), stream=stream)
            last = start + 2 - 1 / RATE
            next(frame for frame in container.decode(stream) if frame.time >= last - 1e-6)
