"""A real HTTP proxy in front of an S3 server that does, for a while, what servers under stress do."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["503", "silence", "hang up"]
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class FaultProxy:
    """Passes requests on to `target`, or answers with a fault while `fault` says one of a request's method and path.

    `failed` has the paths of the requests that met a fault.
    """

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target)
        self.fault: Callable[[str, str], Fault | None] = lambda method, path: None
        self.failed: list[str] = []
        self.url = ""

    @property
    def faults(self) -> int:
        """How many requests met a fault."""
        return len(self.failed)

    def fail_for(self, seconds: float, *kinds: Fault, since: str = "", until: tuple[str, ...] = ()) -> None:
        """Answer with the faults in turn from now on, or from the first path that has `since` in it.

        It ends after so long, and not before paths with each of `until` have failed.
        """
        ends: list[float] = [] if since else [time.monotonic() + seconds]
        turn = [0]

        def fault(method: str, path: str) -> Fault | None:
            if not ends and since in path:
                ends.append(time.monotonic() + seconds)
            if not ends or (time.monotonic() > ends[0] and self.has_failed(*until)):
                return None
            turn[0] += 1
            return kinds[turn[0] % len(kinds)]

        self.fault = fault

    def has_failed(self, *paths: str) -> bool:
        """Whether a request met a fault for each of these parts of paths."""
        return all(any(part in path for path in self.failed) for part in paths)


@contextmanager
def fault_proxy(target: str) -> Iterator[FaultProxy]:
    """A proxy on a free port of this machine, ended with the block."""
    proxy = FaultProxy(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy.fault(self.command, self.path)
            if fault is not None:
                proxy.failed.append(self.path)
                self.close_connection = True
                if fault == "503":
                    self.reply(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
                elif fault == "silence":
                    stopped.wait(30)
                return
            connection = http.client.HTTPConnection(proxy.target.hostname or "", proxy.target.port, timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
            headers = {k: v for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding")}
            self.reply(answer.status, headers, content)
            connection.close()

        def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("date", "server", "content-length"):
                    self.send_header(name, value)
            length = headers.get("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    stopped = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield proxy
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
