"""A run's folder, on a disk and on S3: what is finished stays so, what is half made is never seen."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from bitdistill_ray import recipe
from bitdistill_ray.config import Config
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.runs import RunFolder, StageRecord, provenance


class Runs:
    """Opens the same run under one configuration after the other."""

    def __init__(self, *where: str) -> None:
        self.where = where

    def config(self, *overrides: str) -> Config:
        return recipe.load("demo", [*self.where, *overrides])

    def open(self, *overrides: str) -> RunFolder:
        return RunFolder(self.config(*overrides))


@pytest.fixture(params=["local", "s3"])
def runs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setenv("BITDISTILL_CACHE", str(tmp_path / "cache"))
    if request.param == "local":
        return Runs(f"run={tmp_path / 'run'}")
    bucket, endpoint = (request.getfixturevalue(name) for name in ("s3_bucket", "s3_endpoint"))
    return Runs(f"run={bucket}/runs/one", f"storage.endpoint_url={endpoint}")


RECORD = StageRecord("write", "write", {"text": "stages/write/text"}, {"kept": 3, "teacher": "ab"})


def publish(run: RunFolder, path: str, **files: str) -> None:
    with run.publish(path) as folder:
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")


def content(run: RunFolder, path: str) -> dict[str, str]:
    folder = run.fetch(path)
    return {f.name: f.read_text(encoding="utf-8") for f in folder.iterdir() if not f.name.startswith(".")}


def test_the_configuration_in_the_folder_is_the_one_that_runs(runs: Runs, tmp_path: Path) -> None:
    run = runs.open("seed=7")
    run.begin()
    (tmp_path / "again.yaml").write_bytes(run.storage.read_bytes("config.yaml"))
    assert recipe.load(str(tmp_path / "again.yaml")) == run.config


def test_a_finished_stage_is_known_to_later_processes(runs: Runs) -> None:
    assert runs.open().finished("write") is None
    runs.open().finish(RECORD)
    assert runs.open().finished("write") == RECORD
    assert runs.open().finished("refine") is None


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.teacher=other", "model.teacher"),
        ("quant.format=int3", "quant.format"),
        ("data.sequence_length=64", "data.sequence_length"),
        ("data=/corpus", "data.sources"),
        ("stages.write.texts=9", "stages.write.texts"),
        ("seed=1", "seed"),
    ],
)
def test_a_stage_that_finished_under_another_configuration_is_refused_by_key(
    override: str, key: str, runs: Runs
) -> None:
    runs.open().finish(RECORD)
    with pytest.raises(ConfigError) as refusal:
        runs.open(override).finished("write")
    assert refusal.value.where == key
    assert "since stage 'write'" in refusal.value.what
    assert "run=" in refusal.value.remedy


@pytest.mark.parametrize(
    "override",
    ["student.workers=2", "teacher.actors=3", "stages.distill.tokens=8", "stages.clip=false", "monitor.codes_every=3"],
)
def test_resources_and_later_stages_may_change(override: str, runs: Runs) -> None:
    runs.open().finish(RECORD)
    assert runs.open(override).finished("write") == RECORD


def test_a_stage_in_front_may_not_change(runs: Runs) -> None:
    runs.open().finish(StageRecord("distill", "distill"))
    with pytest.raises(ConfigError, match=r"^stages\.clip\.grid: was changed since stage 'distill'"):
        runs.open("stages.clip.grid=9").finished("distill")
    with pytest.raises(ConfigError, match=r"^stages\.clip: was changed"):
        runs.open("stages.clip=false").finished("distill")


def test_a_key_that_an_older_version_did_not_have_changes_nothing_until_it_is_set(runs: Runs) -> None:
    run = runs.open()
    run.finish(RECORD)
    done = json.loads(run.storage.read_bytes("stages/write/done.json"))
    del done["depends_on"]["data"]["task"]
    run.storage.write_bytes("stages/write/done.json", json.dumps(done).encode())
    assert run.finished("write") == RECORD
    with pytest.raises(ConfigError, match=r"^data\.task: was changed"):
        runs.open("data.task=/pairs").finished("write")


def test_the_newest_artefact_of_a_role_wins(runs: Runs) -> None:
    run = runs.open()
    assert run.latest("student") is None
    for name in ("refine", "clip", "distill"):
        run.finish(StageRecord(name, name, {"student": f"stages/{name}/student"}))
    assert run.latest("student") == "stages/distill/student"
    assert run.latest("student", before="distill") == "stages/clip/student"
    assert run.latest("student", before="refine") is None
    assert run.latest("packed") is None


def test_an_artefact_appears_when_it_is_whole(runs: Runs) -> None:
    run = runs.open()
    with run.publish("stages/clip/student") as folder:
        (folder / "weights").write_text("new", encoding="utf-8")
        assert not run.storage.exists("stages/clip/student")
    assert content(run, "stages/clip/student") == {"weights": "new"}


def test_an_exception_leaves_the_old_artefact_and_no_litter(runs: Runs) -> None:
    run = runs.open()
    publish(run, "stages/clip/student", weights="old")
    before = run.storage.list()
    with pytest.raises(ZeroDivisionError), run.publish("stages/clip/student") as folder:
        fail_half_way(folder)
    assert run.storage.list() == before
    assert content(run, "stages/clip/student") == {"weights": "old"}


def fail_half_way(folder: Path) -> None:
    (folder / "weights").write_text("half", encoding="utf-8")
    raise ZeroDivisionError


def test_a_new_artefact_replaces_the_old_one_as_a_whole(runs: Runs) -> None:
    run = runs.open()
    publish(run, "stages/clip/student", weights="old", extra="old")
    assert content(run, "stages/clip/student") == {"weights": "old", "extra": "old"}
    publish(run, "stages/clip/student", weights="new")
    assert content(run, "stages/clip/student") == {"weights": "new"}


def test_a_run_travels_to_other_processes(runs: Runs) -> None:
    run = runs.open()
    run.finish(RECORD)
    assert pickle.loads(pickle.dumps(run)).finished("write") == RECORD


def test_provenance_is_json_and_says_where_a_student_comes_from(runs: Runs) -> None:
    said = provenance(runs.config("data=s3://bucket/corpus", "quant.format=int2"), stage="distill")
    assert json.loads(json.dumps(said)) == said
    assert (said["stage"], said["data"]) == ("distill", ["s3://bucket/corpus"])
    assert said["recipe"]["quant"]["format"] == "int2"
    assert {"bitdistill-ray", "python", "torch", "ray", "deepspeed", "transformers"} == set(said["versions"])


def test_a_branch_takes_over_what_is_the_same_and_nothing_after_it(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk = runs.open("stages.clip.tasks=3")
    trunk.begin()
    for name, role in (("write", "text"), ("refine", "student"), ("clip", "student")):
        publish(trunk, f"stages/{name}/{role}", weights=f"of {name}")
        trunk.finish(StageRecord(name, name, {role: f"stages/{name}/{role}"}, {"seconds": 1.0}))
    where = trunk.storage.url
    branch = RunFolder(runs.config("stages.clip.grid=7", f"branch={where}").model_copy(update={"run": f"{where}-b"}))
    assert branch.take_over("write") == trunk.finished("write")
    assert branch.take_over("refine") is not None
    assert branch.take_over("clip") is None
    said = capsys.readouterr().out
    assert f"[refine] taken over from {where}" in said
    assert f"[clip] not taken over from {where}, whose stages.clip.grid is another" in said
    assert branch.take_over("distill") is None  # which the trunk has not
    assert branch.latest("student") == "stages/refine/student"
    assert content(branch, "stages/refine/student") == {"weights": "of refine"}
    assert content(trunk, "stages/refine/student") == {"weights": "of refine"}
    same = RunFolder(runs.config(f"branch={where}").model_copy(update={"run": f"{where}-c"}))
    assert same.take_over("clip") is not None  # how many tasks made it does not matter


def test_a_branch_of_no_run_is_refused(runs: Runs) -> None:
    assert runs.open().take_over("write") is None
    with pytest.raises(ConfigError, match=r"branch: there is no run at .*nowhere"):
        runs.open(f"branch={runs.open().storage.url}/nowhere").take_over("write")


def test_a_run_from_before_a_key_goes_on(runs: Runs) -> None:
    run = runs.open()
    publish(run, "stages/clip/student", weights="w")
    run.finish(StageRecord("clip", "clip", {"student": "stages/clip/student"}))
    path = "stages/clip/done.json"
    assert "tasks" not in json.loads(run.storage.read_bytes(path))["depends_on"]["stages"]["clip"]
    assert run.finished("clip") is not None
