"""A headless Chromium over its own debugging protocol: no driver to install beside it."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """The browser of this machine, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One page."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._ids = socket, itertools.count(1)
        self.session: str | None = None
        self.requested: list[str] = []  # every address that the page asked for
        self.complaints: list[str] = []

    def call(self, method: str, **params: Any) -> Any:
        """One command, and its result."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        self._socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while (reply := json.loads(self._socket.recv(timeout=60))).get("id") != number:
            self._heed(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def _heed(self, event: Any) -> None:
        if event["method"] == "Network.requestWillBeSent":
            self.requested.append(event["params"]["request"]["url"])
        elif event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(event["params"]))

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str, seconds: float = 60) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, script
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        """The page as it looks now."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def tab(url: str, folder: Path, *, width: int, height: int) -> Iterator[Tab]:
    """A browser that shows `url` in a window of that size."""
    command = [chromium() or "", "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
               f"--user-data-dir={folder}", "about:blank"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if "DevTools listening on" in line)
            with connect(line.split()[-1], max_size=None) as socket:
                page = Tab(socket)
                target = page.call("Target.createTarget", url="about:blank")["targetId"]
                page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
                for domain in ("Network", "Runtime", "Page", "Log"):
                    page.call(f"{domain}.enable")
                page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                          mobile=width < 600)  # fmt: skip
                page.call("Page.navigate", url=url)
                page.until("location.href !== 'about:blank' && document.readyState === 'complete'")
                yield page
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # the browser may be the child of a script
