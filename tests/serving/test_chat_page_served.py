"""The chat page on the real server and a tiny model: the answers of the page are those of `BindLLM.generate`."""

import threading
import time
from pathlib import Path

import pytest
import uvicorn

from bindllm import Media, VisualCache
from bindllm.conversation import Conversation, Message
from bindllm.model.bindllm import BindLLM
from bindllm.serving.app import build_app
from bindllm.serving.config import ServeConfig
from bindllm.serving.engine import Engine
from browser import open_browser
from cache_parts import ALLOW, filled_store, save_tiny_model
from store_parts import write_images


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A model with a visual cache, the address of its server, and the images of the cache."""
    pytest.importorskip("faiss")
    home = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        folder = save_tiny_model(home / "model", home / "decoder")
        images = write_images(home / "images", 6)
        cache = VisualCache.build(home / "cache", filled_store(home / "store", images), top_k=2)
        model = BindLLM.from_pretrained(folder, allow=ALLOW, cache=cache)
    engine = Engine(model)
    app = build_app(engine, ServeConfig("tiny", max_body_mib=1))
    server = uvicorn.Server(uvicorn.Config(app, port=0, ws="none", lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield model, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/", images
    server.should_exit = True
    thread.join(10)
    engine.close(drain=0)


@pytest.fixture(scope="module")
def page(served):
    with open_browser() as browser:
        browser.resize(1000, 800)
        browser.open(served[1])
        browser.wait("document.querySelector('#model').textContent === 'tiny'")
        yield browser


def ask(page, text, *files):
    """Return the answer to a message; it is complete when its tools are there."""
    if files:
        page.type("#files", "\n".join(map(str, files)))
        page.wait("document.querySelectorAll('#attached li').length === arguments[0]", len(files))
    count = page.run("document.querySelectorAll('.turn.model').length")
    page.type("#text", text + "\ue007")
    page.wait(
        "return document.querySelectorAll('.turn.model').length === arguments[0]"
        " && !document.querySelector('.answering')",
        count + 1,
    )
    return page.run(
        "[...document.querySelectorAll('.turn.model')].at(-1).querySelector('p.text')?.textContent"
    )


def test_a_conversation_has_the_answers_of_generate(page, served, tmp_path):
    model, _, images = served
    page.click("#open-settings")
    page.type("#max-tokens", "8")
    page.click("#close-settings")
    sound = tmp_path / "bark.wav"
    sound.write_bytes(b"any bytes: the encoder of this model hashes them")
    first = ask(page, "What is it?", images[0].source)
    second = ask(page, "And this?", sound)
    messages = [Message("user", [images[0], "What is it?"])]
    expected = model.generate(Conversation(messages), max_new_tokens=8)
    assert first.strip() == expected
    # The page sends the answer as it came, with its white space.
    messages += [Message("assistant", first), Message("user", [Media.audio(sound.read_bytes()), "And this?"])]
    assert second.strip() == model.generate(Conversation(messages), max_new_tokens=8)
    # The cache blends images into the sound, and names them.
    page.wait(
        "[...document.querySelectorAll('.neighbors img')].filter(one => one.naturalWidth > 0).length === 2"
    )
    names = page.run("[...document.querySelectorAll('.neighbors .name')].map(one => one.textContent)")
    assert set(names) <= {Path(image.source).name for image in images}
    assert page.log() == []


def test_refusals_of_the_server_are_shown(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "large.wav").write_bytes(bytes(1 << 20))
    ask(page, "What?", tmp_path / "broken.png")
    problem = page.text(".turn .problem[role=alert]")
    assert problem.startswith("The server refused this message: broken.png: not an image")
    ask(page, "What?", tmp_path / "large.wav")
    assert "too large for this server" in page.text(".turn .problem[role=alert]")
