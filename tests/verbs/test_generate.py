"""`bindllm generate`: the media of a command line reach the model, each as what it was said to be."""

from pathlib import Path

import pytest

from bindllm.cli import main
from bindllm.media import MODALITIES, Media
from bindllm.model.bindllm import BindLLM
from bindllm.verbs.generate import SENSES


@pytest.fixture
def asked(monkeypatch):
    """What the model is asked, instead of an answer."""
    calls = []

    class Listener:
        def generate(self, prompt, media, **options):
            calls.append((prompt, media))
            return "heard"

    monkeypatch.setattr(BindLLM, "from_pretrained", lambda *args, **options: Listener())
    return calls


def test_there_is_an_option_for_each_modality():
    assert tuple(SENSES) == MODALITIES


def test_media_of_all_kinds(asked, capsys):
    line = ["generate", "folder", "What?", "--audio", "bark.wav", "--image", "a.png", "--image", "b.png"]
    assert main([*line, "--text", "a dog", "--imu", "walk.csv", "--media", "radar:sweep.npy"]) == 0
    expected = [Media.image("a.png"), Media.image("b.png"), Media.audio("bark.wav"), Media.text("a dog")]
    assert asked == [("What?", [*expected, Media.imu("walk.csv"), Media("radar", "sweep.npy")])]
    assert capsys.readouterr().out == "heard\n"


def test_media_that_do_not_say_what_they_are(asked, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("walk.csv").touch()
    assert main(["generate", "folder", "What?", "--media", "walk.csv"]) == 2
    assert "say what it is, as in depth:walk.csv" in capsys.readouterr().err
    assert not asked
