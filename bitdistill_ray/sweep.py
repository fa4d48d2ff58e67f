"""bitdistill sweep TABLE [key=value …] [--rows ROW,…]    a table of comparisons: a run for each row, then all beside.

TABLE is a shipped name or a YAML path:

    recipe: bitdistiller-int2        what every row runs
    run: runs/int2                   the folder that holds every row's, by the row's name
    set: [stages.distill.tokens=1e7] overrides of every row; those of the command line come next, then the row's own
    rows:
      clipped: {set: [stages.distill=false]}
      ce: {branch: clipped, set: ["stages.distill.loss={ce: 1, forward_kl: 0}"]}
      twice: {branch: clipped, seeds: [0, 1]}
      again: {after: ce, set: ["model.student={run}/ce/stages/distill/student"]}

A row takes over what the row it branches from has made, and waits for it; `after` waits for a row that it reads.  A
row with seeds is a run for each, ROW-seedN; a second table has their mean, beside the row that `against` names.
`like: TABLE` begins with another's keys and rows.

On one machine each gets a Ray, GPUs and cores of its own, as many rows at a time as there are GPUs for; where
RAY_ADDRESS is set, rows join that cluster.  Each is one `bitdistill train` command, which is printed and makes the row
again; a sweep that was cut goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitdistill_ray import env, recipe
from bitdistill_ray.config import Config
from bitdistill_ray.errors import BitdistillError, ConfigError
from bitdistill_ray.report.command import open_run
from bitdistill_ray.report.comparison import compare, markdown, page
from bitdistill_ray.report.gather import gather
from bitdistill_ray.report.pooled import HEADS, SEED, pooled
from bitdistill_ray.runs import RunFolder
from bitdistill_ray.shipped import shipped
from bitdistill_ray.sigterm import Terminated, terminable
from bitdistill_ray.stage_config import DistillStage, FinetuneStage
from bitdistill_ray.sweep_config import TABLES, TableConfig, load_table

LOOK_EVERY_S, SAY_EVERY_S = 0.5, 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run of the table: `arguments` of `bitdistill train`, and the rows that must be finished before."""

    name: str
    arguments: tuple[str, ...]
    config: Config
    waits_for: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What makes this row by itself."""
        return shlex.join(["bitdistill", "train", *self.arguments])


@dataclass(frozen=True, slots=True)
class Place:
    """The part of this machine that one row has; `gpus` empty for none or, on a cluster, for Ray to say."""

    gpus: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()


@dataclass(slots=True)
class Running:
    """A row under way."""

    row: Row
    place: Place
    process: subprocess.Popen[bytes]
    log: Path
    began: float

    def last_line(self) -> str:
        """What it said last."""
        said = self.log.read_bytes()[-4000:].decode(errors="replace").replace("\r", "\n").split("\n")
        return next((line.strip() for line in reversed(said) if line.strip()), "nothing yet")


def rows_of(table: TableConfig, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> list[Row]:
    """The rows named in `only` (all without) and those that they wait for, checked, in an order in which they can run.

    Raises:
        ConfigError: no such row, rows that wait in a circle, a recipe or an override that cannot be run.
    """
    ordered: dict[str, Row] = {}
    done: set[str] = set()

    def add(name: str, waiting: tuple[str, ...]) -> None:
        if name in done:
            return
        if name not in table.rows:
            raise ConfigError("rows", f"there is none called {name!r}", f"Known: {', '.join(table.rows)}")
        if name in waiting:
            raise ConfigError(f"rows.{name}", f"waits in a circle: {' -> '.join([*waiting, name])}", "Cut it somewhere")
        row = table.rows[name]
        for before in row.before:
            add(before, (*waiting, name))
        done.add(name)
        for seed in row.seeds or (None,):
            ordered[seeded(name, seed)] = _row(table, name, overrides, seed)

    for name in only or table.rows:
        add(name, ())
    return list(ordered.values())


def _row(table: TableConfig, name: str, overrides: Sequence[str], seed: int | None) -> Row:
    row = table.rows[name]

    def run_of(before: str) -> str:
        """That row's run of this seed, or its first one."""
        seeds = table.rows[before].seeds
        return seeded(before, seed if seed in seeds else next(iter(seeds), None))

    branch = [] if row.branch is None else [f"branch={table.run}/{run_of(row.branch)}"]
    own = [setting.replace("{run}", table.run) for setting in row.set]
    settings = [*table.set, *overrides, *own, f"run={table.run}/{seeded(name, seed)}", *branch]
    source = row.recipe or table.recipe
    config = recipe.load(source, settings)
    if seed is not None:
        tuned = (key for key, stage in config.stages.items() if isinstance(stage, FinetuneStage | DistillStage))
        settings += [f"stages.{key}.seed={seed}" for key in tuned]
        config = recipe.load(source, settings)
    return Row(name=seeded(name, seed), arguments=(source, *settings), config=config,
               waits_for=tuple(run_of(before) for before in row.before))  # fmt: skip


