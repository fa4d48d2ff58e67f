"""What goes wrong in a run gets one clear line, and the last good checkpoint stays.

Each fault is the real one: a bucket that is not there, a disk that is full, a cluster without room.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bitdistill_ray.errors import ConfigError, DataError, ModelError, ResourceError, StorageError, TeacherError
from bitdistill_ray.stages import room, training
from bitdistill_ray.storage import Storage
from bitdistill_ray.train import main, run
from tests.integration.curves import overrides_of
from tests.integration.disturbed import infinite_gradient, nan_loss
from tests.road import tiny_config, tiny_overrides
from tests.tiny_models import save_tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

TRAIN_ONLY = ("stages.write=false", "stages.clip=false", "stages.export=false", "stages.evaluate=false")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(f'{{"text": "the cat number {i} sat on the mat"}}' for i in range(100)))
    return file


def rows_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_bucket_that_does_not_exist(tmp_path: Path, s3_endpoint: str) -> None:
    config = tiny_config(tmp_path, "data=s3://no-such-bucket-here/corpus", f"storage.endpoint_url={s3_endpoint}",
                         *TRAIN_ONLY)  # fmt: skip
    with pytest.raises(StorageError, match="no such bucket"):
        run(config)


def test_a_run_in_a_bucket_that_does_not_exist(tmp_path: Path, corpus: Path, s3_endpoint: str) -> None:
    config = tiny_config(tmp_path, f"data={corpus}", f"storage.endpoint_url={s3_endpoint}", *TRAIN_ONLY,
                         run="s3://no-such-bucket-here/run")  # fmt: skip
    with pytest.raises(StorageError, match="no such bucket"):
        run(config)


def test_a_corpus_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"the cat " * 10 + b"\xff\xfe" + b" sat" * 10)
    with pytest.raises(DataError, match="not UTF-8 at byte 80"):
        run(tiny_config(tmp_path, f"data={tmp_path}/bad.txt", *TRAIN_ONLY))


def test_teacher_and_student_of_different_vocabularies(tmp_path: Path, corpus: Path) -> None:
    other = save_tiny(tmp_path / "other", "llama")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 64}))
    with pytest.raises(ConfigError, match=r"model\.student: has 384 tokens, the teacher 320"):
        run(tiny_config(tmp_path, f"data={corpus}", f"model.student={other}", *TRAIN_ONLY))


def test_a_student_with_another_tokenizer(tmp_path: Path, corpus: Path) -> None:
    other = save_tiny(tmp_path / "other", "llama")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"!":', '"¡":', 1))
    with pytest.raises((TeacherError, ModelError), match="tokenizer"):
        run(tiny_config(tmp_path, f"data={corpus}", f"model.student={other}", *TRAIN_ONLY))


def test_a_teacher_that_does_not_exist_names_what_is_missing(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        run(tiny_config(tmp_path, f"data={corpus}", "model.teacher=./nowhere", *TRAIN_ONLY))


def test_a_typo_is_one_line_with_the_nearest_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *tiny_overrides(tmp_path, "stages.distill.learnin_rate=1")]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == (
        "error: stages.distill.learnin_rate: unknown key (value 1). Did you mean 'stages.distill.learning_rate'?"
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            ("student.cpus=1000", "student.start_timeout_s=2"),
            r"no room for 2 s: 1 x \(CPU 1000\) asked for, free: CPU [\d.]+ of",
        ),
        (
            ("student.workers=40", "student.start_timeout_s=5", "student.max_failures=0"),
            r"no room for 5 s: 40 x \(CPU 1\) asked for, free: CPU",
        ),
    ],
    ids=["a task", "workers"],
)
def test_a_cluster_without_room_is_given_up_with_what_it_lacks(
    victim: Path, asked: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Tasks and student workers alike; meanwhile the wait is said aloud."""
    monkeypatch.setattr(room, "SAY_EVERY_S", 0.5)
    if "student.cpus=1000" in asked:
        shutil.rmtree(victim / "stages")
    config = tiny_config(victim.parent, *overrides_of(victim.parent), *asked,
                         "stages.distill.batch_sequences=80", "stages.distill.quant_warmup_steps=0",
                         run=str(victim))  # fmt: skip
    with pytest.raises(ResourceError, match=said):
        run(config)
    assert "waiting for room for" in "".join(capfd.readouterr())


def test_teachers_that_find_no_room_end_the_students_that_wait_for_them(victim: Path) -> None:
    config = tiny_config(victim.parent, *overrides_of(victim.parent), "teacher.cpus=1000", "teacher.timeout_s=3",
                         run=str(victim))  # fmt: skip
    with pytest.raises(TeacherError, match="did not start in 3 s"):
        run(config)
    assert not Storage(victim).exists("stages/distill/done.json")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"may not mount a tmpfs here: {mounted.stderr.decode().strip()}")
    with ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
        yield folder


def test_a_full_disk_keeps_the_last_good_checkpoint(
    tmp_path: Path, corpus: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk fills up while a checkpoint is written; with room again, the command continues from the one before."""
    overrides = (f"data={corpus}", *TRAIN_ONLY, "stages.distill.tokens=1024", "student.max_failures=0",
                 "stages.distill.keep_checkpoints=1")  # fmt: skip
    config = tiny_config(tmp_path, *overrides, run=str(small_disk / "run"))
    ballast = small_disk / "ballast"
    filler = subprocess.Popen([sys.executable, "-c", FILL_AFTER_A_CHECKPOINT, str(small_disk)])
    with pytest.raises(StorageError, match="no space left"):
        run(config)
    assert filler.wait(30) == 0
    ballast.unlink()
    run(config)
    assert "resumes at step" in capsys.readouterr().out
    assert [row["step"] for row in rows_of(small_disk / "run")] == list(range(8))


# Fills the disk to the last byte when the first checkpoint is complete.
FILL_AFTER_A_CHECKPOINT = """
import os, sys, time
disk = sys.argv[1]
deadline = time.time() + 240
while time.time() < deadline:
    if os.path.exists(f"{disk}/run/checkpoints/distill/latest.json"):
        with open(f"{disk}/ballast", "wb", buffering=0) as file:
            try:
                while True: file.write(b"x" * 4096)
            except OSError: sys.exit(0)
    time.sleep(0.01)
sys.exit(1)
"""


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        pytest.param(nan_loss, "the loss of step 0 is nan", marks=pytest.mark.soak),
        (infinite_gradient, "the gradient norm of step 0 is inf"),
    ],
)
def test_storage_is_left_alone_by_a_stage_that_fails(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., None], said: str
) -> None:
    """A failing stage publishes nothing: the run holds what the stages before it made."""
    monkeypatch.setattr(training, "train_worker", broken)
    config = tiny_config(tmp_path, f"data={corpus}", *TRAIN_ONLY, "student.dtype=fp32", "student.max_failures=0")
    with pytest.raises(ModelError, match=said):
        run(config)
    storage = Storage(tmp_path / "run")
    assert storage.is_complete("stages/refine/student")
    assert not storage.exists("stages/distill/student")
    assert not storage.exists("stages/distill/done.json")
