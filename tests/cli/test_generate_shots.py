"""`bindllm generate --shots`: the worked examples that reach the model, and the notes about the others."""

from __future__ import annotations

import json
import shutil
from functools import partial, partialmethod
from pathlib import Path

import pytest

from bindllm.cli import main
from bindllm.media import Media
from bindllm.model.bindllm import BindLLM
from cache_parts import ALLOW, save_tiny_model
from tiny import ColorEncoder, color_images


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two checkpoints, one without texts, and a table of images with their colors."""
    home = tmp_path_factory.mktemp("home")
    save_tiny_model(home / "model", home / "decoder")
    save_tiny_model(home / "images_only", home / "decoder", encoder=ColorEncoder())
    color_images(home)
    rows = [
        {"image": f"images/{color}{n}.png", "question": f"Is number {n} {color}?", "answer": color}
        for n in range(2)
        for color in ("red", "blue")
    ]
    (home / "vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


@pytest.fixture
def ask(home, monkeypatch, capsys):
    """Run the command in the folder, and return the given shots, its output and its notes."""
    monkeypatch.chdir(home)
    calls = []

    def listen(method, self, prompt, media=None, **options):
        calls.append(options.get("shots"))
        return method(self, prompt, media, **options)

    for name in ("generate", "stream"):
        monkeypatch.setattr(BindLLM, name, partialmethod(partial(listen, getattr(BindLLM, name))))

    def run(*words, model="model", code=0):
        allow = [word for name in ALLOW for word in ("--allow", name)]
        line = ["generate", model, "Color?", "--max_new_tokens", "3", *allow, *words]
        assert main(line) == code
        out, err = capsys.readouterr()
        return calls.pop() if calls else None, out, err

    return run


def answers(shots):
    return [shot.answer for shot in shots]


def test_the_first_rows_of_a_table_of_captions(ask):
    shots, out, err = ask("--image", "images/blue3.png", "--shots", "captions.jsonl", "--num_shots", "2")
    assert answers(shots) == ["red square"] * 2
    assert {shot.prompt for shot in shots} == {"Color?"}
    assert shots[0].media == (Media.image("images/red0.png"),)
    assert (out.count("\n"), err) == (1, "")


def test_rows_of_another_format_bring_their_own_questions(ask):
    shots, _, err = ask("--shots", "vqa.jsonl", "--shots_format", "vqa", "--num_shots", "9")
    assert [shot.prompt for shot in shots][:2] == ["Is number 0 red?", "Is number 0 blue?"]
    assert "only 4 of 9 shots were found" in err


def test_the_nearest_by_media_by_text_and_by_both(ask):
    given = (
        "--image",
        "images/blue3.png",
        "--shots",
        "vqa.jsonl",
        "--shots_format",
        "vqa",
        "--num_shots",
        "3",
    )
    assert answers(ask(*given, "--shots_by", "media")[0]) == ["red", "blue", "blue"]
    assert answers(ask(*given, "--shots_by", "media", "--nearest_first")[0]) == ["blue", "blue", "red"]
    assert len(ask(*given, "--shots_by", "text")[0]) == 3
    assert len(ask(*given, "--shots_by", "media_text")[0]) == 3
    # Their embeddings are kept.
    assert Path("data/store").is_dir()


def test_the_seed_draws_random_shots(ask):
    given = ("--shots", "captions.jsonl", "--shots_by", "random", "--num_shots", "5")
    first, again, other = (ask(*given, "--seed", seed)[0] for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_the_image_of_the_question_is_never_a_shot(ask):
    shutil.copy("images/red0.png", "copy.png")
    shots, _, err = ask("--image", "copy.png", "--shots", "captions.jsonl", "--num_shots", "2")
    assert [shot.media[0].name for shot in shots] == ["images/red1.png", "images/red2.png"]
    assert "captions.jsonl: skipped 1 x the question itself" in err


def test_a_stream_has_shots_too(ask):
    given = ("--image", "images/blue3.png")
    plain = ask(*given, "--shots", "captions.jsonl")
    assert len(plain[0]) == 4
    assert ask(*given, "--shots", "captions.jsonl", "--stream") == plain


def test_no_shots_are_the_same_answer_as_none(ask):
    given = ("--image", "images/blue3.png")
    assert ask(*given, "--shots", "captions.jsonl", "--num_shots", "0")[:2] == ([], ask(*given)[1])


def test_rows_that_cannot_be_used_are_printed(ask):
    Path("some.jsonl").write_text(
        '{"image": "images/red0.png", "caption": "red"}\n{"image": "images/red1.png"}\n'
    )
    shots, _, err = ask("--shots", "some.jsonl", "--num_shots", "1")
    assert answers(shots) == ["red"]
    assert "some.jsonl: skipped 1 x " in err


def test_files_that_are_missing_or_broken(ask):
    Path("images/broken.png").write_bytes(b"no image")
    rows = [{"image": f"images/{name}.png", "caption": name} for name in ("red0", "gone", "broken", "blue0")]
    Path("gone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--image", "images/blue3.png", "--shots", "gone.jsonl", "--num_shots", "3")
    shots, _, err = ask(*given, "--shots_by", "media")
    assert answers(shots) == ["red0", "blue0"]
    assert "gone.jsonl: skipped 1 x no such image file (gone.jsonl line 2: images/gone.png)" in err
    assert "gone.jsonl: skipped a shot: images/broken.png" in err
    # Also those that are not embedded first.
    for by in ("order", "text", "random"):
        shots, _, err = ask(*given, "--shots_by", by)
        assert sorted(answers(shots)) == ["blue0", "red0"]
        assert "gone.jsonl: skipped a shot: images/broken.png" in err
        assert "only 2 of 3 shots were found" in err


def test_the_question_is_not_stored(ask):
    given = ("--shots", "captions.jsonl", "--shots_by", "media", "--store", "other")
    ask("--image", "images/blue3.png", *given)
    (folder,) = Path("other").iterdir()
    before = sorted(folder.iterdir())
    Path("new.png").write_bytes(Path("images/blue3.png").read_bytes() + b" ")
    shots, _, _ = ask("--image", "new.png", *given)
    assert answers(shots)[-1] == "blue square"
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_shots", "2"], "--num_shots needs worked examples: give --shots TABLE"),
        (["--shots_by", "media"], "--shots_by needs worked examples"),
        (["--shots", "captions.jsonl", "--nearest_first"], "--nearest_first needs the nearest shots"),
        (
            ["--shots", "captions.jsonl", "--shots_by", "random", "--store", "s"],
            "--store needs the nearest shots",
        ),
        (
            ["--shots", "captions.jsonl", "--shots_by", "media"],
            "the question has none: give it one, as --image FILE",
        ),
        (["--shots", "captions.jsonl", "--shots_by", "closest"], "--shots_by"),
        (["--shots", "captions.jsonl", "--num_shots", "-1"], "--num_shots"),
    ],
)
def test_mistakes_on_the_command_line(ask, words, message):
    assert message in ask(*words, code=2)[2]


def test_by_text_needs_an_encoder_of_texts(ask):
    words = ("--image", "images/blue3.png", "--shots", "captions.jsonl", "--shots_by", "text")
    err = ask(*words, model="images_only", code=2)[2]
    assert "no encoder of the model serves texts, only image: use --shots_by media" in err


def test_a_table_that_is_not_there(ask):
    assert "nowhere.jsonl does not exist" in ask("--shots", "nowhere.jsonl", code=1)[2]


def test_a_folder_for_each_class_is_a_table_of_shots(ask, home):
    for color, name in (("red", "dax"), ("blue", "wug")):
        (home / "toys" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(home / "images" / f"{color}1.png", home / "toys" / name)
    words = ["--image", "images/red0.png", "--shots", "toys", "--shots_by", "media", "--num_shots", "2"]
    shots, _, _ = ask(*words)
    assert answers(shots) == ["wug", "dax"]
    assert {shot.prompt for shot in shots} == {"Color?"}


def test_rows_of_an_untrusted_table_stay_in_its_folder(ask, home):
    (home / "inner").mkdir()
    (home / "inner" / "own.png").write_bytes((home / "images" / "red1.png").read_bytes())
    rows = [{"image": "../images/blue1.png", "caption": "blue"}, {"image": "own.png", "caption": "red"}]
    (home / "inner" / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--image", "images/red0.png", "--shots", "inner/shots.jsonl"]
    assert len(ask(*words)[0]) == 2
    shots, _, notes = ask(*words, "--shots_inside_only")
    assert answers(shots) == ["red"]
    assert "outside" in notes
    assert "--shots_inside_only needs worked examples" in ask("--shots_inside_only", code=2)[2]