def seeded(name: str, seed: int | None) -> str:
    """A row's run; of a row with seeds, that of one of them."""
    return name if seed is None else f"{name}-seed{seed}"


def places(rows: Sequence[Row], gpus: Sequence[str], cores: Sequence[int], at_a_time: int | None = None) -> list[Place]:
    """How rows share a machine: each the GPUs that the hungriest needs, in turn, and an even share of the cores.

    Raises:
        ConfigError: a row needs more GPUs than there are.
    """
    need = max(gpus_of(row.config) for row in rows)
    if need > len(gpus):
        hungry = next(row.name for row in rows if gpus_of(row.config) == need)
        raise ConfigError(f"rows.{hungry}", f"needs {need} GPUs, this machine has {len(gpus)}",
                          "Give it fewer (student.gpus, teacher.gpus), or join a cluster by RAY_ADDRESS")  # fmt: skip
    sets = [tuple(gpus[first : first + need]) for first in range(0, len(gpus) - need + 1, need)] if need else [()]
    count = min(at_a_time or len(sets), len(rows), len(cores))
    share = len(cores) // count
    return [Place(sets[n % len(sets)], tuple(cores[n * share : (n + 1) * share])) for n in range(count)]


def gpus_of(config: Config) -> int:
    """Whole GPUs in which a run's teachers and students find room together."""
    teachers = 0.0 if config.teacher.join else config.teacher.most * config.teacher.gpus
    return math.ceil(round(teachers + config.student.workers * config.student.gpus, 6))


def sweep(rows: Sequence[Row], free: list[Place], logs: Path) -> list[Row]:
    """Run all rows, as many at a time as there are places; returns those that came to their end."""
    logs.mkdir(parents=True, exist_ok=True)
    finished, lost = [row for row in rows if is_finished(row)], set[str]()
    waiting, running = [row for row in rows if row not in finished], list[Running]()
    for row in finished:
        print(f"[{row.name}] finished before: {row.config.run}", flush=True)
    said = time.monotonic()
    try:
        while waiting or running:
            for row in list(waiting):
                if missing := lost.intersection(row.waits_for):
                    waiting.remove(row)
                    lost.add(row.name)
                    print(f"[{row.name}] left out, since {min(missing)} did not come to its end", flush=True)
                elif free and {done.name for done in finished}.issuperset(row.waits_for):
                    waiting.remove(row)
                    running.append(_start(row, free.pop(0), logs))
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                free.append(run.place)
                ended_well = run.process.returncode == 0
                finished += [run.row] if ended_well else []
                lost |= set() if ended_well else {run.row.name}
                how = "finished" if ended_well else f"failed, {run.log}: {run.last_line()}"
                print(f"[{run.row.name}] {how} after {time.monotonic() - run.began:.0f} s", flush=True)
            if running and time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                for run in running:
                    print(f"[{run.row.name}] … {run.last_line()}", flush=True)
            time.sleep(LOOK_EVERY_S)
    finally:
        for run in running:
            run.process.terminate()  # it saves a checkpoint and ends its Ray
        for run in running:
            run.process.wait()
    return finished


