"""A real Ray head of its own for a test: `ray start --head --block` in a process group, with a token, on free ports.

It shares nothing with another Ray on this machine: its own temporary folder, ports and token.  Only its own process
group is ended afterwards, never `ray stop`, which ends every Ray of the host.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True, slots=True)
class RayHead:
    """Where the head's job server listens, and the token that opens it."""

    dashboard_url: str
    token: str

    def environment(self, token: str | None = None) -> dict[str, str]:
        """This process's environment, pointed at the head with its token (or another); `python` is this Python."""
        own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return own | {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), own["PATH"]]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token or self.token,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
        }

    def submit(
        self,
        submission_id: str,
        *entrypoint: str,
        token: str | None = None,
        working_dir: Path | None = None,
        timeout_s: float = 240,
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit -- ENTRYPOINT`, waited for; its exit code is the job's, its output the job's log."""
        command = [RAY, "job", "submit", "--submission-id", submission_id, "--entrypoint-num-cpus", "0"]
        if working_dir is not None:
            command += ["--working-dir", str(working_dir)]
        return subprocess.run(
            [*command, "--", *entrypoint],
            env=self.environment(token),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )


@contextmanager
def ray_head(
    *, num_cpus: int = 2, object_store_bytes: int = 200 * 2**20, environment: Mapping[str, str] | None = None
) -> Iterator[RayHead]:
    """A head with token authentication; ready on entry, gone with all its processes on exit.

    Jobs inherit `environment` (added to this process's), because the head starts them.
    """
    gcs, dashboard, client, agent, agent_grpc, env_agent, metrics = _free_ports(7)
    folder = Path(tempfile.mkdtemp(prefix="rh-"))  # short: Ray keeps UNIX sockets below it
    head = RayHead(f"http://127.0.0.1:{dashboard}", secrets.token_hex(32))
    command = [
        *(RAY, "start", "--head", "--block", "--disable-usage-stats", "--dashboard-host=127.0.0.1"),
        *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}"),
        *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--dashboard-agent-grpc-port={agent_grpc}", f"--runtime-env-agent-port={env_agent}"),
        *("--min-worker-port=0", "--max-worker-port=0", f"--num-cpus={num_cpus}"),
        *(f"--object-store-memory={object_store_bytes}", f"--temp-dir={folder / 'ray'}"),
    ]
    log = folder / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=head.environment() | dict(environment or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(head, process, log)
        yield head
    finally:
        _end_group(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(head: RayHead, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 90) -> None:
    """Ready is when the job server lists its jobs."""
    jobs = urllib.request.Request(f"{head.dashboard_url}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the head ended with {process.returncode}:\n{log.read_text()}")
        try:
            urllib.request.urlopen(jobs, timeout=30).close()
            return
        except (OSError, HTTPException) as error:
            answer = error
        time.sleep(0.1)
    raise RuntimeError(f"no head after {timeout_s:.0f} s:\n{log.read_text()}\n{answer!r}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the head and its servers at once: told to go, they take half a minute.  Workers, each a group of its own, end
    with their raylet.
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
