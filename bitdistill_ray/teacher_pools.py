"""bitdistill teacher up|status|down NAME …    teacher pools that stand by themselves, for any job of a Ray cluster.

    bitdistill teacher up NAME [RECIPE] [key=value …]    start the teachers of a recipe
    bitdistill teacher status NAME [--json]              who is there and what they do
    bitdistill teacher down NAME                         end them

A run uses one with `teacher.join=NAME`.  The cluster is that of RAY_ADDRESS, or the Ray that runs on this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from bitdistill_ray import env, recipe
from bitdistill_ray.errors import BitdistillError, TeacherError
from bitdistill_ray.teacher.member import MemberStatus
from bitdistill_ray.teacher.registry import PoolStatus


def render(name: str, status: PoolStatus) -> str:
    """The status for a person."""
    least, most = status.bounds
    weights = status.identity.weights if status.identity else "not loaded yet"
    lines = [f"{name}: {status.source} (weights {weights}), {status.target} teachers of {least} to {most}, "
             f"{status.clients} clients"]  # fmt: skip
    lines += [_line(member) for member in status.members]
    return "\n".join([*lines, *status.notes])


def _line(member: MemberStatus) -> str:
    speed = "-" if member.tokens_per_s is None else f"{member.tokens_per_s:,.0f}"
    idle = "-" if member.idle_share is None else f"{member.idle_share:.0%}"
    return (f"  teacher {member.number:<3} {member.state:9} requests {member.requests:,}  tokens {member.tokens:,}  "
            f"tokens/s {speed}  queue {member.queue}  idle {idle}")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status, 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="bitdistill teacher", description=__doc__.split("\n\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    up = actions.add_parser("up", help="start a pool")
    status = actions.add_parser("status", help="show a pool")
    down = actions.add_parser("down", help="end a pool")
    for action in (up, status, down):
        action.add_argument("name", metavar="NAME")
    up.add_argument("recipe", nargs="?", default=recipe.DEFAULT, metavar="RECIPE")
    up.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    status.add_argument("--json", action="store_true", help="as one JSON object")
    options = parser.parse_args(argv)
    try:
        if options.action == "up":
            _up(options.name, options.recipe, options.overrides)
        else:
            _on_running(options)
    except BitdistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _up(name: str, chosen: str, overrides: Sequence[str]) -> None:
    if "=" in chosen:
        chosen, overrides = recipe.DEFAULT, [chosen, *overrides]
    config = recipe.load(chosen, overrides)
    with _running_ray():
        from bitdistill_ray.teacher.pool import TeacherPool

        pool = TeacherPool.start(config.model.teacher, config.teacher, config.storage, name=name)
        print(f"{render(name, pool.status())}\n{pool.description}\nruns join it with teacher.join={name}")


def _on_running(options: argparse.Namespace) -> None:
    with _running_ray():
        from bitdistill_ray.teacher.pool import TeacherPool

        if options.action == "down":
            TeacherPool.down(options.name)
            print(f"{options.name}: down")
            return
        status = TeacherPool.status_of(options.name)
        print(json.dumps(asdict(status)) if options.json else render(options.name, status))


@contextmanager
def _running_ray() -> Iterator[None]:
    """This process's Ray, or that of RAY_ADDRESS, or the one that runs on this machine: never a new one.

    Raises:
        TeacherError: there is none.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=env.ray_address() or "auto", log_to_driver=False)
    except ConnectionError as error:
        raise TeacherError("RAY_ADDRESS", f"no running Ray was found ({' '.join(str(error).split())[:100]})",
                           "Start one with `ray start --head`, or set RAY_ADDRESS") from None  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
