"""`bindllm serve`: refusals before the model is loaded, and a real process that finishes its answers at SIGTERM."""

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from bindllm.cli import main
from bindllm.media.limits import MediaLimits
from bindllm.model.bindllm import BindLLM
from bindllm.serving.app import build_app
from bindllm.serving.config import KEYS_VARIABLE, Limits, ServeConfig
from bindllm.serving.fetch import FetchConfig
from bindllm.serving.server import bind, build_server
from cache_parts import ALLOW, save_tiny_model
from serving_parts import FakeEngine, image_part

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def never_loaded(monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    monkeypatch.setattr(BindLLM, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))


def test_other_machines_need_a_key(capsys, tmp_path):
    assert main(["serve", "folder", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "needs API keys: give --api_keys FILE" in capsys.readouterr().err
    (tmp_path / "keys").write_text("\n")
    assert main(["serve", "folder", "--api_keys", str(tmp_path / "keys")]) == 1
    assert "has no API key" in capsys.readouterr().err
    assert main(["serve", "folder", "--download_domains", "http://a.example"]) == 1
    assert "a domain is a host" in capsys.readouterr().err


def test_every_limit_is_an_option_with_its_unit(capsys, monkeypatch):
    given = {}
    monkeypatch.setattr("bindllm.cli.serve.load_with_cache", lambda *_: "model")
    monkeypatch.setattr("bindllm.serving.engine.Engine", lambda model, **options: given.update(options))
    monkeypatch.setattr("bindllm.serving.app.build_app", lambda engine, config: given.update(config=config))
    monkeypatch.setattr("bindllm.serving.server.run", lambda *_, drain, **__: given.update(drained=drain))
    words, groups = ["serve", "folder", "--port", "0"], {}
    for group, prefix in ((Limits(), ""), (MediaLimits(), "media_"), (FetchConfig(), "download_")):
        values = {name: value + 1 for name, value in vars(group).items() if not isinstance(value, tuple)}
        words += [word for name, value in values.items() for word in (f"--{prefix}{name}", str(value))]
        groups[prefix] = values
    assert main([*words, "--download_domains", "a.example"]) == 0
    assert given["config"] == ServeConfig(
        "folder", **groups[""], fetch=FetchConfig(("a.example",), **groups["download_"])
    )
    assert given["limits"] == MediaLimits(**groups["media_"])
    sizes = {"slots": 17, "queue": 129, "tokens": 32_769, "prefill": 513, "drained": 61}
    assert {name: given[name] for name in sizes} == sizes
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for word in words[4::2]:
        assert re.search(rf"{word} N [a-z]", text), word
    assert "(default: 50_000_000)" in text


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--slots", "0"], "slots is 0, expected more than 0"),
        (["--timeout", "nan"], "--timeout"),
        (["--media_pixels", "0"], "pixels is 0"),
        (["--download_redirects", "-1"], "redirects at least 0"),
    ],
)
def test_limits_that_mean_nothing_are_refused_before_the_model_is_loaded(words, error, capsys):
    assert main(["serve", "folder", *words]) in (1, 2)
    assert error in capsys.readouterr().err


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for localhost, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("the command openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    files = str(folder / "cert.pem"), str(folder / "key.pem")
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    more = ["-addext", "subjectAltName=DNS:localhost", "-out", files[0], "-keyout", files[1]]
    subprocess.run([*words.split(), *more], check=True, capture_output=True)
    return files


def test_a_certificate_that_cannot_be_used(certificate, capsys, tmp_path):
    (tmp_path / "empty.pem").touch()
    for words, error in (
        (["--ssl_keyfile", certificate[1]], "needs a certificate"),
        (["--ssl_certfile", certificate[0]], "cannot be used with its key"),
        (["--ssl_certfile", str(tmp_path / "none.pem")], "No such file"),
        (["--ssl_certfile", str(tmp_path / "empty.pem"), "--ssl_keyfile", certificate[1]], "cannot be used"),
    ):
        assert main(["serve", "folder", "--port", "0", *words]) == 2
        assert error in capsys.readouterr().err


def test_https_with_a_certificate_of_ones_own(certificate, capsys):
    engine = FakeEngine()
    bound = bind("127.0.0.1", 0)
    app = build_app(engine, ServeConfig("tiny", keys=("key",)))
    server = build_server(app, engine, bound, drain=1, name="tiny", certificate=certificate)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = bound.getsockname()[1]
    assert f"tiny at https://127.0.0.1:{port}" in capsys.readouterr().out
    trusted = ssl.create_default_context(cafile=certificate[0])
    assert httpx.get(f"https://localhost:{port}/ready", verify=trusted).json() == {"status": "ready"}
    assert httpx.get(f"https://localhost:{port}/v1/models", verify=trusted).status_code == 401
    for address in (f"https://localhost:{port}/ready", f"http://localhost:{port}/ready"):
        with pytest.raises(httpx.TransportError):
            httpx.get(address)
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def test_a_port_that_is_in_use(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "folder", "--port", str(taken.getsockname()[1])]) == 2
    assert "in use" in capsys.readouterr().err


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The process of a server, and its address."""
    home = tmp_path_factory.mktemp("server")
    save_tiny_model(home / "tiny", home / "decoder")
    words = [sys.executable, "-m", "bindllm.cli", "serve", "tiny", "--port", "0", "--allow", ALLOW[0]]
    source = TESTS.parent / "src"
    paths = {"PYTHONPATH": os.pathsep.join([str(source), str(TESTS)])}
    process = subprocess.Popen(
        words, cwd=home, env={**os.environ, **paths}, stdout=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    assert line.startswith("tiny at http://127.0.0.1:"), process.wait()
    yield process, line.split()[2].rstrip(":")
    process.kill()
    process.stdout.close()


def test_openai_python_works_unchanged(server):
    from openai import BadRequestError, OpenAI

    _, address = server
    client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
    (entry,) = client.models.list().data
    assert (entry.id, entry.modalities) == ("tiny", ["audio", "image", "text"])
    options = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [image_part(), {"type": "text", "text": "Hi"}]}],
    }
    answer = client.chat.completions.create(**options, max_tokens=9, logprobs=True, top_logprobs=1)
    stream = client.chat.completions.create(
        **options, max_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content
    assert last.usage == answer.usage
    # Nine tokens, of which an end token is not part of the text.
    assert len(answer.choices[0].logprobs.content) >= answer.usage.completion_tokens - 1
    response = client.responses.create(model="tiny", input="Hi", max_output_tokens=4)
    assert response.usage.output_tokens == 4 or response.status == "completed"
    events = [event.type for event in client.responses.create(model="tiny", input="Hi", stream=True)]
    assert events[0] == "response.created"
    assert events[-1] in ("response.completed", "response.incomplete")
    # The client asks for base64 by itself.
    rows = client.embeddings.create(model="tiny", input=["a dog", "a cat"]).data
    assert [len(row.embedding) for row in rows] == [16, 16]
    with pytest.raises(BadRequestError, match="cannot use tools with this model"):
        client.chat.completions.create(**options, tools=[{"type": "function", "function": {"name": "f"}}])


def test_sigterm_finishes_the_running_answer_and_refuses_others(server):
    process, address = server
    seen, started = [], threading.Event()

    def ask():
        body = {
            "messages": [{"role": "user", "content": "Hi"}],
            "stream": True,
            "max_tokens": 400,
            "temperature": 1,
        }
        # A sampled answer of a random decoder nearly never ends by itself.
        with httpx.stream(
            "POST", f"{address}/v1/chat/completions", json={**body, "seed": 1}, timeout=60
        ) as answer:
            for line in answer.iter_lines():
                if line:
                    seen.append(line.removeprefix("data: "))
                    started.set()

    client = threading.Thread(target=ask)
    client.start()
    assert started.wait(120)
    process.send_signal(signal.SIGTERM)
    while (ready := httpx.get(f"{address}/ready", timeout=60)).status_code == 200:
        pass
    assert ready.status_code == 503
    refused = httpx.post(
        f"{address}/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]}
    )
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
    client.join(120)
    assert seen[-1] == "[DONE]"
    assert json.loads(seen[-2])["choices"][0]["finish_reason"] in ("length", "stop")
    assert process.wait(60) == 0
