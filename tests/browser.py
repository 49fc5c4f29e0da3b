"""A headless Chromium, by its chromedriver and W3C WebDriver, which is JSON over HTTP."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = {
    name: shutil.which(name) for name in ("chromedriver", "chromium", "google-chrome", "chrome")
}
MISSING = (
    "no chromedriver (Debian: apt install chromium-driver)"
    if not PROGRAMS["chromedriver"] or not any(list(PROGRAMS.values())[1:])
    else None
)
KEYS = {  # of the standard
    "Enter": "\ue007",
    "Escape": "\ue00c",
    "End": "\ue010",
    "Home": "\ue011",
    "ArrowLeft": "\ue012",
    "ArrowUp": "\ue013",
    "ArrowRight": "\ue014",
    "ArrowDown": "\ue015",
    "Tab": "\ue004",
}


class Browser:
    """A window of it."""

    def __init__(self, address: str) -> None:
        self.address = address
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage"]
        arguments += [
            "--window-size=1400,1000",
            "--disable-gpu",
            "--host-resolver-rules=MAP * ~NOTFOUND",
        ]
        binary = next(path for name, path in PROGRAMS.items() if name != "chromedriver" and path)
        wanted = {
            "goog:chromeOptions": {"args": arguments, "binary": binary},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = self._send("POST", "/session", capabilities={"alwaysMatch": wanted})
        self.address += f"/session/{session['sessionId']}"

    def _send(self, method: str, path: str, **content: Any) -> Any:
        data = json.dumps(content).encode() if method == "POST" else None
        request = urllib.request.Request(self.address + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, path: Path) -> None:
        """Show a file."""
        self._send("POST", "/url", url=path.resolve().as_uri())

    def run(self, script: str, *given: Any) -> Any:
        """What a function's body returns."""
        return self._send("POST", "/execute/sync", script=script, args=list(given))

    def press(self, *keys: str) -> None:
        """Keys one after another, into what has the focus."""
        actions = []
        for key in keys:
            value = KEYS.get(key, key)
            actions += [{"type": kind, "value": value} for kind in ("keyDown", "keyUp")]
        self._send("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def click(self, x: int, y: int) -> None:
        """At a place of the window."""
        move = {"type": "pointerMove", "x": x, "y": y, "duration": 0}
        press = [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        self._send(
            "POST",
            "/actions",
            actions=[{"type": "pointer", "id": "mouse", "actions": [move, *press]}],
        )

    def waits_for(self, script: str, seconds: float = 20) -> Any:
        """What a function's body returns once that is something."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"not within {seconds} s: {script}"
            time.sleep(0.05)
        return found

    def errors(self) -> list[str]:
        """What the console has said since it was last asked, but for what is mere information."""
        said = self._send("POST", "/se/log", type="browser")
        return [x["message"] for x in said if x["level"] not in ("INFO", "DEBUG")]

    def picture(self, path: Path) -> None:
        """A PNG of what the window shows."""
        path.write_bytes(base64.b64decode(self._send("GET", "/screenshot")))

    def close(self) -> None:
        """End it."""
        self._send("DELETE", "")


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that ends with the block."""
    program = PROGRAMS["chromedriver"]
    assert program is not None
    driver = subprocess.Popen(
        [program, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert driver.stdout is not None
        lines = iter(driver.stdout.readline, "")
        said = next(line for line in lines if "successfully on port" in line)
        port = int(said.rstrip().rstrip(".").rpartition(" ")[2])
        window = Browser(f"http://127.0.0.1:{port}")
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(10)
