"""The chat page in a real Chromium: media, streams, stop, retry, errors, and nothing but text from the model."""

import base64
import io
import struct
import threading
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from browser import open_browser
from chat_server import ChatServer

ENTER, SHIFT, ESCAPE, TAB = "\ue007", "\ue008", "\ue00c", "\ue004"


@pytest.fixture(scope="module")
def browser():
    with open_browser() as window:
        window.resize(1100, 800)
        yield window


@pytest.fixture
def server():
    with ChatServer() as running:
        yield running
        running.shutdown()


@pytest.fixture
def page(browser, server):
    browser.open(server.address)
    browser.wait("document.querySelector('#model').textContent === 'tiny'")
    yield browser
    # No violation of the policy and no error of a script, except answers of the server that tests ask for.
    assert [line for line in browser.log() if "the server responded with a status" not in line] == []


def ask(page, text):
    page.type("#text", text)
    page.press(ENTER)


def answered(page, count=1):
    """Wait until the last of some answers is complete, and return it."""
    page.wait(
        "return document.querySelectorAll('.turn.model').length === arguments[0]"
        " && !document.querySelector('.answering')",
        count,
    )
    return page.run("[...document.querySelectorAll('.turn.model p.text')].at(-1)?.textContent")


def attach(page, *files):
    before = page.run("document.querySelectorAll('#attached li').length")
    page.type("#files", "\n".join(map(str, files)))
    page.wait("document.querySelectorAll('#attached li').length === arguments[0]", before + len(files))


def give(page, event, name):
    """Drop or paste a file that holds one letter."""
    page.run(
        "const files = new DataTransfer(); files.items.add(new File(['x'], arguments[1]));"
        "const [Kind, key] = arguments[0] === 'paste'"
        " ? [ClipboardEvent, 'clipboardData'] : [DragEvent, 'dataTransfer'];"
        "document.body.dispatchEvent("
        "new Kind(arguments[0], {bubbles: true, cancelable: true, [key]: files})); return 1",
        event,
        name,
    )


