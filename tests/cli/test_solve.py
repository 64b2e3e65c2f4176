"""`bindllm solve`: the command from checkpoint to trace, its failures, and an MCP server of the SDK as tools."""

import sys
import threading

import pytest

from bindllm.cli import main
from bindllm.reasoning.brain import Reply
from bindllm.reasoning.mcp import McpError, McpTools
from bindllm.reasoning.solver import ScriptedBrain
from tiny import color_images, save_tiny_decoder, tiny_model

SERVER = """
import io
from PIL import Image as Pixels
from mcp.server import MCPServer
from mcp.server.mcpserver import Image
from mcp.types import EmbeddedResource, ResourceLink, TextResourceContents

app = MCPServer("test")

@app.tool(name="math.add")
def add(a: int, b: int) -> int:
    "Add two numbers."
    return a + b

@app.tool()
def broken() -> str:
    "Fail."
    raise ValueError("no data")

@app.tool()
def resource() -> EmbeddedResource:
    "Give a text of a file."
    content = TextResourceContents(uri="file:///a.txt", text="inside", mimeType="text/plain")
    return EmbeddedResource(type="resource", resource=content)

@app.tool()
def link() -> ResourceLink:
    "Give the address of a file."
    return ResourceLink(type="resource_link", name="a", uri="file:///a.txt")

@app.tool()
def image() -> Image:
    "Give an image."
    content = io.BytesIO()
    Pixels.new("RGB", (8, 4)).save(content, "PNG")
    return Image(data=content.getvalue(), format="png")

app.run()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solve")
    save_tiny_decoder(folder / "decoder", max_position_embeddings=8192)
    tiny_model(folder / "decoder").save_pretrained(folder / "tiny")
    color_images(folder, per_color=1)
    return folder


@pytest.fixture
def scripted(monkeypatch):
    """Let a script plan instead of the random decoder."""

    def script(*replies):
        monkeypatch.setattr("bindllm.reasoning.solver.LocalBrain", lambda model: ScriptedBrain(replies))

    return script


def line(folder, *options):
    return ["solve", str(folder / "tiny"), "Which color?", "--allow", "tiny.ColorEncoder",
            "--image", str(folder / "images" / "red0.png"), *options]  # fmt: skip


LOOK = Reply("", (("ask", {"media": "image1", "question": "Which color?"}),), tokens=4)


def test_the_answer_is_printed_and_the_trace_written_and_shown_again(folder, scripted, capsys, tmp_path):
    scripted(LOOK, Reply("It is red."))
    files = [str(tmp_path / name) for name in ("trace.html", "trace.jsonl")]
    assert main(line(folder, "--trace", files[0], "--trace", files[1])) == 0
    printed = capsys.readouterr()
    assert printed.out == "It is red.\n"
    assert 'result1 = ask(media="image1", question="Which color?")' in printed.err
    assert "data:image/webp" in (tmp_path / "trace.html").read_text()
    assert main(["solve", files[1], "--trace", str(tmp_path / "trace.txt")]) == 0
    assert "answer    It is red." in capsys.readouterr().out
    assert "answer    It is red." in (tmp_path / "trace.txt").read_text()


def test_a_failure_is_an_exit_code_and_a_trace(folder, scripted, capsys, tmp_path):
    scripted(Reply("It is red."), Reply("It is red."))
    assert main(line(folder, "--trace", str(tmp_path / "trace.jsonl"))) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "failed    unusable: two replies in a row cannot be used" in printed.err
    assert '"failure"' in (tmp_path / "trace.jsonl").read_text()


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["nowhere"], "give a question", 2),
        (["nowhere", "?", "--trace", "a.pdf"], "the ending names the form", 2),
        (["nowhere", "?", "--brain", "http://localhost"], "belong together", 2),
        (["missing.jsonl", "?"], "give none", 2),
        (["missing.jsonl"], "cannot be read as a trace", 1),
        (["nowhere", "?", "--budget_rounds", "0"], "expected more than 0", 1),
        (["nowhere", "?", "--retrieve_from", "nowhere"], "not the folder of a datastore", 1),
        (["nowhere", "?", "--mcp", "missing-command"], "cannot be used: ", 1),
        (["nowhere", "?"], "nowhere", 1),
    ],
)
def test_mistakes_are_explained(words, message, code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["solve", *words]) == code
    assert message in capsys.readouterr().err


def test_the_tools_of_an_mcp_server(folder, scripted, capfd, tmp_path):
    (tmp_path / "server.py").write_text(SERVER)
    command = f"{sys.executable} {tmp_path / 'server.py'}"
    calls = [
        ("math_add", {"a": 2, "b": 3}),
        ("broken", {}),
        ("image", {}),
        ("ask", {"media": "result4", "question": "?"}),
        ("resource", {}),
        ("link", {}),
    ]
    scripted(
        LOOK,
        Reply(
            "", (*calls, ("math_add", {"a": 2}), ("calculate", {"operation": "add", "a": "result2", "b": 1}))
        ),
        Reply("Done."),
    )
    assert main(line(folder, "--mcp", command)) == 0
    printed = capfd.readouterr().err
    assert "-> result2: 5 " in printed
    assert "-> result3: error: " in printed
    assert "Error executing tool broken" in printed
    assert "-> result4: image <" in printed
    assert "-> result9: 6 " in printed
    assert "-> result5: error" not in printed
    assert "-> result6: inside" in printed
    assert "-> result7: error: the tool returned a resource_link, expected text, an image or audio" in printed
    assert "-> result8: error: 'b' is a required property" in printed


def test_work_that_still_runs_does_not_change_the_exit_code(folder, monkeypatch, capsys):
    released = threading.Event()
    left, leave = [], []
    monkeypatch.setattr("bindllm.cli.solve.atexit.register", lambda *given: leave.append(given))
    monkeypatch.setattr("bindllm.cli.solve.os._exit", left.append)

    class Hanging(ScriptedBrain):
        def reply(self, *_, **__):
            released.wait(30)

    monkeypatch.setattr("bindllm.reasoning.solver.LocalBrain", lambda model: Hanging([]))
    assert main(line(folder, "--budget_seconds", "0.5")) == 1
    ((end, code),) = leave
    end(code)
    released.set()
    assert left == [1]


def test_an_mcp_server_that_cannot_be_used():
    with pytest.raises(McpError, match="cannot be used"):
        McpTools("http://127.0.0.1:9/mcp")
