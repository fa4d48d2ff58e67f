"""Which code ran on which machine: without that, a measured number means nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitdistill_ray import __version__, env

PACKAGES = ("torch", "ray", "deepspeed", "transformers", "numpy")
HERE = Path(__file__).resolve()


def commit() -> str | None:
    """The checkout's commit, `-dirty` with changes that are not committed; None for an installed package."""
    git = ("git", "-C", str(HERE.parent))
    asked = (
        ("ls-files", "--error-unmatch", HERE.name),
        ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
    )
    try:
        # the first: another project's checkout, in which this package merely lies, does not know this file
        said = [subprocess.run([*git, *a], capture_output=True, text=True, check=True).stdout.strip() for a in asked]
    except (OSError, subprocess.CalledProcessError):
        return None
    return said[-1]


def versions() -> dict[str, str]:
    """Python and the packages that figures depend on."""
    return {
        "bitdistill-ray": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def describe_machine() -> dict[str, Any]:
    """JSON-ready: processor, the CPUs that this process may use, memory in GiB, GPUs, operating system."""
    import torch

    return {
        "cpu": _cpu_name(),
        "cpus": env.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "os": platform.platform(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
