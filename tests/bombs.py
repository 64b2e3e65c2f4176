"""Small files that claim, or decode to, far more than any request needs; each must end in a `MediaError`."""

from __future__ import annotations

import functools
import io
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image

from bindllm.media.audio import cut_audio
from bindllm.media.images import open_image
from bindllm.media.maps import open_depth, open_thermal
from bindllm.media.motion import open_imu
from bindllm.media.points import open_points
from bindllm.media.video import read_frames
from recordings import sound_file

LOADERS = {
    "image": lambda source: open_image(source, size=None),
    "audio": lambda source: cut_audio(source, rate=16_000, cut=lambda length: [(0, min(length, 100))]),
    "video": lambda source: list(read_frames(source, pick=lambda count, rate: [0])),
    "point": open_points,
    "depth": open_depth,
    "thermal": open_thermal,
    "imu": lambda source: open_imu(source, steps=100),
}
"""Opens a file of a modality, like the encoders do."""

# --- boxes of MP4 (ISO/IEC 14496-12) ---


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind + content


def full_box(kind: bytes, *parts: bytes) -> bytes:
    return box(kind, bytes(4), *parts)


def mp4(*tables: bytes, is_audio: bool = False) -> bytes:
    """Return an MP4 file of one track of 16 x 16 pixels, or of 48 kHz PCM, with these tables of samples."""
    matrix = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    header = full_box(
        b"mvhd",
        struct.pack(">4IIH", 0, 0, 1000, 1000, 0x10000, 256),
        bytes(10),
        matrix,
        bytes(24),
        b"\0\0\0\2",
    )
    size = struct.pack(">II", 16 << 16, 16 << 16)
    track = box(b"tkhd", struct.pack(">6I", 7, 0, 0, 1, 0, 1000), bytes(16), matrix, size)
    if is_audio:
        entry = box(b"twos", struct.pack(">6xH8x4HI", 1, 1, 16, 0, 0, 48000 << 16))
    else:
        entry = box(b"mp4v", struct.pack(">6xH16x2H2I4xH32xHh", 1, 16, 16, 0x480000, 0x480000, 1, 24, -1))
    media = box(
        b"mdia",
        full_box(b"mdhd", struct.pack(">4I2H", 0, 0, 48000, 1000, 0, 0)),
        full_box(b"hdlr", bytes(4), b"soun" if is_audio else b"vide", bytes(13)),
        box(
            b"minf",
            full_box(b"smhd", bytes(4)) if is_audio else box(b"vmhd", b"\0\0\0\1", bytes(8)),
            box(b"dinf", full_box(b"dref", struct.pack(">I", 1), box(b"url ", b"\0\0\0\1"))),
            box(b"stbl", full_box(b"stsd", struct.pack(">I", 1), entry), *tables),
        ),
    )
    brands = box(b"ftyp", b"isom", struct.pack(">I", 512), b"isom")
    return brands + box(b"moov", header, box(b"trak", track, media)) + box(b"mdat", bytes(1000))


def tables(samples: int, *, chunks: int = 1, duration: int = 1) -> tuple[bytes, ...]:
    """Return tables that claim samples of one constant size, and chunks that each have all of them."""
    return (
        full_box(b"stts", struct.pack(">3I", 1, samples, duration)),
        full_box(b"stsc", struct.pack(">4I", 1, 1, samples, 1)),
        full_box(b"stsz", struct.pack(">2I", 1, samples)),
        full_box(b"stco", struct.pack(">I", chunks), struct.pack(">I", 40) * chunks),
    )


# --- whole files ---


