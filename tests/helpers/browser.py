"""Chromium without a window, driven over its own debugging pipe."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from helpers.children import Pulse, spent

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1200,900"),
]
PIPE = "--remote-debugging-pipe"


class Browser:
    """A page in headless Chromium, spoken to over the debugging pipe: JSON messages that end in a zero byte."""

    def __init__(self, folder: str) -> None:
        command_read, self._command = os.pipe()
        self._answer, answer_write = os.pipe()
        # The pipe's ends must be the descriptors 3 and 4 of the browser: the shell moves them there.
        redirect = f'exec "$@" 3<&{command_read} 4>&{answer_write}'
        self.process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", str(CHROMIUM), *ARGUMENTS, PIPE, f"--user-data-dir={folder}"],
            pass_fds=(command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(answer_write)
        self._rest, self._session, self._numbers = b"", None, itertools.count(1)
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._command, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            pulse = Pulse(self.process.pid)
            while not select.select([self._answer], [], [], 1)[0]:
                reason = pulse.look()
                assert reason is None, f"Chromium does not answer: {reason}"
            chunk = os.read(self._answer, 1 << 20)
            assert chunk, "Chromium closed its debugging pipe"
            self._rest += chunk
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, path: Path, dark: bool = False, fragment: str = "") -> None:
        self.call("Page.navigate", url="about:blank")  # or else another fragment of the same page loads nothing
        self.wait("location.href === 'about:blank'")
        self.events.clear()
        self.theme(dark)
        address = path.as_uri() + (f"#{fragment}" if fragment else "")
        self.call("Page.navigate", url=address)
        # The script stands last in the page, so a complete document has run it.
        self.wait(f"document.readyState === 'complete' && location.href === {address!r}")

    def theme(self, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def resize(self, width: int = 1200, height: int = 900) -> None:
        """Set the size of the screen in pixels; one as narrow as a phone's is a phone's."""
        phone = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": 0, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)

    def js(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Wait until a condition is true, for as many seconds of the browser's work as it may take."""
        begin = self.spent()
        while not self.js(condition):
            assert self.spent() - begin < seconds, f"never true: {condition}"
            time.sleep(0.02)

    def spent(self) -> float:
        """Processor seconds of the browser so far."""
        return spent(self.process.pid)

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            code = {"Tab": 9, "Escape": 27}.get(key, 0)
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def fill(self, field: str, value: str) -> str:
        """Set a control as a user would, wait for its effect, and return the pager's text."""
        self.js("document.getElementById('status').textContent = ''")
        self.set(field, value)
        self.wait("document.getElementById('status').textContent !== ''")
        return self.js("document.getElementById('status').textContent")

    def set(self, field: str, value: str) -> None:
        """Set a control as a user would."""
        self.js(
            f"(e => {{ e.value = {value!r}; e.dispatchEvent(new Event('input', {{bubbles: true}})); }})"
            f"(document.getElementById({field!r}))"
        )

    def click(self, field: str) -> None:
        """Click on the element with this id."""
        self.js(f"document.getElementById({field!r}).click()")

    def texts(self, selector: str) -> list[str]:
        return self.js(f"Array.from(document.querySelectorAll({selector!r}), e => e.textContent)")

    def problems(self) -> list[Any]:
        """Return exceptions, blocked loads and requests other than for the page itself, since the page was opened."""
        self.call("Runtime.evaluate", expression="0")  # what happened before this answer is in `events` now
        return [
            event
            for event in self.events
            if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")
            or (event["method"] == "Network.requestWillBeSent" and event["params"]["type"] != "Document")
        ]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        os.close(self._command)
        os.close(self._answer)
