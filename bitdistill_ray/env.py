"""The environment variables that this package reads; no other file reads any.

| variable | meaning | default |
|---|---|---|
| BITDISTILL_CACHE | folder for downloaded models and other things that can be made again | ~/.cache/bitdistill-ray |
| AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL | S3 server other than AWS (MinIO, Ceph, R2 …) | AWS |
| RAY_ADDRESS | the running Ray to join | start one here |
| CUDA_VISIBLE_DEVICES | the GPUs that a sweep shares out | all |
| RAY_SERVE_ENABLE_HA_PROXY | 0: `bitdistill serve` is entered by Serve's own proxy | 1 where HAProxy is installed |

Credentials and the region of S3 are read by its own client libraries.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path


def cache_folder() -> Path:
    """Where downloads are kept (not created here)."""
    return Path(os.environ.get("BITDISTILL_CACHE") or "~/.cache/bitdistill-ray").expanduser()


def s3_endpoint_url() -> str | None:
    """URL of the S3 server, or None for AWS."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def ray_address() -> str | None:
    """Address of a running Ray that this process should join (`ray job submit` sets it), or None."""
    return os.environ.get("RAY_ADDRESS") or None


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> tuple[int, ...]:
    """The numbers of these CPUs."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else tuple(range(cpu_count()))


def keep_to(process: int, cores: tuple[int, ...]) -> None:
    """Have a process that has just begun, and its children, run on these CPUs, where the system can do that."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process, cores)


def visible_gpus() -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process may use."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(name.strip() for name in chosen.split(",") if name.strip())
    import torch

    return tuple(map(str, range(torch.cuda.device_count())))


def for_child(gpus: tuple[str, ...]) -> dict[str, str]:
    """This environment for a process that is to see only these GPUs; all of them where none is named."""
    return {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})}


def private_ray_token() -> None:
    """Give the Ray that this process is about to start a token of its own, which only its children know.

    Call it before the first `import ray`, which reads both variables.
    """
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def give_room_in(seconds: int) -> None:
    """Ray Train's own patience with a cluster that has no room for its workers."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(seconds)


def serve_at_full_speed() -> None:
    """Let the replicas of the Ray that this process is about to start yield to nobody: Ray would run them at nice 15.

    Serve would also run their code on a thread beside its own, and every message would cross over; ours blocks neither.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")


def serve_through_haproxy(folder: Path, ports: Sequence[int]) -> None:
    """Have the Serve of the Ray that this process is about to start entered through HAProxy, if nobody said otherwise.

    Requests then go to replicas over HTTP, and not through a proxy in Python and Ray's calls, which take 5 ms longer
    there and 4 back (docs/LOG.md).  Its files lie in `folder`, which nobody else should read (its socket obeys
    everybody); `ports` are four free ones: its two pages of counters, and those of the proxy that stands by.
    """
    if os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1") != "1":
        return
    files = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "SERVER_STATE_BASE": "",
             "SERVER_STATE_FILE": "server-state", "METRICS_SOCKET_PATH": "metrics.sock"}  # fmt: skip
    places = ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT", "FALLBACK_PROXY_GRPC_PORT")
    os.environ.update({f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in files.items()})
    os.environ.update({f"RAY_SERVE_{name}": str(port) for name, port in zip(places, ports, strict=True)})
    os.environ.update(
        RAY_SERVE_HAPROXY_NBTHREAD="1",  # of four that would wake on the decoder's cores
        RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="0",  # no other load balancer has to hear of an end first
    )


SHARED_CORES = {
    "OMP_WAIT_POLICY": "PASSIVE",  # a teacher and a student on the same cores else spin in each other's way
    "MALLOC_ARENA_MAX": "1",  # with the next two: glibc keeps what it freed, instead of giving each large tensor back
    "MALLOC_MMAP_THRESHOLD_": str(1 << 34),  # to the kernel and faulting it in again (a third of a CPU step)
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
}


def share_cores() -> None:
    """Settings for the processes started from here that compute on CPUs; what the user has set stays."""
    for name, value in SHARED_CORES.items():
        os.environ.setdefault(name, value)
