"""python -m bitdistill_ray.train [RECIPE] [key=value …] [--plan]    from a teacher to a packed, measured student.

RECIPE is a shipped name (default: demo, 13 minutes measured on two cores) or a YAML path, local or `s3://`.  Runs on a
Ray of its own, or, where RAY_ADDRESS is set (`ray job submit -- python -m bitdistill_ray.train …` sets it), on that
cluster.  `--plan` prints what would happen, with bytes, tokens, GPUs and GiB/s, and starts nothing.  The same command
again continues a run where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bitdistill_ray import recipe
from bitdistill_ray.config import Config
from bitdistill_ray.errors import BitdistillError
from bitdistill_ray.plan import describe, preflight
from bitdistill_ray.runs import RunFolder
from bitdistill_ray.sigterm import Terminated, terminable


def run(config: Config) -> dict[str, Any]:
    """Run every stage that is not finished yet; return the summary."""
    preflight(config)
    print("".join(f"warning: {line}\n" for line in config.unused), end="", flush=True)
    folder = RunFolder(config)
    folder.begin()
    with cluster(config), terminable():  # within: `ray.init` sets a handler of its own
        from bitdistill_ray.report.page import record_machine, write_report
        from bitdistill_ray.stages import STAGES, StageContext

        record_machine(folder)
        for name, stage in config.stages.items():
            if folder.finished(name) or folder.take_over(name):
                print(f"[{name}] finished before, skipped", flush=True)
                continue
            began = time.monotonic()
            print(f"[{name}] begins", flush=True)
            record = STAGES[stage.kind](StageContext(config, name, folder))
            record.facts["seconds"] = round(time.monotonic() - began, 1)
            folder.finish(record)
            print(f"[{name}] finished in {record.facts['seconds']} s: {record.said()}", flush=True)
    summary = summarise(folder)
    if config.monitor.report:
        print(f"report: {write_report(folder)}", flush=True)
    return summary


@contextmanager
def cluster(config: Config) -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS, or start a Ray here that ends with the run."""
    from bitdistill_ray import env

    if not env.ray_address() and "ray" not in sys.modules:
        env.private_ray_token()
        env.share_cores()
    import ray

    if ray.is_initialized():
        yield
        return
    if env.ray_address():
        ray.init(log_to_driver=False)
        print(f"joined the Ray cluster at {env.ray_address()}", flush=True)
    else:
        cpus = max(env.cpu_count(), 2 + round(config.teacher.most * config.teacher.cpus
                                              + config.student.workers * config.student.cpus))  # fmt: skip
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
        print(f"started a Ray here with {cpus} CPU slots (RAY_ADDRESS is not set)", flush=True)
    try:
        yield
    finally:
        ray.shutdown()


def summarise(folder: RunFolder) -> dict[str, Any]:
    """Collect the facts of all stages into `summary.json`."""
    records = [record for name in folder.config.stages if (record := folder.finished(name))]
    summary = {
        "run": folder.storage.url,
        "artefacts": {role: folder.storage.url_of(path) for r in records for role, path in r.artefacts.items()},
        "stages": {r.name: r.facts for r in records},
    }
    folder.storage.write_bytes("summary.json", json.dumps(summary, indent=1).encode())
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="bitdistill train", description=__doc__.split("\n\n")[0],
                                     epilog=f"recipes: {', '.join(recipe.names())}")  # fmt: skip
    parser.add_argument("recipe", nargs="?", default=recipe.DEFAULT, metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--plan", action="store_true", help="print what would happen, and start nothing")
    options = parser.parse_intermixed_args(argv)
    if "=" in options.recipe:
        options.recipe, options.overrides = recipe.DEFAULT, [options.recipe, *options.overrides]
    try:
        config = recipe.load(options.recipe, options.overrides)
        if options.plan:
            print(describe(config))
            return 0
        summary = run(config)
        print(f"done: {summary['run']}/summary.json")
    except BitdistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"{str(interrupt) or 'interrupted'}; the same command continues the run", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
