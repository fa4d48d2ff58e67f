"""python -m bitdistill_ray.export STUDENT OUT    pack a student folder (of a training stage) into `docs/FORMAT.md`'s.

STUDENT is `RUN/stages/NAME/student`, local or at a URL.  The `export` stage does the same inside a run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bitdistill_ray.errors import BitdistillError


def main(argv: Sequence[str] | None = None) -> int:
    """Pack; returns the exit status, 2 after an error that the user can mend."""
    command = argparse.ArgumentParser(prog="bitdistill export", description=__doc__.partition("\n\n")[2])
    command.add_argument("student", metavar="STUDENT")
    command.add_argument("out", metavar="OUT")
    options = command.parse_args(argv)
    from bitdistill_ray.inspect import render
    from bitdistill_ray.model.sources import resolve
    from bitdistill_ray.model.student import read_about
    from bitdistill_ray.packed.export import pack_student
    from bitdistill_ray.packed.folder import PackedFolder

    try:
        source = Path(resolve(options.student))
        pack_student(source, Path(options.out), dict(read_about(source)["provenance"]))
        print(render(PackedFolder.open(options.out), tensors=False))
    except BitdistillError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
