"""`bitdistill serve` as users start it, in processes of its own, with a hold on its replicas."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdistill_ray.errors import ServeError

READY_S = 180.0
REPLICA = b"ray::ServeReplica:"
DECODER = b":decoder"  # the deployment's name; a router and the ledger of rates are replicas too


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs: its address and the process at its root."""

    url: str
    process: int

    def get(self, path: str) -> Any:
        """The JSON of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.load(answer)

    def replicas(self) -> list[int]:
        """The processes that hold engines."""
        parents = _parents()
        return [
            pid
            for pid in parents
            if (command := _command(pid)).startswith(REPLICA)
            and DECODER in command
            and self.process in _line(pid, parents)
        ]

    def memory(self) -> int:
        """Bytes that the replicas keep in memory."""
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.replicas())
        return pages * os.sysconf("SC_PAGE_SIZE")

    def kill_one(self) -> bool:
        """End a replica as a machine that fails would; False where there was none."""
        for pid in self.replicas()[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return True
        return False


@contextmanager
def serving(model: str, options: Sequence[str]) -> Iterator[Server]:
    """A server inside the block.  Raises ServeError when it does not come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bitdistill_serve.cli", model, "--port", str(port), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            if not any("ready" in line for line in process.stdout):
                raise ServeError("bitdistill serve", "ended before it was ready", f"Try {' '.join(command)}")
            yield Server(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(READY_S)


def wait_until_idle(server: Server, seconds: float) -> bool:
    """Whether no request runs or waits any more, within a time."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        with suppress(OSError):
            health = server.get("/health")
            if not health["running"] and not health["waiting"]:
                return True
        time.sleep(0.1)
    return False


def _parents() -> dict[int, int]:
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def _line(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid in parents:
        yield pid
        pid = parents[pid]


def _command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