def is_finished(row: Row) -> bool:
    """Whether every stage of the row has come to its end.

    Raises:
        ConfigError: one has, but under another configuration.
    """
    folder = RunFolder(row.config)
    return all(folder.finished(name) for name in row.config.stages)


def _start(row: Row, place: Place, logs: Path) -> Running:
    log = logs / f"{row.name}.log"
    where = f" on GPU {', '.join(place.gpus)}" if place.gpus else ""
    print(f"[{row.name}] begins{where}, says more in {log}: {row.command}", flush=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "bitdistill_ray.train", *row.arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env.for_child(place.gpus),
            start_new_session=True,
        )  # fmt: skip  (Ctrl-C is ours to pass on)
    env.keep_to(process.pid, place.cores)
    return Running(row, place, process, log, time.monotonic())


def side_by_side(rows: Sequence[Row], html: Path, against: str | None) -> str:
    """The Markdown table of finished rows, and of means over seeds; curves and table go to `html`."""
    runs = [gather(open_run(row.config.run, [a for a in row.arguments if a.startswith("storage.")]), weights=False)
            for row in rows]  # fmt: skip
    runs = [facts for facts in runs if facts.evaluation]
    if not runs:
        return "no row has an `evaluate` stage that came to its end"
    heads, cells = compare(runs)
    html.write_text(page(runs, heads, cells), encoding="utf-8")
    names = {SEED.sub("", facts.name) for facts in runs if facts.row_scores}
    means = pooled(runs, against if against in names else None)
    return markdown(heads, cells) + (f"\n\n{markdown(HEADS, means)}" if means else "")


def machine(at_a_time: int | None, rows: Sequence[Row]) -> list[Place]:
    """Places on this machine, or on the cluster of RAY_ADDRESS."""
    if env.ray_address():
        return [Place() for _ in range(min(at_a_time or 1, len(rows)))]
    return places(rows, env.visible_gpus(), env.cores(), at_a_time)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns 0, 1 where a row failed, 2 after an error that the user can mend."""
    command = argparse.ArgumentParser(prog="bitdistill sweep", description=__doc__.partition("\n\n")[2],
                                      formatter_class=argparse.RawDescriptionHelpFormatter,
                                      epilog=f"tables: {', '.join(shipped(TABLES))}")  # fmt: skip
    command.add_argument("table", metavar="TABLE")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="of every row")
    command.add_argument("--rows", metavar="ROW,…", help="only these, and those that they wait for")
    command.add_argument("--run", metavar="FOLDER", help="in place of the table's")
    command.add_argument("--at-a-time", type=_positive, metavar="N", help="rows; on one machine they share its GPUs")
    command.add_argument("--plan", action="store_true", help="print the rows' commands, and start nothing")
    options = command.parse_intermixed_args(argv)
    try:
        table = load_table(options.table)
        table = table if options.run is None else table.model_copy(update={"run": options.run.rstrip("/")})
        rows = rows_of(table, options.overrides, options.rows.split(",") if options.rows else ())
        if options.plan:
            print("\n".join(row.command for row in rows))
            return 0
        logs = _logs(table.run)
        with terminable():
            finished = sweep(rows, machine(options.at_a_time, rows), logs)
        print(side_by_side(finished, logs / "table.html", table.against))
    except BitdistillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"{str(interrupt) or 'interrupted'}; the same command continues the sweep", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    print(f"curves: {logs / 'table.html'}")
    return 0 if len(finished) == len(rows) else 1


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}: at least one row")
    return number


def _logs(run: str) -> Path:
    """Beside the rows' folders; here where those are elsewhere."""
    return Path("runs/logs") if "://" in run else Path(run) / "logs"


if __name__ == "__main__":
    sys.exit(main())
