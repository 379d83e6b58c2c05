"""A headless Chromium that tests talk to over its pipe, by the DevTools protocol, without further packages."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_SECONDS = 300


def find_chromium():
    """Path of a Chromium; the test is skipped where there is none."""
    named = os.environ.get("QYOLO_CHROMIUM")
    found = [path for name in ([named] if named else NAMES) if (path := shutil.which(name))]
    if not found:
        pytest.skip("no Chromium is installed; QYOLO_CHROMIUM may name one")
    return found[0]


class Chromium:
    """One page in a browser of its own: what it logs and requests is kept in `problems` and `requests`."""

    def __init__(self, program, profile):
        self.problems, self.requests = [], []
        self._number, self._waiting, self._events, self._session = 0, b"", set(), None
        # Far from 3 and 4, where Chromium reads and writes.
        pipes = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for pair in (os.pipe(), os.pipe()) for end in pair]
        theirs_in, self._out, self._in, theirs_out = pipes

        def connect():
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        self._process = subprocess.Popen(
            [program, *ARGUMENTS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(3, 4),
            preexec_fn=connect,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self._call(f"{domain}.enable")

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def open(self, path, width, scheme="light"):
        """Show a file in a window of this width, and wait until it is loaded."""
        self.problems.clear()
        self.requests.clear()
        self._events.discard("Page.loadEventFired")
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", media="screen", features=features)
        self._call("Page.navigate", url=path.absolute().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._take(self._read())

    def press(self, key):
        """Press and release a key, such as `ArrowDown`, where the focus is."""
        code = {"ArrowDown": 40}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def print_media(self):
        """Show the page as it is printed."""
        self._call("Emulation.setEmulatedMedia", media="print")

    def evaluate(self, expression):
        """The value of an expression of JavaScript in the page, a promise's once it is kept."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path):
        """Write the whole page as PNG."""
        answer = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self._take(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _take(self, event):
        method, parameters = event.get("method", ""), event.get("params", {})
        self._events.add(method)
        if method == "Runtime.exceptionThrown":
            self.problems.append(parameters["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.problems.append(str(parameters["args"]))
        elif method == "Log.entryAdded":
            self.problems.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def _read(self):
        deadline = time.monotonic() + _SECONDS
        while b"\0" not in self._waiting:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._in, 1 << 20) if ready else b""
            assert data, f"Chromium said nothing for {_SECONDS} s, or ended"
            self._waiting += data
        message, self._waiting = self._waiting.split(b"\0", 1)
        return json.loads(message)
