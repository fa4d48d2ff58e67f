"""The environment variables that this package reads; no other file reads any.

| variable | meaning | default |
|---|---|---|
| BITDISTILL_CACHE | folder for downloaded models and other things that can be made again | ~/.cache/bitdistill-ray |
| AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL | S3 server other than AWS (MinIO, Ceph, R2 …) | AWS |
| RAY_ADDRESS | the running Ray to join | start one here |
| CUDA_VISIBLE_DEVICES | the GPUs that a sweep shares out | all |

Credentials and the region of S3 are read by its own client libraries.
"""

from __future__ import annotations

import os
import secrets
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


def serve_at_full_priority() -> None:
    """Let the workers of the Ray that this process is about to start yield to nobody: Ray would run them at nice 15."""
    os.environ.setdefault("RAY_worker_niceness", "0")


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
