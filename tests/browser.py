"""A headless Chromium for tests, driven through the WebDriver protocol (https://www.w3.org/TR/webdriver2)."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ARGUMENTS = [
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run"),
    # A camera and a microphone that make up their images and sounds, and no question about them.
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
]


class Browser:
    """One window."""

    def __init__(self, driver: str) -> None:
        self._driver = driver
        options = {"args": ARGUMENTS, "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._call("POST", driver + "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"{driver}/session/{made['sessionId']}"

    def _call(self, method: str, address: str, body: dict | None = None):
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(address, data, {"content-type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"].partition("\n")[0]) from error

    def close(self) -> None:
        self._call("DELETE", self._session)

    def open(self, address: str) -> None:
        self._call("POST", self._session + "/url", {"url": address})

    def resize(self, width: int, height: int) -> None:
        """Set the size of the page, also below the least width of a window."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)

    def devtools(self, command: str, **parameters):
        body = {"cmd": command, "params": parameters}
        return self._call("POST", self._session + "/goog/cdp/execute", body)

    def prefer(self, scheme: str) -> None:
        """Choose the light or the dark color scheme."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", features=features)

    def run(self, script: str, *arguments):
        """Return the value of an expression or of a script with ``return``, which may be a promise."""
        source = script if "return" in script else f"return {script}"
        return self._call(
            "POST", self._session + "/execute/sync", {"script": source, "args": list(arguments)}
        )

    def wait(self, script: str, *arguments, seconds: float = 60):
        """Return the value of a script as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script, *arguments)):
            assert time.monotonic() < end, f"{script} stays {value!r}; the page shows: {self.text('body')}"
            time.sleep(0.05)
        return value

    def find(self, selector: str) -> str:
        found = self._call("POST", self._session + "/element", {"using": "css selector", "value": selector})
        return f"{self._session}/element/{found[ELEMENT]}"

    def text(self, selector: str) -> str:
        """Return the text of an element as a reader sees it."""
        return self._call("GET", self.find(selector) + "/text")

    def label(self, selector: str) -> str:
        """Return the name of an element as a screen reader says it."""
        return self._call("GET", self.find(selector) + "/computedlabel")

    def click(self, selector: str) -> None:
        self._call("POST", self.find(selector) + "/click")

    def type(self, selector: str, text: str) -> None:
        """Type into an element; of a file field, choose the file of this path."""
        self._call("POST", self.find(selector) + "/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Press keys in the element that has the focus; later keys while the ones before are held."""
        actions = [{"type": "keyDown", "value": key} for key in keys]
        actions += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        body = {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]}
        self._call("POST", self._session + "/actions", body)

    def log(self) -> list[str]:
        """Return the messages of the console since the last call, such as violations of the content policy."""
        return [
            entry["message"] for entry in self._call("POST", self._session + "/se/log", {"type": "browser"})
        ]

    def save_screenshot(self, file: Path | str) -> None:
        Path(file).write_bytes(base64.b64decode(self._call("GET", self._session + "/screenshot")))


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """Start Chromium and its driver; skip the test if they are not installed."""
    program = shutil.which("chromedriver")
    if program is None or shutil.which("chromium") is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [program, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(200):
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(address + "/status", timeout=5) as answer,
            ):
                if json.load(answer)["value"]["ready"]:
                    break
            time.sleep(0.05)
        browser = Browser(address)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        process.terminate()
        process.wait(10)
