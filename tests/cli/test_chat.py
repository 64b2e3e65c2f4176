"""`bindllm chat`: turns with media reach the model as one conversation, and no mistake loses it."""

import io
import json
from pathlib import Path

import pytest

from bindllm.cli import main
from bindllm.cli.chat import Chat
from bindllm.conversation import Conversation, Message
from bindllm.media import Media
from bindllm.model.bindllm import BindLLM
from bindllm.shots import Shot
from cache_parts import ALLOW, save_tiny_model
from store_parts import write_images
from tiny import tiny_model


class Listener:
    """Records conversations; answers with the next of the given pieces, of which an exception is raised."""

    cache = None

    def __init__(self, *answers):
        self.asked, self.options, self.answers, self.encoders = [], [], list(answers), [self]
        self.modalities = ("image", "text", "radar")

    def encode(self, media, *, cache, recent):
        for item in media:
            if item.modality != "text" and not Path(item.source).exists():
                raise FileNotFoundError(f"{item.source}: no such file")

    def prepare(self, media):
        """As an encoder: it reads all files."""

    def stream(self, conversation, *, recent, **options):
        self.asked.append(conversation.messages)
        self.options.append(options)
        for piece in self.answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def talk(model, *lines, monkeypatch, **options):
    """Type lines into a chat with a model."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    Chat(model, options).run()


@pytest.fixture
def cat(tmp_path):
    write_images(tmp_path, 1)
    return next(tmp_path.glob("*.png")).rename(tmp_path / "a cat.png")


def test_turns_with_media_are_one_conversation(cat, monkeypatch, capsys):
    model = Listener(["A ", "cat."], ["Red."])
    lines = (
        f"/image {cat}",
        "/text a dog ",
        "What?",
        "",
        f"/image '{cat}' '{cat}'",
        " /path?",
        "/quit",
        "no",
    )
    talk(model, *lines, monkeypatch=monkeypatch, top_p=0.5)
    image = Media.image(str(cat))
    first = Message("user", [image, Media.text("a dog"), "What?"])
    then = (first, Message("assistant", "A cat."), Message("user", [image, image, "/path?"]))
    assert model.asked == [(first,), then]
    assert model.options == [{"top_p": 0.5}] * 2
    told = capsys.readouterr().out
    assert "attached: text 'a dog'" in told
    assert told.endswith("A cat.\n" + f"attached: image {cat}, image {cat}\nRed.\n")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/image missing.png", "missing.png: no such file\nNothing was attached"),
        ("/image cat.png What is it?", "the question is the next line"),
        ("/image", "/image needs a file after it"),
        ("/text", "/text needs words after it"),
        ("/image 'cat.png", "No closing quotation"),
        ("/image https://example.com/cat.png", "a web address"),
        ("/imgae cat.png", "Did you mean 'image'?"),
        ("/audio bark.wav", "Known: clear, help, image, quit, radar, retry, shots, system, text"),
        ("Broken?", "error: gone"),
        ("/retry now", "error: gone"),
        ("/shots missing.jsonl", "missing.jsonl"),
        ("/shots a.jsonl b.jsonl", "/shots takes one table, not 2 files"),
    ],
)
def test_mistakes_keep_the_conversation(line, words, monkeypatch, capsys):
    fails = line in ("Broken?", "/retry now")
    model = Listener(["One."], *[["Tw", OSError("gone")]] * fails, ["Three."])
    talk(model, "First", line, "/text a dog", "Last", monkeypatch=monkeypatch)
    assert words in capsys.readouterr().err
    last = Message("user", [Media.text("a dog"), "Last"])
    assert model.asked[-1] == (Message("user", "First"), Message("assistant", "One."), last)


def test_an_encoder_that_breaks_does_not_end_the_chat(monkeypatch, capsys):
    model = Listener([ZeroDivisionError("x / 0")], ["Fine."])
    talk(model, "First", "/retry", monkeypatch=monkeypatch)
    told = capsys.readouterr()
    assert "ZeroDivisionError: x / 0" in told.err
    assert told.out.endswith("Fine.\n")
    assert model.asked == [(Message("user", "First"),)] * 2


def test_retry_replaces_the_last_answer_and_clear_forgets_it(monkeypatch, capsys):
    model = Listener(["One."], ["Two."], ["Three."], ["Four."])
    lines = ("First", "/retry", "Second", "/text a dog", "/clear", "/retry", "Third")
    talk(model, *lines, monkeypatch=monkeypatch)
    first, second = Message("user", "First"), Message("user", "Second")
    assert model.asked[:3] == [(first,), (first,), (first, Message("assistant", "Two."), second)]
    assert model.asked[3:] == [(Message("user", "Third"),)]
    assert "/retry has no message to ask again" in capsys.readouterr().err


def test_an_interrupted_answer_is_kept_and_an_empty_one_is_not(monkeypatch, capsys):
    model = Listener(["Half", KeyboardInterrupt()], ["One."], [" "], ["Two."])
    talk(model, "First", "Second", "Third", "/retry", monkeypatch=monkeypatch)
    turns = [Message("user", "First"), Message("assistant", "Half"), Message("user", "Second")]
    assert model.asked[1] == tuple(turns)
    assert (
        model.asked[2] == model.asked[3] == (*turns, Message("assistant", "One."), Message("user", "Third"))
    )
    told = capsys.readouterr()
    assert "Half\nstopped\n" in told.out
    assert "no answer: the conversation is as before" in told.err


def test_a_system_text_stands_first_until_it_is_removed(monkeypatch, capsys):
    model = Listener(["One."], ["Two."], ["Three."])
    lines = ("/system Be brief. ", "First", "/clear", "Second", "/system", "Third")
    talk(model, *lines, monkeypatch=monkeypatch)
    system, second = Message("system", "Be brief."), Message("user", "Second")
    assert model.asked[:2] == [(system, Message("user", "First")), (system, second)]
    assert model.asked[2] == (second, Message("assistant", "Two."), Message("user", "Third"))
    assert capsys.readouterr().out.count("no system text") == 1


def test_shots_of_a_table_precede_each_question(tmp_path, cat, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my shots.jsonl").write_text(json.dumps({"image": "a cat.png", "caption": "red"}) + "\n")
    model = Listener(["One."], ["Two."])
    lines = ("/shots my shots.jsonl", "Which color?", "/shots none.jsonl", "/shots", "And now?")
    talk(model, *lines, monkeypatch=monkeypatch)
    shot = Shot("Which color?", "red", [Media.image("a cat.png")])
    assert model.options == [{"shots": [shot]}, {}]
    told = capsys.readouterr()
    assert "worked examples in my shots.jsonl: 1; up to 4 precede a question" in told.out
    assert "only 1 of 4 shots were found" in told.err


def test_media_are_encoded_once_in_a_conversation(decoder, cat, monkeypatch, capsys):
    model = tiny_model(decoder)
    (encoder,), calls = model.encoders, []
    embed = encoder.embed
    monkeypatch.setattr(encoder, "embed", lambda *given, **more: calls.append(given) or embed(*given, **more))
    talk(model, f"/image {cat}", "What?", "And now?", "/retry", monkeypatch=monkeypatch, max_new_tokens=2)
    assert len(calls) == 1


def test_text_of_the_model_cannot_control_the_terminal(monkeypatch, capsys):
    talk(Listener(["\x1b[2J", "gone\n\u202ethere\x07"]), "First", monkeypatch=monkeypatch)
    assert capsys.readouterr().out == "?[2Jgone\n?there?\n"


def test_tab_completes_commands_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a cat.png", "a dog.png", "a \x1b[2J.png", "b.png"):
        Path(name).touch()
    Path("folder").mkdir()
    chat = Chat(Listener(), {})
    assert chat.complete("/r") == ["/radar ", "/retry "]
    assert chat.complete("/image a ") == ["/image a cat.png", "/image a dog.png"]
    assert chat.complete("/radar f") == ["/radar folder/"]
    assert [chat.complete(line) for line in ("/text a", "/clear a", "a")] == [[], [], []]


def test_help_names_the_modalities_of_the_model(monkeypatch, capsys):
    talk(Listener(), "/help", monkeypatch=monkeypatch)
    told = capsys.readouterr().out
    assert all(
        use in told
        for use in (
            "/image FILE",
            "/radar FILE",
            "/text WORDS",
            "/system TEXT  ",
            "/shots FILE",
            "/clear",
            "Ctrl-C",
        )
    )


def test_a_chat_with_a_checkpoint_answers_as_generate_does(tmp_path, cat, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = save_tiny_model(Path("model"), Path("decoder"))
    lines = f"/audio none.wav\n/image {cat}\nWhat?\n/text a dog\nAnd now?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", str(folder), "--allow", ALLOW[0], "--max_new_tokens", "5"]) == 0
    told = capsys.readouterr()
    assert "none.wav" in told.err
    model = BindLLM.from_pretrained(folder, allow=ALLOW)
    messages = [Message("user", [Media.image(str(cat)), "What?"])]
    first = model.generate(Conversation(messages), max_new_tokens=5)
    messages += [Message("assistant", first), Message("user", [Media.text("a dog"), "And now?"])]
    second = model.generate(Conversation(messages), max_new_tokens=5)
    assert [first, second] == [line for line in told.out.splitlines() if "attached" not in line]
