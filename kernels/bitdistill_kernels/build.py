"""`python -m bitdistill_kernels.build`: compile the kernels into this package, for a checkout without a wheel.

Needs CMake 3.20 and a C++17 compiler.  Objects go to `build/kernels` in the checkout, and only what changed is compiled
again.  `--sanitize` instead builds and runs the C++ test drivers under AddressSanitizer and
UndefinedBehaviorSanitizer in `build/kernels-sanitize`, and leaves the package as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bitdistill_kernels.library import LIBRARY_NAME
from bitdistill_ray.errors import KernelError

PACKAGE = Path(__file__).resolve().parent
SOURCES = PACKAGE.parent
DRIVERS = ("kernel_driver", "decoder_driver")


def build(*, sanitize: bool = False) -> Path:
    """Configure and compile; returns the library in the package, or the folder of the test drivers with `sanitize`.

    Raises KernelError where the sources or CMake are missing, or the compiler fails.
    """
    if not (SOURCES / "CMakeLists.txt").is_file():
        raise KernelError(str(SOURCES), "holds no CMakeLists.txt", "Run from a checkout; a wheel needs no build")
    cmake = shutil.which("cmake")
    if cmake is None:
        raise KernelError("cmake", "not found", "Run `pip install cmake ninja`, or install your system's package")
    folder = SOURCES.parent / "build" / ("kernels-sanitize" if sanitize else "kernels")
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (folder / "CMakeCache.txt").exists() else []
    _run(
        [
            cmake,
            "-S",
            str(SOURCES),
            "-B",
            str(folder),
            *generator,
            f"-DBITDISTILL_SANITIZE={'ON' if sanitize else 'OFF'}",
        ]
    )
    _run([cmake, "--build", str(folder)])
    if sanitize:
        return folder
    fresh = PACKAGE / (LIBRARY_NAME + ".new")  # replaced in one step: a process that has it open keeps the old file
    shutil.copy2(folder / LIBRARY_NAME, fresh)
    os.replace(fresh, PACKAGE / LIBRARY_NAME)
    return PACKAGE / LIBRARY_NAME


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stdout)
        raise KernelError(command[0], f"failed with {done.returncode}, output above", "Mend what the compiler names")


def main() -> int:
    """Entry point; 0, or 2 with one line about what was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bitdistill_kernels.build", description="Compile the CPU kernels.")
    parser.add_argument("--sanitize", action="store_true", help="build and run the C++ test drivers under sanitizers")
    try:
        made = build(sanitize=parser.parse_args().sanitize)
    except KernelError as error:
        print(error, file=sys.stderr)
        return 2
    print(made)
    if made.name == LIBRARY_NAME:
        return 0
    return int(any(subprocess.run([str(made / driver)], check=False).returncode for driver in DRIVERS))


if __name__ == "__main__":
    sys.exit(main())