def png_of(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size; its pixels are missing."""
    chunks = (
        (b"IHDR", struct.pack(">2I5B", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1000))),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """Return a progressive gray JPEG whose last pass over the pixels comes again and again."""
    stream = io.BytesIO()
    Image.new("L", (side, side)).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()[:-2]
    # A scan is a table of Huffman codes, its header and its data.
    last = content[content.rfind(b"\xff\xc4", 0, content.rfind(b"\xff\xda")) :]
    return content + last * (scans - content.count(b"\xff\xda")) + b"\xff\xd9"


def gif_of(frames: int) -> bytes:
    """Return a GIF of 1 x 1 pixel with many frames of 23 bytes."""
    head = b"GIF89a" + struct.pack("<2H3B", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return (
        head + (b"!\xf9\4\0\4\0\0\0," + struct.pack("<4HB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0") * frames + b";"
    )


def silent_aac(seconds: float) -> bytes:
    """Return a file of silence: 1024 samples at 8 kHz in some bytes of AAC, again and again."""
    one = sound_file("adts", "aac", np.zeros((1, 8 * 1024), np.float32), 8000, form="fltp")
    # Frames of the middle: the encoder starts and ends with others.
    size = ((one[3] & 3) << 11) | (one[4] << 3) | (one[5] >> 5)
    frames, at = [], 0
    while at < len(one):
        size = ((one[at + 3] & 3) << 11) | (one[at + 4] << 3) | (one[at + 5] >> 5)
        frames.append(one[at : at + size])
        at += size
    return frames[len(frames) // 2] * int(seconds * 8000 / 1024 + 1)


def npy_of(shape: tuple[int, ...], data: bytes = b"") -> bytes:
    """Return an NPY file whose header claims a shape of bytes."""
    header = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


def npz_of(size: int, name: str = "points") -> bytes:
    """Return an NPZ file that unpacks to zeros, a thousand times as many bytes as it has."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(f"{name}.npy", "w") as file,
    ):
        file.write(npy_of((size,)))
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    return stream.getvalue()


def ply_of(points: int) -> bytes:
    """Return a PLY file whose header claims points; three of them are there."""
    axes = b"".join(b"property float %s\n" % axis for axis in (b"x", b"y", b"z"))
    return b"ply\nformat binary_little_endian 1.0\nelement vertex %d\n%send_header\n" % (
        points,
        axes,
    ) + bytes(36)


def svg_of_entities() -> bytes:
    """Return an SVG whose text is ten billion laughs."""
    entities = b"".join(b'<!ENTITY a%d "%s">' % (i, b"&a%d;" % (i - 1) * 10) for i in range(1, 11))
    return (
        b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a0 "ha">%s]><svg><text>&a10;</text></svg>' % entities
    )


def svg_of_copies() -> bytes:
    """Return an SVG of groups that each draw the group before ten times."""
    groups = b"".join(b'<g id="a%d">%s</g>' % (i, b'<use href="#a%d"/>' % (i - 1) * 10) for i in range(1, 10))
    return (
        b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><g id="a0"><path d="M0 0L9 9"/></g>%s</svg>'
        % groups
    )


@functools.cache
def small_bombs() -> list[tuple[str, bytes]]:
    """Return modality and content of bombs; all together are made in a second."""
    return [
        ("image", png_of(60_000, 60_000)),
        ("image", png_of(8000, 8000)),
        ("image", jpeg_of_scans(2000, 5000)),
        ("image", svg_of_entities()),
        (
            "image",
            b'<svg xmlns="http://www.w3.org/2000/svg">' + b"<g>" * 100_000 + b"</g>" * 100_000 + b"</svg>",
        ),
        ("image", svg_of_copies()),
        ("audio", silent_aac(900)),
        ("audio", mp4(*tables(4_000_000_000, chunks=10), is_audio=True)),
        ("video", mp4(*tables(50_000_000))),
        ("video", mp4(*tables(50_000_000, duration=2))),
        ("video", gif_of(40_000)),
        ("point", ply_of(10**12)),
        ("point", npy_of((10**12, 3))),
        ("point", npz_of(80 << 20)),
        ("point", b"#" + b"(" * 60_000 + b"\n"),
        ("depth", png_of(60_000, 60_000)),
        ("depth", npz_of(80 << 20, "depth")),
        ("thermal", npy_of((60_000, 60_000))),
        ("imu", npy_of((10**9, 6))),
        ("imu", b"#" + b"(" * 4000 + b"\n"),
    ]
