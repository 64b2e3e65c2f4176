"""Figures of the report: their content, and that they load nothing from elsewhere."""

import base64
import io
import math
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from bindllm.errors import MediaError, MissingExtraError
from bindllm.report.page import gate_figure, loss_figure, thumbnail
from tiny import COLORS

TRAINING = [(step, 8 * math.exp(-step / 50) + 3) for step in range(0, 300, 10)]
VALIDATION = [(100, 4.5), (200, 3.6)]


def words(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter("text")]


def test_loss_curves():
    drawn = words(loss_figure(TRAINING, VALIDATION))
    assert {"training", "validation", "step", "loss per token"} <= set(drawn)
    assert "validation" not in words(loss_figure(TRAINING, ()))


@pytest.mark.parametrize("shape", [(6,), (6, 3), (1,), (2, 1)])
def test_gates_by_layer(shape):
    drawn = words(gate_figure(np.linspace(-0.2, 0.1, math.prod(shape)).reshape(shape)))
    assert "layer" in drawn
    assert ("head" in drawn) == (len(shape) == 2)


@pytest.mark.parametrize("svg", [loss_figure(TRAINING, VALIDATION), gate_figure(np.eye(4))])
def test_figures_use_the_colors_of_the_page_and_load_nothing(svg):
    assert "var(--ink)" in svg
    assert not re.search(r"#0[1-9a-f]0", svg)
    assert "http" not in svg
    assert "font-family" not in svg
    assert svg.startswith("<svg viewBox=")


def test_the_same_data_give_the_same_bytes():
    assert loss_figure(TRAINING, VALIDATION) == loss_figure(TRAINING, VALIDATION)
    assert gate_figure(np.eye(4)) == gate_figure(np.eye(4))


def test_thumbnails_are_small_and_keep_the_shape(tmp_path):
    Image.new("RGB", (400, 200), COLORS["red"]).save(tmp_path / "a.png")
    head, _, content = thumbnail(str(tmp_path / "a.png"), size=80).partition(",")
    assert head == "data:image/webp;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert picture.size == (80, 40)
    assert np.abs(np.asarray(picture)[20, 40].astype(int) - COLORS["red"]).max() < 20


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(MediaError, match=r"gone\.png"):
        thumbnail(str(tmp_path / "gone.png"))


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"bindllm\[report\]"):
        gate_figure(np.zeros(3))
