"""bitdistill COMMAND …    every command of the package under one name; each is a module with a `main` of its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": ("bitdistill_ray.train", "run a recipe, from a teacher to a packed and measured student"),
    "evaluate": ("bitdistill_ray.evaluate", "measure models beside a teacher"),
    "export": ("bitdistill_ray.export", "pack a student folder"),
    "generate": ("bitdistill_ray.generate", "print what a model writes after a prompt"),
    "inspect": ("bitdistill_ray.inspect", "say what a packed student holds, after checking every byte"),
    "report": ("bitdistill_ray.report.command", "write the report of a run: curves, weights, tables"),
    "compare": ("bitdistill_ray.report.comparison", "put runs side by side: a table, and curves over tokens"),
    "sweep": ("bitdistill_ray.sweep", "run every row of a table of comparisons"),
    "teacher": ("bitdistill_ray.teacher_pools", "start, show and end teacher pools that several runs share"),
    "serve": ("bitdistill_serve.cli", "serve a model over HTTP on this machine"),
    "bench": ("bitdistill_ray.bench", "measure kernels, decoding and training against their limits"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        print("usage: bitdistill COMMAND …\n" + "\n".join(f"  {name:9} {says}" for name, (_, says) in COMMANDS.items()))
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    module, _ = COMMANDS[arguments[0]]
    return int(importlib.import_module(module).main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())
