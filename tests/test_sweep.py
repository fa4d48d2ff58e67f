"""Sweeps: which commands a table means, how rows share a machine, what becomes of a row whose branch fails."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdistill_ray import recipe, sweep
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.plan import preflight
from bitdistill_ray.shipped import shipped
from bitdistill_ray.stage_config import DistillStage
from bitdistill_ray.sweep_config import TABLES, TableConfig, load_table
from tests.road import tiny_overrides
from tests.tiny_models import save_tiny

TABLE = TableConfig.model_validate(
    {
        "recipe": "demo",
        "run": "runs/table",
        "set": ["stages.distill.tokens=64"],
        "rows": {
            "kl": {"branch": "clipped", "set": ["stages.distill.loss={forward_kl: 1}"]},
            "clipped": ["stages.distill=false"],
            "plain": None,
        },
    }
)


def test_a_row_is_one_train_command_and_comes_after_its_branch() -> None:
    rows = sweep.rows_of(TABLE, ["seed=3"])
    assert [row.name for row in rows] == ["clipped", "kl", "plain"]
    words = shlex.split(rows[1].command)
    overrides = ["stages.distill.tokens=64", "seed=3", "stages.distill.loss={forward_kl: 1}"]
    assert words == ["bitdistill", "train", "demo", *overrides, "run=runs/table/kl", "branch=runs/table/clipped"]
    assert recipe.load(words[2], words[3:]) == rows[1].config
    assert "distill" not in rows[0].config.stages
    stage = rows[1].config.stages["distill"]
    assert isinstance(stage, DistillStage)
    assert stage.loss.forward_kl == 1


def test_a_row_may_read_what_another_made() -> None:
    rows = {"second": {"after": "first", "set": ["model.student={run}/first/stages/distill/student"]}, "first": None}
    table = TableConfig.model_validate({"recipe": "demo", "run": "s3://bucket/table", "rows": rows})
    first, second = sweep.rows_of(table)
    assert (first.name, second.waits_for) == ("first", ("first",))
    assert second.config.model.student == "s3://bucket/table/first/stages/distill/student"
    assert second.config.branch is None


def test_a_row_with_seeds_is_a_run_for_each_and_follows_its_branch_seed_by_seed() -> None:
    task = {"recipe": "bitdistill-ternary", "run": "runs/t", "set": ["data=/c", "data.task=/t"], "against": "fp16"}
    rows = {
        "stage2": {"set": ["stages.finetune=false", "stages.distill=false"]},
        "fp16": {"branch": "stage2", "seeds": [0, 1], "set": ["stages.distill=false"]},
        "both": {"branch": "fp16", "seeds": [0, 1]},
        "once": {"branch": "fp16"},
    }
    table = TableConfig.model_validate({**task, "rows": rows})
    runs = {row.name: row for row in sweep.rows_of(table, only=["both", "once"])}
    assert list(runs) == ["stage2", "fp16-seed0", "fp16-seed1", "both-seed0", "both-seed1", "once"]
    assert runs["fp16-seed1"].waits_for == ("stage2",)
    assert runs["both-seed1"].waits_for == ("fp16-seed1",)
    assert runs["both-seed1"].config.branch == "runs/t/fp16-seed1"
    assert runs["once"].config.branch == "runs/t/fp16-seed0"
    seeds = {key: getattr(stage, "seed", None) for key, stage in runs["both-seed1"].config.stages.items()}
    assert (seeds["pretrain"], seeds["finetune"], seeds["distill"]) == (0, 1, 1)
    words = shlex.split(runs["both-seed1"].command)
    assert recipe.load(words[2], words[3:]) == runs["both-seed1"].config
    with pytest.raises(ConfigError, match="no row is called 'bf16'"):
        TableConfig.model_validate({**task, "rows": rows, "against": "bf16"})


def test_chosen_rows_bring_their_branches() -> None:
    assert [row.name for row in sweep.rows_of(TABLE, only=["kl"])] == ["clipped", "kl"]
    with pytest.raises(ConfigError, match=r"rows: there is none called 'jsd'. Known: kl, clipped, plain"):
        sweep.rows_of(TABLE, only=["jsd"])


def test_rows_that_branch_in_a_circle_are_refused() -> None:
    rows = {"a": {"branch": "b"}, "b": {"branch": "a"}}
    table = TableConfig.model_validate({"recipe": "demo", "run": "runs/x", "rows": rows})
    with pytest.raises(ConfigError, match=r"rows.a: waits in a circle: a -> b -> a"):
        sweep.rows_of(table)


@pytest.mark.parametrize("name", shipped(TABLES))
def test_every_shipped_table_is_made_of_runs_that_can_be_planned(name: str) -> None:
    rows = sweep.rows_of(load_table(name), ["data=/corpus"])
    assert len({row.config.run for row in rows}) == len(rows)


SMOLLM2_135M = {"model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
                "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
                "tie_word_embeddings": True}  # fmt: skip


def test_every_row_of_the_ternary_table_fits_its_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2_135M), encoding="utf-8")
    rows = sweep.rows_of(load_table("ternary-sst2"), ["data=/corpus", f"model.teacher={tmp_path}"])
    for row in rows:
        if row.name != "teacher-360m":
            preflight(row.config)
    mnli = {row.name: row for row in sweep.rows_of(load_table("ternary-mnli"), ["data=/corpus"])}
    assert mnli.keys() == {row.name for row in rows}
    assert "glue:mnli" in mnli["distilled-seed0"].config.data.task[0].path
    assert mnli["distilled-seed2"].config.branch == "runs/ternary-mnli/fp16-seed2"


@pytest.mark.parametrize(
    ("gpus", "cores", "at_a_time", "found"),
    [
        ("0123", 8, None, [("0", 2), ("1", 2), ("2", 2), ("3", 2)]),
        ("01", 9, 4, [("0", 2), ("1", 2), ("0", 2), ("1", 2)]),
        ("0", 2, 8, [("0", 1), ("0", 1)]),
    ],
)
def test_how_rows_share_a_machine(gpus: str, cores: int, at_a_time: int | None, found: list[tuple[str, int]]) -> None:
    one = sweep.rows_of(TABLE, ["teacher.gpus=0.3", "student.gpus=0.7"])
    rows = [row for _ in range(4) for row in one]
    shared = sweep.places(rows, list(gpus), range(cores), at_a_time)
    assert [("".join(place.gpus), len(place.cores)) for place in shared] == found
    assert len({core for place in shared for core in place.cores}) == sum(cores for _, cores in found)


def test_a_row_that_needs_more_gpus_than_there_are_is_refused() -> None:
    rows = sweep.rows_of(TABLE, ["teacher.gpus=0.3", "student.gpus=1"])
    assert sweep.gpus_of(rows[0].config) == 2
    with pytest.raises(ConfigError, match=r"rows.clipped: needs 2 GPUs, this machine has 1"):
        sweep.places(rows, ["0"], [0, 1])
    assert [place.gpus for place in sweep.places(rows, ["4", "5", "6"], [0, 1])] == [("4", "5")]


def test_rows_behind_a_row_that_fails_are_left_out_and_others_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        sweep.Row(name=name, arguments=("demo", *more), config=recipe.load("demo"), waits_for=before)
        for name, before, more in (("bad", (), ["stages.clpi=1"]), ("behind", ("bad",), ()), ("help", (), ["--help"]))
    ]
    finished = sweep.sweep(rows, [sweep.Place()], tmp_path)
    assert [row.name for row in finished] == ["help"]
    printed = capsys.readouterr().out
    assert f"[bad] failed, {tmp_path / 'bad.log'}: error: stages.clpi" in printed
    assert "[behind] left out, since bad did not come to its end" in printed
    assert "RECIPE" in (tmp_path / "help.log").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_sweep_makes_its_table_and_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "teacher-llama", "llama")
    common = [setting for setting in tiny_overrides(tmp_path) if not setting.startswith("run=")]
    common += [f"data={tmp_path}/corpus.txt", "stages.write=false", "stages.evaluate.written=false",
               "stages.distill.tokens=256"]  # fmt: skip
    (tmp_path / "corpus.txt").write_text("the cat sat on the mat and looked at the rain\n" * 80, encoding="utf-8")
    lines = ["recipe: demo", f"run: {tmp_path}/table", "set:", *(f"  - {setting}" for setting in common),
             "rows:", "  clipped: [stages.distill=false]",
             '  kl: {branch: clipped, set: ["stages.distill.loss={forward_kl: 1, cakld: 0}"]}']  # fmt: skip
    (tmp_path / "table.yaml").write_text("\n".join(lines), encoding="utf-8")
    arguments = ["sweep", str(tmp_path / "table.yaml")]
    assert sweep.main(arguments[1:]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in table] == [
        "student", "---", "teacher", "round-to-nearest", "clipped only", "clipped", "kl"]  # fmt: skip
    log = (tmp_path / "table/logs/kl.log").read_text(encoding="utf-8")
    assert f"[clip] taken over from {tmp_path}/table/clipped" in log
    assert "<table" in (tmp_path / "table/logs/table.html").read_text(encoding="utf-8")
    assert sweep.main(arguments[1:]) == 0
    again = capsys.readouterr().out
    assert f"[kl] finished before: {tmp_path}/table/kl" in again
    assert [line for line in again.splitlines() if line.startswith("| ")] == table
    assert (tmp_path / "table/logs/kl.log").read_text(encoding="utf-8") == log
    assert sweep.main([*arguments[1:], "seed=5"]) == 2
    assert "error: seed: was changed since stage" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.soak), (signal.SIGTERM, 143)]
)
def test_a_sweep_that_is_told_to_stop_ends_its_rows(tmp_path: Path, number: int, status: int) -> None:
    settings = "\n".join(f"  - {s}" for s in tiny_overrides(tmp_path) if not s.startswith("run="))
    table = f"recipe: demo\nrun: {tmp_path}/table\nset:\n{settings}\nrows: {{only: []}}\n"
    (tmp_path / "table.yaml").write_text(table, encoding="utf-8")
    command = [sys.executable, "-m", "bitdistill_ray.sweep", str(tmp_path / "table.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while not process.stdout.readline().startswith("[only] begins"):
            assert process.poll() is None
        log = tmp_path / "table/logs/only.log"  # made after that line was printed
        assert wait_for(lambda: log.exists() and "[write] begins" in log.read_text(encoding="utf-8"))
        process.send_signal(number)
        said = process.stderr.read()
    assert process.returncode == status
    assert "the same command continues the sweep" in said
    assert "Traceback" not in said
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in commands if str(tmp_path).encode() in line]


def wait_for(found: Callable[[], bool], seconds: float = 90) -> bool:
    end = time.monotonic() + seconds
    while not found() and time.monotonic() < end:
        time.sleep(0.2)
    return found()


def test_a_sweep_says_what_is_wrong_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["int2-10m"]) == 2  # no data
    assert capsys.readouterr().err.count("\n") == 1
    assert sweep.main(["int9"]) == 2
    assert "there is none called 'int9'. Shipped: " in capsys.readouterr().err


def test_the_row_of_the_recipe_is_the_recipe_at_the_tables_budget() -> None:
    """The table's other rows start and learn otherwise; this one undoes all of that."""
    rows = {row.name: row.config for row in sweep.rows_of(load_table("int2-10m"), ["data=corpus"])}
    as_shipped = recipe.load("bitdistiller-int2", ["data=corpus", "stages.write=false"])
    found = rows["recipe"]
    assert list(found.stages) == list(as_shipped.stages)
    for key in ("refine", "reconstruct"):
        assert found.stages[key] == as_shipped.stages[key]
    at_budget = {"tokens": 10_000_000, "checkpoint_every": 300}
    assert found.stages["distill"] == as_shipped.stages["distill"].model_copy(update=at_budget)
    others = [config.stages.get("distill") for name, config in rows.items() if name != "recipe"]
    assert found.stages["distill"] not in others