def write_files(folder: Path) -> dict[str, Path]:
    """Write a file of each kind that the page previews."""
    Image.new("RGB", (60, 40), "teal").save(folder / "cat.png")
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60)).save(folder / "room.png")
    with wave.open(str(folder / "bark.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    cloud = np.random.default_rng(0).normal(size=(500, 3)).astype("<f4")
    header = "ply\nformat binary_little_endian 1.0\nelement vertex 500\n"
    names = "".join(f"property float {axis}\n" for axis in "xyz")
    (folder / "chair.ply").write_bytes((header + names + "end_header\n").encode() + cloud.tobytes())
    header = (
        "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 500\nHEIGHT 1\n"
    )
    header += "VIEWPOINT 0 0 0 1 0 0 0\nPOINTS 500\nDATA binary\n"
    (folder / "scan.pcd").write_bytes(header.encode() + cloud.tobytes())
    np.save(folder / "points.npy", cloud)
    np.save(folder / "warm.npy", np.linspace(0, 1, 2400).reshape(40, 60))
    rows = "\n".join(
        ",".join(f"{value:.3f}" for value in row) for row in np.random.default_rng(1).normal(size=(200, 6))
    )
    (folder / "walk.csv").write_text("acc_x,acc_y,acc_z,gyro_x,gyro_y,gyro_z\n" + rows)
    return {file.name: file for file in folder.iterdir()}


def test_turns_stream_and_become_one_conversation(page, server):
    more = threading.Event()
    server.answers = [["A ", "red ", more, "car."], ["Two."]]
    ask(page, "What is it?")
    page.wait("document.querySelector('.model p.text')?.textContent === 'A red '")
    assert page.run("document.querySelector('.turn.model').ariaBusy") == "true"
    assert page.run("document.querySelector('#send').hidden") is True
    more.set()
    assert answered(page) == "A red car."
    assert page.run("document.querySelector('#announcer').textContent").strip() == "A red car."
    page.type("#text", "How many")
    page.press(SHIFT, ENTER)
    ask(page, "wheels?")
    assert answered(page, 2) == "Two."
    first = {"role": "user", "content": [{"type": "text", "text": "What is it?"}]}
    second = {"role": "user", "content": [{"type": "text", "text": "How many\nwheels?"}]}
    assert server.asked[0] == {"model": "tiny", "messages": [first], "stream": True}
    assert server.asked[1]["messages"] == [first, {"role": "assistant", "content": "A red car."}, second]


def test_media_of_every_kind_have_previews_and_reach_the_server(page, server, tmp_path):
    files = write_files(tmp_path)
    attach(page, *files.values())
    server.answers = [["Many."]]
    chosen = page.run(
        "return Object.fromEntries([...document.querySelectorAll('#attached li')].map(item =>"
        " [item.querySelector('.name').textContent, (item.querySelector('select') ?? {}).value"
        " ?? item.querySelector('.kind').textContent]))"
    )
    assert chosen == {
        **{"cat.png": "image", "room.png": "depth", "bark.wav": "audio", "chair.ply": "point"},
        **{"scan.pcd": "point", "points.npy": "point", "warm.npy": "depth", "walk.csv": "imu"},
    }
    page.run(
        "const kinds = [...document.querySelectorAll('#attached li')].find(item => item.innerText.includes('warm'))"
        ".querySelector('select'); kinds.value = 'thermal'; kinds.dispatchEvent(new Event('change')); return 1"
    )
    # Each canvas has more than one color once it is drawn.
    page.wait(
        "const drawn = [...document.querySelectorAll('#attached canvas')].map(canvas => new Set(new Uint32Array("
        "canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size > 2);"
        "return drawn.length === 6 && drawn.every(Boolean)"
    )
    assert page.run("[...document.querySelectorAll('#attached .plain')].map(one => one.textContent)") == []
    ask(page, "What are these?")
    assert answered(page) == "Many."
    *media, text = server.asked[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": "What are these?"}
    sent = {}
    for part in media:
        value = part[part["type"]]
        uri = value if isinstance(value, str) else value.get("url") or "," + value["data"]
        sent.setdefault(part["type"], []).append(base64.b64decode(uri.partition(",")[2]))
    assert {kind: len(values) for kind, values in sent.items()} == {
        **{"image_url": 1, "depth": 1, "input_audio": 1, "point": 3, "thermal": 1, "imu": 1}
    }
    assert sent["image_url"] == [files["cat.png"].read_bytes()]
    assert sent["input_audio"] == [files["bark.wav"].read_bytes()]
    assert files["chair.ply"].read_bytes() in sent["point"]
    # bindllm does not read PCD, so its points are sent as an array.
    arrays = [np.load(io.BytesIO(value)) for value in sent["point"] if value.startswith(b"\x93NUMPY")]
    assert len(arrays) == 2
    assert all(np.array_equal(array, np.load(files["points.npy"])) for array in arrays)
    assert page.run("document.querySelectorAll('.turn.you .media figure').length") == 8


def compress(content: bytes) -> bytes:
    """Compress by LZF: a run of up to 32 bytes, then copies of three bytes of a zero run."""
    runs = b"".join(
        bytes([len(run) - 1]) + run for run in (content[i : i + 32] for i in range(0, len(content), 32))
    )
    return struct.pack("<II", len(runs), len(content)) + runs


def test_point_files_of_other_layouts(page, tmp_path):
    axes = np.arange(30, dtype="<f4").reshape(3, 10)
    head = (
        "VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 10\nHEIGHT 1\nPOINTS 10\nDATA "
    )
    text = "\n".join(" ".join(map(str, row)) for row in axes.T)
    ply = "ply\nformat ascii 1.0\nelement vertex 10\nproperty float x\nproperty float y\nproperty float z\n"
    ply += "property uchar red\nproperty uchar green\nproperty uchar blue\nend_header\n"
    files = {
        "packed.pcd": head.encode() + b"binary_compressed\n" + compress(axes.tobytes()),
        "text.pcd": f"{head}ascii\n{text}\n".encode(),
        "colors.ply": (ply + "\n".join(f"{line} 255 0 0" for line in text.split("\n"))).encode(),
        "mesh.obj": "".join(f"v {line}\n" for line in text.split("\n")).encode(),
        "rows.xyz": text.encode(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    read = (
        "return import('/formats.js').then(async ({readPoints}) => {const {xyz, rgb} = readPoints(arguments[0],"
        "Uint8Array.from(atob(arguments[1]), letter => letter.charCodeAt(0)).buffer);"
        "return [[...xyz], rgb && [...rgb]]})"
    )
    for name, content in files.items():
        xyz, rgb = page.run(read, name, base64.b64encode(content).decode())
        assert xyz == axes.T.flatten().tolist(), name
        assert rgb == ([255, 0, 0] * 10 if name == "colors.ply" else None)
    (tmp_path / "cut.ply").write_bytes(files["colors.ply"][:60])
    attach(page, tmp_path / "cut.ply")
    page.wait("document.querySelector('#attached .plain')?.textContent.startsWith('No preview')")
    (tmp_path / "cut.pcd").write_bytes(files["packed.pcd"][:150])
    attach(page, tmp_path / "cut.pcd")
    ask(page, "What?")
    page.wait("document.querySelector('.turn .problem')")
    assert page.text(".turn .problem").startswith("cut.pcd cannot be read:")


def test_dropped_and_pasted_files(page, server):
    give(page, "dragover", "a.png")
    assert page.run("document.querySelector('#drop').hidden") is False
    give(page, "drop", "a.png")
    give(page, "paste", "b.png")
    page.wait("document.querySelectorAll('#attached li').length === 2")
    assert page.run("document.querySelector('#drop').hidden") is True
    assert page.label("#attached li button") == "Remove a.png"
    page.click("#attached li button")
    assert page.run("[...document.querySelectorAll('#attached .name')].map(one => one.textContent)") == [
        "b.png"
    ]


def test_stop_frees_the_server_and_keeps_the_text(page, server):
    server.answers = [["Half", threading.Event(), "never"], ["Whole."], ["Next."]]
    ask(page, "Tell me.")
    page.wait("document.querySelector('.model p.text')?.textContent === 'Half'")
    page.press(ESCAPE)
    assert answered(page) == "Half"
    assert server.left.wait(10)
    assert page.text(".turn.model .note") == "Stopped."
    page.click(".turn.model button[aria-label='Ask for another answer']")
    page.wait("document.querySelector('.model p.text')?.textContent === 'Whole.'")
    assert answered(page) == "Whole."
    ask(page, "And?")
    assert answered(page, 2) == "Next."
    assert [len(body["messages"]) for body in server.asked] == [1, 1, 3]
    assert server.asked[2]["messages"][1]["content"] == "Whole."


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((400, "cat.png: not an image"), "The server refused this message: cat.png: not an image"),
        (
            (413, "32 MB at most"),
            "too large for this server. Use smaller files, or start a new chat. The server says: 32 MB at most",
        ),
        ((429, "queue"), "The server is busy. Try again in 2 seconds."),
        ((503, "draining"), "The server does not take requests now. Try again in 2 seconds."),
        ((500, "see the log"), "The server failed: see the log"),
        (["One", {"error": {"message": "out of memory"}}], "The answer broke off: out of memory"),
        (["One", EOFError()], "The connection ended before the answer was complete."),
    ],
)
def test_errors_in_plain_words(page, server, answer, words):
    server.answers = [answer, ["Fine."], ["Last."]]
    ask(page, "First?")
    page.wait("document.querySelector('.turn .problem')")
    assert words in page.text(".turn .problem")
    assert page.run("document.querySelector('.turn .problem').role") == "alert"
    page.click("button[aria-label='Edit this message']")
    assert page.run("document.querySelector('#text').value") == "First?"
    ask(page, " Again?")
    assert answered(page) == "Fine."
    assert server.asked[-1]["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "First? Again?"}]}
    ]


def test_a_question_without_an_answer_is_not_sent_again(page, server):
    server.answers = [(400, "no"), ["Fine."]]
    ask(page, "First?")
    page.wait("document.querySelector('.turn .problem')")
    ask(page, "Second?")
    assert answered(page, 2) == "Fine."
    assert len(server.asked[-1]["messages"]) == 1
    assert "The model does not see it" in page.text("#turns")


def test_a_server_that_has_gone(page, server):
    server.shutdown()
    server.server_close()
    ask(page, "Hello?")
    page.wait("document.querySelector('.turn .problem')")
    assert "cannot be reached" in page.text(".turn .problem")
    # Chromium logs the failed connection.
    assert all("Failed to load resource" in line for line in page.log())


def test_text_of_the_model_is_never_html(page, server):
    text = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script> [a](javascript:1)"
    neighbor = {"name": "<b>x</b>", "similarity": 0.5, "thumbnail": "https://example.com/x.png"}
    server.has_cache = True
    page.open(server.address)
    page.wait("document.querySelector('#model').textContent === 'tiny'")
    server.answers = [[text, {"choices": [], "neighbors": [[neighbor]]}]]
    give(page, "drop", "<i>.wav")
    page.wait("document.querySelectorAll('#attached li').length === 1")
    ask(page, "<b>Hi</b>")
    assert answered(page) == text
    assert page.run("document.querySelectorAll('#turns img, #turns b, #turns i, #turns script').length") == 0
    assert page.run("document.title") == "tiny - bindllm chat"
    assert "<b>x</b>" in page.text(".neighbors")


def test_neighbors_are_shown_with_their_thumbnails_and_warnings_with_the_file(page, server):
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(content, "WEBP")
    uri = "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
    found = [
        {"name": "apple.png", "similarity": 0.913, "thumbnail": uri},
        {"name": "b", "similarity": 0.5, "thumbnail": None},
    ]
    server.has_cache = True
    page.open(server.address)
    page.wait("document.querySelector('#model').textContent === 'tiny'")
    last = {"choices": [], "neighbors": [[], found], "warnings": ["messages[0].content[0] (audio): damaged"]}
    server.answers = [["Red.", last], ["No."]]
    give(page, "drop", "a.wav")
    page.wait("document.querySelectorAll('#attached li').length === 1")
    ask(page, "What?")
    assert answered(page) == "Red."
    assert server.asked[0]["neighbors"] is True
    assert page.text(".neighbors").split() == [
        *["Images", "of", "the", "visual", "cache,", "with", "their", "similarity:"],
        *["apple.png", "0.91", "No", "image", "b", "0.50"],
    ]
    page.wait("document.querySelector('.neighbors img').naturalWidth === 8")
    assert page.text(".turn.model > .note") == "a.wav: damaged"


def test_an_answer_about_media_with_an_unlikely_token_is_marked(page, server):
    def piece(text, *logprobs):
        content = [{"token": text, "logprob": value} for value in logprobs]
        return {"choices": [{"index": 0, "delta": {"content": text}, "logprobs": {"content": content}}]}

    server.answers = [[piece("Red", -0.1), piece(".", -1.6, -0.01)], [piece("Blue.", -0.6)], ["No media."]]
    for number, notes in ((1, 1), (2, 1), (3, 1)):
        if number < 3:
            give(page, "drop", "a.wav")
            page.wait("document.querySelectorAll('#attached li').length === 1")
        ask(page, "What?")
        answered(page, number)
        assert server.asked[-1].get("logprobs", False) == (number < 3)
        assert page.run("document.querySelectorAll('.turn.model > .note').length") == notes
    doubt = "The model is not sure: one token of this answer has a probability of 20 %."
    assert page.text(".turn.model > .note") == doubt


def test_settings_reach_the_request(page, server):
    server.answers = [["Yes."]]
    page.click("#open-settings")
    for field, value in (
        ("temperature", "3"),
        ("top-p", "0.9"),
        ("max-tokens", "12"),
        ("seed", "7"),
        ("system", "Be brief."),
    ):
        page.type(f"#{field}", value)
    page.click("#close-settings")
    assert page.text("#settings-problem").startswith("Temperature:")
    page.press("\ue003")
    page.type("#temperature", "0.7")
    page.click("#close-settings")
    assert page.run("document.querySelector('#settings').open") is False
    ask(page, "Really?")
    assert answered(page) == "Yes."
    (body,) = server.asked
    assert [body[key] for key in ("temperature", "top_p", "max_tokens", "seed")] == [0.7, 0.9, 12, 7]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_key_is_asked_for_and_kept_in_memory_only(browser, server):
    server.key = "secret"
    browser.open(server.address)
    browser.wait("!document.querySelector('#notice').hidden")
    assert "needs a valid API key" in browser.text("#notice")
    browser.click("#notice-settings")
    assert browser.run("document.activeElement.id") == "key"
    browser.press("s", "e")
    browser.type("#key", "cret")
    browser.click("#close-settings")
    browser.wait("document.querySelector('#model').textContent === 'tiny'")
    server.answers = [["Open."]]
    ask(browser, "Hi")
    assert answered(browser) == "Open."
    assert (
        browser.run("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        == '[{},{},""]'
    )
    assert not [line for line in browser.log() if "401" not in line]


def test_only_modalities_of_the_model_are_offered(browser, server, tmp_path):
    server.modalities = ["image", "text"]
    files = write_files(tmp_path)
    browser.open(server.address)
    browser.wait("document.querySelector('#model').textContent === 'tiny'")
    assert browser.text("#serves").startswith("This model reads images.")
    assert [
        browser.run(f"document.querySelector('#{name}').hidden") for name in ("photo", "audio", "video")
    ] == [False, True, True]
    assert "image/*" in browser.run("document.querySelector('#files').accept")
    browser.type("#files", f"{files['cat.png']}\n{files['bark.wav']}")
    browser.wait("!document.querySelector('#composer-problem').hidden")
    assert browser.text("#composer-problem") == "bark.wav: this model does not read audio files, only images."
    assert browser.run("document.querySelectorAll('#attached li').length") == 1
    browser.log()


@pytest.mark.parametrize("modality", ["photo", "audio", "video"])
def test_recordings_of_a_made_up_device(page, server, modality):
    page.click(f"#{modality}")
    page.wait("!document.querySelector('#recorder-action').disabled")
    page.click("#recorder-action")
    if modality != "photo":
        page.wait("document.querySelector('#recorder-time').textContent.startsWith('0:01')")
        page.click("#recorder-action")
    page.wait("document.querySelectorAll('#attached li').length === 1")
    assert page.run("document.querySelector('#recorder').open") is False
    server.answers = [["Heard."]]
    ask(page, "What?")
    assert answered(page) == "Heard."
    part = server.asked[0]["messages"][0]["content"][0]
    if modality == "audio":
        with wave.open(io.BytesIO(base64.b64decode(part["input_audio"]["data"]))) as sound:
            assert sound.getframerate() == 16000
            assert 0.5 < sound.getnframes() / 16000 < 5
            assert len(set(sound.readframes(16000))) > 2
    elif modality == "photo":
        with Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))) as image:
            assert image.format == "JPEG"
    else:
        assert part["video_url"]["url"].startswith("data:video/webm;base64,")


def test_a_recording_can_be_cancelled(page):
    page.click("#audio")
    page.wait("!document.querySelector('#recorder-action').disabled")
    page.press(ESCAPE)
    page.wait("!document.querySelector('#recorder').open")
    assert page.run("document.querySelectorAll('#attached li').length") == 0


def test_the_keyboard_reaches_everything_and_all_of_it_has_a_name(page, server, tmp_path):
    files = write_files(tmp_path)
    attach(page, files["chair.ply"], files["room.png"], files["cat.png"])
    server.answers = [["Yes."]]
    ask(page, "What?")
    answered(page)
    assert page.run("document.activeElement.id") == "text"
    unnamed = page.run(
        "[...document.querySelectorAll('button, input:not([hidden]), textarea, select, canvas, audio, video, img')]"
        ".filter(one => one.checkVisibility())"
        ".filter(one => !(one.innerText?.trim() || one.ariaLabel || one.alt || one.labels?.length))"
        ".map(one => one.outerHTML)"
    )
    assert unnamed == []
    seen = set()
    for _ in range(20):
        page.press(TAB)
        seen.add(page.run("document.activeElement.ariaLabel ?? document.activeElement.innerText"))
    assert {"New chat", "Settings", "Copy the answer", "Edit this message", "Ask for another answer"} <= seen
    assert any("Point cloud of 500 points" in name for name in seen)


def test_new_chat_starts_over(page, server):
    server.answers = [["One."], ["Two."]]
    ask(page, "First?")
    answered(page)
    page.click("#clear")
    assert page.run("document.querySelectorAll('.turn').length") == 0
    assert page.run("document.querySelector('#welcome').hidden") is False
    ask(page, "Second?")
    assert answered(page) == "Two."
    assert len(server.asked[1]["messages"]) == 1


def test_the_answer_can_be_copied(page, server):
    server.answers = [["To copy."]]
    page.devtools("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    ask(page, "What?")
    answered(page)
    page.click("button[aria-label='Copy the answer']")
    page.wait("document.querySelector('#announcer').textContent === 'The answer is copied.'")
    assert page.run("navigator.clipboard.readText()") == "To copy."


def test_a_phone_shows_no_scroll_bar_across(page, server, tmp_path):
    page.resize(360, 640)
    files = write_files(tmp_path)
    attach(page, files["chair.ply"], files["bark.wav"], files["cat.png"])
    server.answers = [["A" * 300 + " word"]]
    ask(page, "B" * 200)
    answered(page)
    page.click("#open-settings")
    wide = page.run("return document.documentElement.scrollWidth - window.innerWidth")
    tall = page.run("return document.documentElement.scrollHeight - window.innerHeight")
    page.resize(1100, 800)
    assert (wide, tall) == (0, 0)


def test_the_colors_of_both_schemes_can_be_read(page, server):
    """The contrast of text is at least 4.5 to 1 (WCAG 2.2, 1.4.3)."""
    script = (
        "const style = getComputedStyle(document.documentElement);"
        "return Object.fromEntries(arguments[0].map(name => [name, style.getPropertyValue('--' + name).trim()]))"
    )
    pairs = [(text, ground) for text in ("ink", "faint") for ground in ("page", "card")]
    pairs += [("ink", "you"), ("ink", "warn"), ("on-main", "main")]
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        colors = page.run(script, sorted({name for pair in pairs for name in pair}))
        for text, ground in pairs:
            light, dark = sorted((luminance(colors[text]), luminance(colors[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, text, ground)


def luminance(color: str) -> float:
    values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
