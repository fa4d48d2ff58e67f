"""A pool with a name: started by one process, used by others, refused where it does not fit, ended by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from bitdistill_ray import recipe
from bitdistill_ray.config import Dtype, TeacherConfig
from bitdistill_ray.core import Payload
from bitdistill_ray.errors import BitdistillError, TeacherError
from bitdistill_ray.model.identity import ModelIdentity
from bitdistill_ray.plan import describe
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.handshake import Offer, refuse_offer
from bitdistill_ray.teacher.pool import TeacherPool
from bitdistill_ray.teacher_pools import main
from tests.teacher.pools import batches, check_answers, client_of, pool_config
from tests.tiny_models import save_tiny

ROOT = Path(__file__).resolve().parent.parent.parent

ANOTHER_JOB = """
import json, sys
import ray
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.pool import TeacherPool
from tests.teacher.pools import batches, check_answers, client_of, pool_config
ray.init(address=sys.argv[1], log_to_driver=False)
pool = TeacherPool.join("shared", sys.argv[2], pool_config(), tokenizer=sys.argv[2])
client, asked = client_of(pool), batches(3)
check_answers(client, asked, [client.ask(wire.encode_batch(b)) for b in asked], sys.argv[2])
print(json.dumps({"job": ray.get_runtime_context().get_job_id(), "weights": pool.identity.weights}))
pool.shutdown()
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("teacher"), "llama"))


@pytest.fixture(scope="module")
def cluster(ray_session: None) -> Iterator[str]:
    """Address of this session's Ray; pools that a failed test leaves are ended."""
    yield ray.get_runtime_context().gcs_address
    for name in ("shared", "nonesuch"):
        if f"teacher-pool/{name}" in {a["name"] for a in ray.util.list_named_actors(all_namespaces=True)}:
            TeacherPool.down(name)


def command(cluster: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, and so a job of its own."""
    environment = {**os.environ, "RAY_ADDRESS": cluster}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment,
                          timeout=300)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pool_started_by_one_job_serves_two_others(
    cluster: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    up = command(cluster, "-m", "bitdistill_ray.cli", "teacher", "up", "shared", f"model.teacher={source}",
                 "teacher.dtype=fp32", "teacher.cpus=0.5", "teacher.threads=1", "teacher.actors=2")  # fmt: skip
    assert up.returncode == 0, up.stderr
    assert "runs join it with teacher.join=shared" in up.stdout

    joined = TeacherPool.open(source, pool_config(join="shared"), tokenizer=source)  # `up` has ended, its pool has not
    other = subprocess.Popen([sys.executable, "-c", ANOTHER_JOB, cluster, source], stdout=subprocess.PIPE, text=True,
                             cwd=ROOT)  # fmt: skip
    client, asked = client_of(joined), batches(8)
    check_answers(client, asked, [client.ask(wire.encode_batch(batch)) for batch in asked], source)
    printed, _ = other.communicate(timeout=240)
    assert other.returncode == 0
    said = json.loads(printed.splitlines()[-1])
    assert said["job"] != ray.get_runtime_context().get_job_id()
    assert said["weights"] == joined.identity.weights

    joined.shutdown()  # leaves what is not its own
    assert main(["status", "shared", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert [member["state"] for member in status["members"]] == ["live", "live"]
    assert status["clients"] == 2
    assert main(["status", "shared"]) == 0
    assert "2 teachers of 2 to 2" in capsys.readouterr().out

    with pytest.raises(TeacherError, match=r"teacher pool 'shared': is up already\. Join it, or end it with"):
        TeacherPool.start(source, pool_config(), name="shared")
    with pytest.raises(TeacherError, match=r"teacher pool 'shared': its model is .*, this run's teacher gpt2\. Join"):
        TeacherPool.join("shared", "gpt2", pool_config())

    assert main(["down", "shared"]) == 0
    assert capsys.readouterr().out == "shared: down\n"
    assert main(["status", "shared"]) == 2
    assert "error: teacher pool 'shared': is not up on this cluster (up: none)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_pool_that_is_not_there_is_named(source: str) -> None:
    with pytest.raises(TeacherError) as refusal:
        TeacherPool.open(source, pool_config(join="nonesuch"))
    assert str(refusal.value) == (
        "teacher pool 'nonesuch': is not up on this cluster (up: none). "
        "Start it with `bitdistill teacher up nonesuch`, and see RAY_ADDRESS"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_pool_that_cannot_load_leaves_no_name(tmp_path: Path) -> None:
    with pytest.raises(BitdistillError, match="nowhere"):
        TeacherPool.start(str(tmp_path / "nowhere"), pool_config(), name="nonesuch")
    with pytest.raises(TeacherError, match="is not up on this cluster"):
        TeacherPool.status_of("nonesuch")


OFFER = Offer(
    source="org/model",
    identity=ModelIdentity(name="org/model", vocab_size=320, tokenizer="aaaa", config="cccc", weights="wwww"),
    description="org/model on cpu",
    dtype=Dtype.BF16,
)


@pytest.mark.parametrize(
    ("offer", "config", "tokenizer", "said"),
    [
        (replace(OFFER, version="0.0.1"), {}, None, r"runs bitdistill-ray 0\.0\.1, this is "),
        (replace(OFFER, source="org/other"), {}, None, r"its model is org/other, this run's teacher org/model"),
        (OFFER, {}, "bbbb", r"its tokenizer has hash aaaa, the student's bbbb"),
        (OFFER, {"dtype": Dtype.FP32}, "aaaa", r"computes in bf16, teacher\.dtype is fp32"),
        (replace(OFFER, payloads=("topk",)), {}, "aaaa", r"sends topk, teacher\.payload is hidden"),
        (OFFER, {"payload": Payload.TOPK, "topk": 400}, "aaaa", r"has 320 tokens, teacher\.topk is 400"),
    ],
)
def test_what_does_not_fit_is_one_line(
    offer: Offer, config: dict[str, object], tokenizer: str | None, said: str
) -> None:
    with pytest.raises(TeacherError, match=rf"^teacher pool 'big': {said}") as refusal:
        refuse_offer("big", offer, source="org/model", config=TeacherConfig(**config), tokenizer=tokenizer)
    assert "\n" not in str(refusal.value)


def test_what_fits_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_offer("big", OFFER, source="org/model", config=TeacherConfig(), tokenizer="aaaa")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    here = replace(OFFER, source=str(tmp_path / "model"))
    refuse_offer("big", here, source="./model", config=TeacherConfig(dtype=Dtype.BF16), tokenizer="aaaa")


def test_a_plan_says_whose_teachers_they_are(source: str) -> None:
    base = [f"model.teacher={source}", "quant.group_size=16"]
    assert "those of the pool 'big' x (" in describe(recipe.load("demo", [*base, "teacher.join=big"]))
    elastic = recipe.load("demo", [*base, "teacher.actors=2", "teacher.max_actors=5"])
    assert "2 (2 to 5) actors x (" in describe(elastic)


def test_the_command_refuses_a_mistake_before_it_looks_for_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "big", "teacher.actor=2"]) == 2
    assert "Did you mean 'teacher.actors'?" in capsys.readouterr().err
