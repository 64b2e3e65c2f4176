"""Thousands of damaged files for every loader: each ends in finite numbers or in a `MediaError`, in time and in bounds.

The files are opened in a process of its own with a limit on its memory, so that a crash, a hang or a flood of memory in
a native library is caught, and blamed on the case whose number the failure names: `damaged(loader, number)` makes the
same file again.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

CASES = {"image": 700, "audio": 600, "video": 600, "point": 1200, "depth": 300, "thermal": 300, "imu": 400}
SECONDS = 30
MEMORY = 6 << 30
PIXELS = {"gif": "rgb8", "mjpeg": "yuvj420p"}


# --- whole files ---


def image_files() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
    image = Image.fromarray(noise)
    kinds = {"JPEG": {}, "PNG": {}, "WEBP": {"lossless": True}, "GIF": {}, "BMP": {}, "TIFF": {}}
    files = [saved(image, kind, **options) for kind, options in kinds.items()]
    files += [saved(image, "JPEG", progressive=True), saved(image.convert("P"), "PNG"), saved(image, "WEBP")]
    files.append(saved(image, "TIFF", compression="tiff_lzw"))
    files.append(b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><path d="M0 0L9 9z"/></svg>')
    return files


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def array_files(arrays: list[np.ndarray], key: str) -> list[bytes]:
    files = []
    for array in arrays:
        plain, packed = io.BytesIO(), io.BytesIO()
        np.save(plain, array)
        np.savez_compressed(packed, **{key: array})
        files += [plain.getvalue(), packed.getvalue()]
    return files


def map_files() -> list[bytes]:
    values = np.random.default_rng(1).integers(1, 9000, (30, 40)).astype(np.uint16)
    image, floats = Image.fromarray(values), Image.fromarray(values.astype(np.float32) / 9000)
    files = [saved(image, "PNG"), saved(image, "TIFF"), saved(floats, "TIFF")]
    files.append(saved(image, "TIFF", compression="tiff_deflate"))
    return files + array_files(
        [values, values.astype(np.float64) / 1000, values.astype(np.float32).T], "depth"
    )


def point_files() -> list[bytes]:
    import trimesh

    mesh = trimesh.creation.icosphere(subdivisions=1)
    cloud = trimesh.PointCloud(mesh.vertices)
    kinds = ("ply", "obj", "off", "stl", "stl_ascii", "glb")
    files = [mesh.export(file_type=kind) for kind in kinds]
    files.append(mesh.export(file_type="ply", encoding="ascii"))
    files += [cloud.export(file_type=kind) for kind in ("ply", "xyz", "glb")]
    files = [file.encode() if isinstance(file, str) else file for file in files]
    return files + array_files([mesh.vertices, mesh.vertices.astype(np.float32)], "points")


def motion_files() -> list[bytes]:
    signal = np.random.default_rng(2).normal(size=(40, 6))
    rows = [",".join(f"{value:.4f}" for value in row) for row in signal]
    timed = "\n".join(f"{number * 0.01:.3f},{row}" for number, row in enumerate(rows))
    header = "time,acc_x,acc_y,acc_z,gyro_x,gyro_y,gyro_z\n"
    tables = ["\n".join(rows), header + timed, (header + timed).replace(",", "\t")]
    return [table.encode() for table in tables] + array_files([signal, signal.T.astype(np.float32)], "imu")


def clip(kind: str, video: str | None, audio: str | None) -> bytes:
    """Return a short video or audio file in a container."""
    import av

    stream = io.BytesIO()
    rng = np.random.default_rng(3)
    with av.open(stream, "w", format=kind) as container:
        tracks = []
        if video:
            track = container.add_stream(video, rate=10)
            track.width, track.height, track.pix_fmt = 48, 32, PIXELS.get(video, "yuv420p")
            noise = rng.integers(0, 255, (12, 32, 48, 3), np.uint8)
            frames = [av.VideoFrame.from_ndarray(frame, "rgb24") for frame in noise]
            for number, frame in enumerate(frames):
                frame.pts = number
            tracks.append((track, frames))
        if audio:
            track = container.add_stream(audio, rate=16000, layout="stereo")
            wave = rng.integers(-9000, 9000, (1, 2 * 16000), np.int16)
            frame = av.AudioFrame.from_ndarray(wave, "s16", "stereo")
            frame.sample_rate, frame.pts = 16000, 0
            tracks.append((track, [frame]))
        for track, frames in tracks:
            for frame in frames:
                container.mux(track.encode(frame))
            container.mux(track.encode(None))
    return stream.getvalue()


def audio_files() -> list[bytes]:
    kinds = [("wav", "pcm_s16le"), ("flac", "flac"), ("mp4", "aac"), ("ogg", "flac"), ("adts", "aac")]
    return [clip(kind, None, codec) for kind, codec in kinds] + [clip("matroska", "mpeg4", "aac")]


def video_files() -> list[bytes]:
    kinds = [
        ("mp4", "mpeg4", None),
        ("matroska", "mjpeg", None),
        ("avi", "mpeg4", None),
        ("gif", "gif", None),
    ]
    return [clip(*kind) for kind in [*kinds, ("mp4", "mpeg4", "aac"), ("webm", "libvpx", None)]]


FILES: dict[str, Callable[[], list[bytes]]] = {
    "image": image_files,
    "audio": audio_files,
    "video": video_files,
    "point": point_files,
    "depth": map_files,
    "thermal": map_files,
    "imu": motion_files,
}
whole = cache(lambda loader: FILES[loader]())


# --- damage ---


def damaged(loader: str, number: int) -> bytes:
    """Return one damaged file; the same one for the same number."""
    rng = random.Random(zlib.crc32(loader.encode()) * 100_003 + number)
    files = whole(loader)
    data = bytearray(files[number % len(files)])
    for _ in range(rng.choice((1, 1, 1, 3))):
        damage = rng.choice((flip, flip, in_header, in_header, truncate, splice, zero, repeat, extreme))
        data = damage(data, rng, files) or bytearray(b"\0")
    return bytes(data)


def flip(data, rng, files):
    for _ in range(rng.choice((1, 4, 32))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def in_header(data, rng, files):
    for _ in range(rng.choice((1, 3))):
        data[rng.randrange(min(len(data), 128))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return data


def truncate(data, rng, files):
    return data[: rng.randrange(len(data))]


def splice(data, rng, files):
    other, at = rng.choice(files), rng.randrange(len(data))
    return data[:at] + other[rng.randrange(len(other)) :]


def zero(data, rng, files):
    at = rng.randrange(len(data))
    length = min(rng.choice((4, 64, 1024)), len(data) - at)
    data[at : at + length] = bytes(length)
    return data


def repeat(data, rng, files):
    at = rng.randrange(len(data))
    return data[:at] + data[at : at + rng.choice((1, 16, 400))] * rng.choice((2, 50)) + data[at:]


def extreme(data, rng, files):
    """Put the largest or smallest number where a length or a count may stand."""
    word = rng.choice(
        (b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\xff" * 8, b"99999999")
    )
    at = rng.randrange(min(len(data), 512))
    data[at : at + len(word)] = word
    return data


# --- the process that opens them ---


def opened(loader: str, data: bytes) -> list[np.ndarray]:
    """Open a file with the loader and return its numbers."""
    if loader == "image":
        from bindllm.encoders.imagebind.inputs import image_input

        return [image_input(data).numpy()]
    if loader == "audio":
        from bindllm.media.audio import cut_audio

        return cut_audio(data, rate=16000, cut=lambda length: [(0, min(length, 32000))])
    if loader == "video":
        from bindllm.media.video import read_frames

        return [
            frame
            for _, frame in read_frames(data, pick=lambda count, rate: sorted({0, count // 2, count - 1}))
        ]
    if loader == "point":
        from bindllm.media.points import open_points

        return [open_points(data)]
    if loader == "imu":
        from bindllm.media.motion import open_imu

        return [open_imu(data, steps=200)]
    from bindllm.encoders.imagebind.inputs import depth_input, thermal_input

    if loader == "depth":
        return [depth_input(data, baseline=0.075, focal=500.0).numpy()]
    return [thermal_input(data).numpy()]


def work(loader: str, first: int, last: int) -> None:
    """Open every damaged file of a range, and print one line before and one after each."""
    import logging
    import resource
    import warnings

    import torch

    from bindllm.errors import MediaError

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    whole(loader)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number in range(first, last):
        print(json.dumps(["open", number]), flush=True)
        try:
            arrays = opened(loader, damaged(loader, number))
            bad = not arrays or any(not array.size or not np.isfinite(array).all() for array in arrays)
            outcome = "empty or not finite" if bad else "numbers"
        except MediaError as error:
            outcome = "refused" if "bytes>" in str(error) else f"the file is not named: {error}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        print(json.dumps(["done", number, outcome[:300]]), flush=True)


def forward(stream, put: Callable[[str], None]) -> None:
    """Hand every line on, and an empty one at the end."""
    for line in stream:
        put(line)
    put("")


def outcomes(loader: str, count: int) -> dict[int, str]:
    """Return what became of every case; a process that died or hung is begun anew behind the case at fault."""
    whole(loader)  # what fails here would fail in every process
    found: dict[int, str] = {}
    first = 0
    while first < count:
        command = [sys.executable, __file__, loader, str(first), str(count)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        lines: Queue[str] = Queue()
        errors: list[str] = []
        readers = [
            Thread(target=forward, args=(process.stdout, lines.put)),
            Thread(target=forward, args=(process.stderr, errors.append)),
        ]
        for reader in readers:
            reader.start()
        current, wait = first, 4 * SECONDS  # the first line waits for the imports
        while True:
            try:
                line = lines.get(timeout=wait)
            except Empty:
                process.kill()
                found[current] = f"took more than {wait} s"
                break
            if not line:
                break
            wait = SECONDS
            what, current, *outcome = json.loads(line)
            if what == "done":
                found[current] = outcome[0]
        process.wait()
        for reader in readers:
            reader.join()
        if current not in found:
            found[current] = f"the process ended with {process.returncode}: {''.join(errors)[-500:]}"
        first = current + 1
    return found


@pytest.mark.parametrize("loader", CASES)
def test_damaged_files_give_numbers_or_a_media_error(loader):
    found = outcomes(loader, CASES[loader])
    wrong = {number: outcome for number, outcome in found.items() if outcome not in ("numbers", "refused")}
    assert not wrong, f"{loader}: {len(wrong)} of {len(found)} cases, by number: {wrong}"
    assert sorted(found) == list(range(CASES[loader]))
    # Damage that always or never shows would test nothing.
    assert 0.1 < sum(outcome == "refused" for outcome in found.values()) / len(found) < 0.99


def test_there_are_enough_cases():
    assert sum(CASES.values()) >= 2000


@pytest.mark.parametrize("loader", CASES)
def test_whole_files_are_opened(loader):
    for data in whole(loader):
        assert all(np.isfinite(array).all() for array in opened(loader, data))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
    work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
