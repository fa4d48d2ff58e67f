"""A web server for tests, and what the Hugging Face hub answers about one data set: over real HTTP, on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

BRANCH = "refs/convert/parquet"


class Files(BaseHTTPRequestHandler):
    """Serves the files below `folder`, with ranges and ETags."""

    folder: Path
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(unquote(urlsplit(self.path).path))

    def do_GET(self) -> None:
        self.answer(unquote(urlsplit(self.path).path))

    def answer(self, path: str) -> None:
        file = self.folder / path.lstrip("/")
        if not file.is_file():
            self.send(404, b'{"error": "not found"}')
            return
        content, status = file.read_bytes(), 200
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{len(content):x}"', "X-Repo-Commit": "c" * 40}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self.send(status, content, **headers)

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle(self) -> None:
        with suppress(ConnectionResetError):  # a client that was closed with a connection kept open
            super().handle()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Hub(Files):
    """The part of the hub's API that listing and reading a data set takes; `folder` is the parquet branch."""

    name = "org/tales"

    def do_POST(self) -> None:
        body = unquote(self.rfile.read(int(self.headers["Content-Length"])).decode())
        try:
            paths = json.loads(body)["paths"]
        except json.JSONDecodeError:
            paths = [field.partition("=")[2] for field in body.split("&") if field.startswith("paths")]
        self.json([self.entry(self.folder / path) for path in paths if (self.folder / path).exists()])

    def answer(self, path: str) -> None:
        api, resolve = f"/api/datasets/{self.name}", f"/datasets/{self.name}/resolve/{BRANCH}/"
        if path.startswith(resolve):
            super().answer(path[len(resolve) :])
        elif path.startswith(f"{api}/tree/{BRANCH}"):
            below = self.folder / path[len(f"{api}/tree/{BRANCH}") :].strip("/")
            files = below.rglob("*") if "recursive=True" in self.path.replace("true", "True") else below.iterdir()
            self.json([self.entry(file) for file in sorted(files)])
        elif path in (api, f"{api}/revision/{BRANCH}"):
            self.json({"id": self.name, "sha": "c" * 40, "private": False, "tags": [], "siblings": []})
        else:
            self.send(404, b'{"error": "not found"}', **{"X-Error-Code": "RepoNotFound"})

    def entry(self, file: Path) -> dict[str, object]:
        path = file.relative_to(self.folder).as_posix()
        if file.is_dir():
            return {"type": "directory", "oid": "d" * 40, "size": 0, "path": path}
        return {"type": "file", "oid": "f" * 40, "size": file.stat().st_size, "path": path}

    def json(self, content: object) -> None:
        self.send(200, json.dumps(content).encode(), **{"Content-Type": "application/json"})


@contextmanager
def serve(handler: type[Files], folder: Path) -> Iterator[str]:
    """The URL of a server of `folder`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"folder": folder}))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
