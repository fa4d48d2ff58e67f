"""Trackers against what their readers read: event files, Ray's metrics agent, W&B's and MLflow's own files."""

from __future__ import annotations

import struct
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from tensorboardX.proto.event_pb2 import Event

from bitdistill_ray import recipe
from bitdistill_ray.errors import BitdistillError, ConfigError, StorageError
from bitdistill_ray.monitor_config import MlflowConfig, MonitorConfig, WandbConfig
from bitdistill_ray.storage import Storage
from bitdistill_ray.student.monitor import Monitor
from bitdistill_ray.tracking.base import figures
from bitdistill_ray.tracking.prometheus import metric_name
from bitdistill_ray.tracking.tensorboard import TensorBoard

QUIET = MonitorConfig(tensorboard=False, prometheus=False)


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.0 - 0.1 * step, "forward_kl@5": 1.5, "tokens": 100, "grad_norm": None, **more}


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Every scalar of the event files, in order, without those that a later file takes back, as TensorBoard reads."""
    kept: list[tuple[str, int, float]] = []
    for file in sorted(folder.iterdir(), key=lambda path: path.name.split(".")[-2:]):
        for event in events(file.read_bytes()):
            if event.HasField("session_log"):
                kept = [entry for entry in kept if entry[1] < event.step]
            kept += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return kept


def events(content: bytes) -> Iterator[Any]:
    """TFRecord: a length, its checksum, the event, its checksum."""
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_event_files_hold_every_figure_and_a_restart_takes_back_what_it_repeats(tmp_path: Path) -> None:
    board = TensorBoard(Storage(tmp_path), "distill")
    board.rewind(0)
    for step in range(4):
        board.step(row(step))
    board.rewind(2)
    for step in (2, 3):
        board.step(row(step, loss=9.0))
    board.close()
    found = scalars(tmp_path / "tensorboard/distill")
    losses = [(step, pytest.approx(value)) for tag, step, value in found if tag == "loss"]
    assert losses == [(0, 2.0), (1, 1.9), (2, 9.0), (3, 9.0)]
    assert {tag for tag, _, _ in found} == {"loss", "forward_kl_at_5", "tokens"}


def test_event_files_reach_object_storage(s3_bucket: str, s3_endpoint: str) -> None:
    run = Storage(f"{s3_bucket}/run", endpoint_url=s3_endpoint)
    board = TensorBoard(run, "distill")
    board.step(row(0))
    board.close()
    [name] = run.list("tensorboard/distill")
    path = name if name.startswith("tensorboard") else f"tensorboard/distill/{name}"
    assert any(value.tag == "loss" for event in events(run.read_bytes(path)) for value in event.summary.value)


def test_figures_are_the_finite_numbers_of_a_row() -> None:
    assert figures({"step": 3, "loss": 1, "grad_norm": None, "stage": "x", "mfu": float("nan")}) == {"loss": 1.0}
    assert metric_name("forward_kl@5") == "bitdistill_train_forward_kl_5"


class Failing:
    """A tracker whose service goes away."""

    name, errors = "Failing", (StorageError,)

    def step(self, row: Any) -> None:
        raise StorageError("service", "gone", "Wait")

    rewind = flush = close = step


def test_a_tracker_that_fails_is_left_out_with_a_word_and_rows_go_on(tmp_path: Path) -> None:
    monitor = Monitor(Storage(tmp_path), "distill")
    monitor.track(MonitorConfig(prometheus=False))
    monitor.trackers.insert(0, Failing())  # type: ignore[arg-type]
    for step in range(3):
        monitor.step(row(step))
    monitor.finish()
    assert monitor.said == ["Failing failed (service: gone. Wait): it is told nothing more of this stage"]
    assert [r["step"] for r in monitor.own_rows()] == [0, 1, 2]
    assert len([s for tag, s, _ in scalars(tmp_path / "tensorboard/distill") if tag == "loss"]) == 3


@pytest.mark.parametrize("module", ["wandb", "mlflow"])
def test_a_package_that_is_not_there_is_one_line_before_anything_starts(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitdistill_ray.monitor_config.find_spec", lambda name: None)
    with pytest.raises(BitdistillError, match=f"monitor.{module}: the package {module} is not installed"):
        recipe.load("demo", [f"monitor.{module}={{}}"])


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_prometheus_reads_the_figures_from_rays_metrics_agent(tmp_path: Path, ray_session: None) -> None:
    monitor = ray.remote(Monitor).options(num_cpus=0).remote(Storage(tmp_path), "distill")  # type: ignore[attr-defined]
    ray.get(monitor.track.remote(MonitorConfig(tensorboard=False)))
    ray.get([monitor.step.remote(row(step)) for step in range(3)])
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {f"ray_{metric_name('loss')}": 1.8, f"ray_{metric_name('step')}": 2.0,
              f"ray_{metric_name('tokens')}_total": 300.0}  # fmt: skip
    found: dict[str, float] = {}
    for _ in range(90):  # Ray exports every 10 s
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if f'run="{tmp_path}"' in line]
        found = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
        if found.items() >= wanted.items() and all('stage="distill"' in line for line in lines):
            break
        time.sleep(2)
    ray.kill(monitor)
    assert {name: found.get(name) for name in wanted} == pytest.approx(wanted)


def test_wandb_offline_keeps_its_files_in_the_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is an optional package")
    monitor = Monitor(Storage(tmp_path), "distill")
    monitor.track(QUIET.model_copy(update={"wandb": WandbConfig(mode="offline")}))
    for step in range(3):
        monitor.step(row(step))
    monitor.finish()
    assert monitor.said == []
    [file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"loss" in file.read_bytes()


def test_mlflow_finds_a_stage_again_and_holds_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is an optional package")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path}/mlruns"
    for steps in (range(2), range(2, 4)):
        monitor = Monitor(Storage(tmp_path), "distill")
        monitor.track(QUIET.model_copy(update={"mlflow": MlflowConfig(uri=uri)}))
        for step in steps:
            monitor.step(row(step))
        monitor.finish()
        assert monitor.said == []
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("bitdistill")
    [run] = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(step, pytest.approx(2.0 - 0.1 * step)) for step in range(4)]
    assert run.info.status == "FINISHED"


def test_a_service_that_refuses_stops_the_stage_before_it_trains(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="MLflow is an optional package")
    (tmp_path / "taken").write_text("a file where a folder should be")
    monitor = Monitor(Storage(tmp_path), "distill")
    with pytest.raises(ConfigError, match="cannot be started"):
        monitor.track(QUIET.model_copy(update={"mlflow": MlflowConfig(uri=f"file:{tmp_path}/taken/mlruns")}))
