"""The C++ test drivers in builds that this machine does not run every day: under sanitizers and with AMX's instructions
as loops, and for ARM under qemu.

They compare every instruction set with the scalar one, bit for bit, in buffers that end where their shapes do: one the
products, one the decoder.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import bitdistill_kernels

SOURCES = Path(bitdistill_kernels.__file__).resolve().parent.parent
CROSS_COMPILER, EMULATOR, SYSROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"


def built(folder: Path, *options: str) -> list[Path]:
    """The drivers, and beside them the library."""
    configure = ["cmake", "-S", str(SOURCES), "-B", str(folder), "-DBITDISTILL_DRIVER=ON", *options]
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return [folder / "kernel_driver", folder / "decoder_driver"]


def run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 failures" in done.stdout


@pytest.fixture(autouse=True)
def _sources() -> None:
    if not (SOURCES / "CMakeLists.txt").is_file() or not shutil.which("cmake"):
        pytest.skip("needs a checkout and CMake")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_read_or_written_outside(tmp_path: Path) -> None:
    for driver in built(tmp_path, "-DBITDISTILL_SANITIZE=ON", "-DBITDISTILL_EMULATE_AMX=ON"):
        run(driver)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_neon_gives_the_same_bits(tmp_path: Path) -> None:
    if not shutil.which(CROSS_COMPILER) or not shutil.which(EMULATOR):
        pytest.skip(f"needs {CROSS_COMPILER} and {EMULATOR}: Debian's g++-aarch64-linux-gnu and qemu-user")
    arm = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={CROSS_COMPILER}")
    for driver in built(tmp_path, *arm):
        run(EMULATOR, "-cpu", "max", "-L", SYSROOT, "-E", f"LD_LIBRARY_PATH={tmp_path}", driver)
