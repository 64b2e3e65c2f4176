"""Rendering SVG: sizes and contents, untrusted files, and the process that renders."""

from __future__ import annotations

import base64
import gzip
import io
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

import bindllm.media.images as images_module
from bindllm.errors import MediaError, MissingExtraError
from bindllm.media import open_image, svg_renderer
from bindllm.media.limits import Budget, MediaLimits, decoding_one
from recordings import assert_refused

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
HALVES = '<rect width="10" height="10" fill="red"/><rect x="10" width="10" height="10" fill="blue"/>'
# Renderers take hours for it.
ENDLESS = '<filter id="f"><feTurbulence numOctaves="2000000000" baseFrequency="0.1"/></filter>'
ENDLESS += '<rect width="20" height="10" filter="url(#f)"/>'


def svg(body: str, attributes: str = 'viewBox="0 0 20 10"') -> bytes:
    return f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}>{body}</svg>'.encode()


def embedded(image: Image.Image) -> str:
    """A PNG inside of an SVG."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<image href="data:image/png;base64,{data}" width="20" height="10"/>'


def test_svg_longer_side_is_size():
    image = open_image(svg(HALVES), size=100)
    assert image.size == (100, 50)
    assert (image.getpixel((20, 25)), image.getpixel((80, 25))) == (RED, BLUE)
    assert open_image(svg(HALVES, 'viewBox="0 0 10 20"'), size=100).size == (50, 100)


def test_svg_background_is_white():
    assert open_image(svg("")).getpixel((5, 5)) == WHITE


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ('width="30" height="60"', (50, 100)),
        ('width="30mm" height="60mm"', (50, 100)),
        ('width="30"', (100, 50)),
        ('width="100%" height="100%"', (100, 50)),
        ("", (100, 50)),
        ('width="1e9" height="1e9"', (100, 100)),
    ],
)
def test_svg_sizes(attributes, size):
    # Without a size of its own, the bounding box of what is drawn (20 x 10) counts.
    assert open_image(svg(HALVES, attributes), size=100).size == size


def test_svg_that_draws_nothing_and_has_no_size():
    assert open_image(svg("", ""), size=100).size == (100, 100)


def test_svg_packed_with_gzip_and_with_a_prologue(tmp_path):
    path = tmp_path / "image.svgz"
    path.write_bytes(gzip.compress(svg(HALVES)))
    assert open_image(path, size=40).getpixel((5, 5)) == RED
    prologue = b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- words -->\n' + svg(HALVES)
    assert open_image(prologue, size=40).getpixel((5, 5)) == RED


def test_svg_in_another_text_encoding():
    text = f'<?xml version="1.0" encoding="utf-16"?>{svg(HALVES).decode()}'
    assert open_image(text.encode("utf-16"), size=40).getpixel((5, 5)) == RED


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (svg(HALVES)[:60], "not well-formed"),
        (svg(HALVES, 'width="0" height="10"'), "cannot be rendered"),
        (b'<?xml version="1.0"?><html/>', "cannot be rendered"),
        (svg("<text>&missing;</text>"), "not well-formed"),
        (gzip.compress(svg(HALVES))[:-20], "damaged gzip"),
        (
            svg(embedded(Image.new("1", (5, 5))).replace("base64,", "base64,AAAA")),
            "cannot identify image file",
        ),
        (svg("<g>" * 5000 + "</g>" * 5000), "maximum recursion depth"),
        # Nested so deeply that the renderer itself crashes.
        (svg("<g>" * 600 + HALVES + "</g>" * 600), "crashes the renderer"),
    ],
)
def test_bad_svg_files(content, reason, tmp_path):
    assert_refused(open_image, content, tmp_path / "bad.svg", reason)
    # The next file is rendered, if need be by a new process.
    assert open_image(svg(HALVES), size=40).getpixel((5, 5)) == RED


@pytest.mark.parametrize(
    "body",
    [
        '<path d="M0,0 99999999999,3.6224"/>',
        '<rect width="1" height="1e30"/>',
        '<g id="a"><use href="#a"/></g>',
    ],
)
def test_absurd_coordinates_and_circles_leave_the_rest(body):
    assert open_image(svg(HALVES + body), size=40).getpixel((35, 15)) == BLUE


def test_an_endless_svg_is_stopped(monkeypatch):
    monkeypatch.setattr(images_module, "MAX_SVG_SECONDS", 0.3)
    with pytest.raises(MediaError, match="takes more than 0.3 seconds"):
        open_image(svg(ENDLESS))
    monkeypatch.undo()
    assert open_image(svg(HALVES), size=40).getpixel((5, 5)) == RED


def test_ctrl_c_stops_an_endless_svg():
    started = time.monotonic()
    timer = threading.Timer(0.3, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        open_image(svg(ENDLESS))
    assert time.monotonic() - started < images_module.MAX_SVG_SECONDS / 2
    assert open_image(svg(HALVES), size=40).getpixel((5, 5)) == RED


def test_the_renderer_ends_even_if_its_parent_was_killed(monkeypatch):
    monkeypatch.setattr(images_module, "MAX_SVG_SECONDS", 1.0)
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        running = images_module._process._running()
        os.write(send, str(running.pid).encode())
        open_image(svg(ENDLESS))
    pid = int(os.read(receive, 100))
    time.sleep(0.3)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_pixels_of_embedded_images_count_together(monkeypatch):
    assert open_image(svg(embedded(Image.new("RGB", (8, 8), BLUE)))).getpixel((200, 100)) == BLUE
    # The header says so much; nothing is decoded.
    with pytest.raises(MediaError, match="embedded images of 144,000,000 pixels; at most 100,000,000"):
        open_image(svg(embedded(Image.new("1", (12_000, 6_000))) * 2))


def test_one_process_serves_all_threads_and_a_forked_child_has_its_own():
    open_image(svg(HALVES))
    pid = images_module._process._popen.pid
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda side: open_image(svg(HALVES), size=side), range(20, 60)))
    assert [image.width for image in images] == list(range(20, 60))
    assert images_module._process._popen.pid == pid
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        image = open_image(svg(HALVES), size=40)
        os.write(send, f"{image.width} {images_module._process._popen.pid}".encode())
        images_module._process.stop()
        os._exit(0)
    os.waitpid(child, 0)
    width, other = map(int, os.read(receive, 100).split())
    assert width == 40
    assert other != pid
    assert open_image(svg(HALVES), size=40).width == 40
    assert images_module._process._popen.pid == pid


def test_a_panic_of_the_renderer_is_an_answer(monkeypatch):
    class PanicException(BaseException): ...

    def panic(**_):
        raise PanicException("index out of range")

    monkeypatch.setattr("resvg_py.svg_to_bytes", panic)
    text, answers = svg(HALVES), io.BytesIO()
    request = svg_renderer.REQUEST.pack(0, 40, 1000, len(text)) + text
    svg_renderer.serve(io.BytesIO(request * 2), answers)
    answer = svg_renderer.ANSWER.pack(svg_renderer.FAILED, 18) + b"index out of range"
    assert answers.getvalue() == answer * 2


def test_gigantic_svg_is_refused_after_unpacking(monkeypatch):
    monkeypatch.setattr("bindllm.media.images.MAX_SVG_BYTES", 1000)
    data = gzip.compress(svg(HALVES + " " * 5000))
    assert len(data) < 1000
    with pytest.raises(MediaError, match="more than 1,000 bytes"):
        open_image(data)


@pytest.mark.parametrize("link", ["{path}", "file://{path}", "http://127.0.0.1:9/a.png"])
@pytest.mark.parametrize("attribute", ["href", "xlink:href"])
def test_svg_reads_nothing_outside_itself(link, attribute, tmp_path):
    Image.new("RGB", (8, 8), BLUE).save(tmp_path / "secret.png")
    address = link.format(path=tmp_path / "secret.png")
    body = f'<image {attribute}="{address}" width="20" height="10"/>'
    names = 'viewBox="0 0 20 10" xmlns:xlink="http://www.w3.org/1999/xlink"'
    assert open_image(svg(body, names)).getpixel((224, 112)) == WHITE


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('<image href="photo.png" width="20" height="10"/>', "images that an SVG links to are not drawn"),
        (
            '<image href="data:image/svg+xml,&lt;svg/>" width="20" height="10"/>',
            "images that an SVG links to",
        ),
        ('<text y="9">Cat</text>', "text of an SVG is drawn in the fonts of this machine"),
    ],
)
def test_parts_that_are_not_drawn_give_one_warning(body, words, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr("bindllm.media.limits._logged", set())
    path = tmp_path / "a.svg"
    path.write_bytes(svg(body))
    open_image(path)
    open_image(svg(HALVES + body))
    assert [record.getMessage().startswith(f"{path}: {words}") for record in caplog.records] == [True]


def test_a_link_in_a_request_is_refused():
    """A client cannot read the log, and would get an answer about an image with holes."""
    source = svg(HALVES + '<image href="photo.png" width="20" height="10"/>')
    budget = Budget(MediaLimits())
    with pytest.raises(MediaError, match="links to other images, which are not read"), decoding_one(budget):
        open_image(source)
    with decoding_one(budget) as warnings:
        assert open_image(svg(HALVES + '<text y="9">Cat</text>'))
    assert [message.partition(" is drawn")[0] for message in warnings] == ["text of an SVG"]


@pytest.mark.parametrize("kind", ["image/jpeg", "image/x-png", ""])
def test_embedded_images_are_drawn_whatever_type_they_are_given(kind, caplog):
    body = embedded(Image.new("RGB", (4, 2), BLUE)).replace("image/png", kind)
    assert open_image(svg(body)).getpixel((224, 112)) == BLUE
    assert not caplog.records


def test_svg_with_many_decimals_is_drawn():
    body = '<path d="M0,0h10.123456789v.123456789l-.5.1234567,9.87654321H0z" fill="red"/>' + HALVES
    assert open_image(svg(body), size=40).getpixel((5, 5)) == RED


def test_svg_without_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    monkeypatch.setattr(images_module, "_process", images_module._SvgProcess())
    with pytest.raises(MissingExtraError, match=r"pip install 'bindllm\[svg\]'"):
        open_image(svg(HALVES))
