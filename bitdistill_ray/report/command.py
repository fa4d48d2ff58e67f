"""bitdistill report RUN    write RUN's report.html: of a finished run, of one under way, of one that was cut.

RUN is the folder of a run, local or at a URL such as `s3://bucket/runs/int2`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bitdistill_ray import recipe
from bitdistill_ray.errors import BitdistillError, ConfigError
from bitdistill_ray.report.page import write_report
from bitdistill_ray.runs import RunFolder
from bitdistill_ray.storage import Storage


def open_run(url: str, overrides: Sequence[str] = ()) -> RunFolder:
    """The run whose folder is at `url`, wherever it was made.

    Raises:
        ConfigError: there is no `config.yaml`, or it is of another version.
    """
    folder = Storage(url)
    if not folder.exists("config.yaml"):
        raise ConfigError(folder.url, "holds no config.yaml", "Give the folder of a run (`run` in its recipe)")
    return RunFolder(recipe.load(folder.url_of("config.yaml"), [*overrides, f"run={folder.url}"]))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status, 2 after an error that the user can mend."""
    command = argparse.ArgumentParser(prog="bitdistill report", description=__doc__.partition("\n\n")[2])
    command.add_argument("run", metavar="RUN")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as storage.endpoint_url=…")
    options = command.parse_args(argv)
    try:
        print(write_report(open_run(options.run, options.overrides)))
    except BitdistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
