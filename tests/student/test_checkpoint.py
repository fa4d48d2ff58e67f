"""Checkpoints of a real DeepSpeed engine over gloo: another number of workers, damage, the policy of what is kept."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitdistill_ray.config import StudentConfig
from bitdistill_ray.stage_config import DistillStage
from bitdistill_ray.storage import Storage
from bitdistill_ray.student.checkpoint import Checkpoints, Position, forget, newest_good, recorded
from bitdistill_ray.student.engine import start_engine
from bitdistill_ray.student.resume import Place, new_attempt, resume
from bitdistill_ray.student.retention import Saved, kept

STEPS, BATCH = 6, 8
STAGE = DistillStage(batch_sequences=BATCH, learning_rate=0.05, warmup=0.5, weight_decay=0.1)


def train(rank: int, ranks: int, port: int, root: str, zero: Literal[0, 1, 2, 3], until: int, save_at: int) -> None:
    """From the newest checkpoint to step `until`, saving after `save_at`; rank 0 appends its losses to a file."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks),
                      LOCAL_RANK=str(rank))  # fmt: skip
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 17), nn.LayerNorm(17), nn.Tanh(), nn.Linear(17, 3))
    student = StudentConfig(workers=ranks, zero=zero, micro_batch=BATCH // ranks)
    engine = start_engine(model, stage=STAGE, student=student, steps=STEPS, dtype=torch.float32)
    device, run = torch.device("cpu"), Storage(root)
    attempt = new_attempt(device)
    place = Place(rank=rank, ranks=ranks, local_rank=rank, node=0)
    position = resume(engine, run=run, stage="s", place=place, attempt=attempt, zero=zero, device=device, say=print)
    checkpoints = Checkpoints(run, "s", rank=rank, ranks=ranks, attempt=attempt, zero=zero, last=2, best=0,
                              timeout_s=60, say=print)  # fmt: skip
    for step in range(position.step, until):
        generator = torch.Generator().manual_seed(step)
        x_BK, y_BN = torch.randn(BATCH, 6, generator=generator), torch.randn(BATCH, 3, generator=generator)
        share = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        loss = (engine(x_BK[share]) - y_BN[share]).square().mean()
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        if rank == 0:
            with (Path(root) / f"losses-{ranks}.jsonl").open("a") as file:
                row = [step, mean.item(), engine.get_lr()[0], float(engine.get_global_grad_norm())]
                file.write(json.dumps(row) + "\n")
        if step + 1 == save_at:
            checkpoints.save(engine, Position(step + 1, {"step": step + 1}), loss=mean.item())
    checkpoints.close()
    dist.barrier()
    dist.destroy_process_group()


def spawn(ranks: int, root: Path, zero: int, *, until: int, save_at: int) -> list[list[float]]:
    """Run `train` in `ranks` processes; the rows of (step, loss, learning rate, gradient norm) that it made."""
    file = root / f"losses-{ranks}.jsonl"
    file.unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(train, (ranks, port, str(root), zero, until, save_at), nprocs=ranks)
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_a_checkpoint_loads_at_another_number_of_workers(tmp_path: Path, zero: int) -> None:
    """1 worker to the end; from its checkpoint 2 workers go on; from theirs 1 worker does: one curve."""
    whole = spawn(1, tmp_path, zero, until=STEPS, save_at=2)
    two = spawn(2, tmp_path, zero, until=4, save_at=4)
    one = spawn(1, tmp_path, zero, until=STEPS, save_at=0)
    assert [row[0] for row in two] == [2, 3]
    assert [row[0] for row in one] == [4, 5]
    torch.testing.assert_close(torch.tensor(two), torch.tensor(whole[2:4]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.tensor(one), torch.tensor(whole[4:]), rtol=1e-5, atol=1e-7)


def stored(run: Storage, root: Path, step: int, *, best: int = 0, loss: float | None = None) -> Saved:
    """A checkpoint of one rank with files in place of an engine's."""
    scratch = root / f"scratch-{step}"
    (scratch / "state").mkdir(parents=True)
    (scratch / "state" / "weights.pt").write_bytes(bytes(1000))
    saved = Saved(f"step-{step:08}-a", step, ranks=1, zero=1, loss=loss)
    writer = Checkpoints(run, "s", rank=0, ranks=1, attempt="a", zero=1, last=2, best=best, timeout_s=5, say=print)
    writer._upload(str(scratch), saved)
    return saved


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(tmp_path / "store")
    bucket = request.getfixturevalue("s3_bucket")
    return Storage(f"{bucket}/run", endpoint_url=request.getfixturevalue("s3_endpoint"))


@pytest.mark.parametrize("damage", ["upload cut in half", "file cut short", "file lost", "manifest lost"])
def test_a_checkpoint_upload_cut_in_half_is_never_taken_for_good(store: Storage, tmp_path: Path, damage: str) -> None:
    """What ended before its record is invisible; what was damaged after it is passed over for the one before."""
    good = stored(store, tmp_path, 2)
    if damage == "upload cut in half":
        store.write_bytes("checkpoints/s/step-00000004-a/rank-0/state/weights.pt", bytes(500))
    else:
        stored(store, tmp_path, 4)
        rank = "checkpoints/s/step-00000004-a/rank-0"
        match damage:
            case "file cut short":
                store.write_bytes(f"{rank}/state/weights.pt", bytes(500))
            case "file lost":
                store.delete(f"{rank}/state/weights.pt")
            case _:
                store.delete(f"{rank}/.complete.json")
    said: list[str] = []
    assert newest_good(store, "s", said.append) == good
    assert said == ([] if damage == "upload cut in half" else
                    ["the checkpoint of step 4 is damaged: going by the one before"])  # fmt: skip


def test_a_checkpoint_waits_for_every_ranks_part(tmp_path: Path) -> None:
    """Rank 0 is through and rank 1 is not: nothing counts, and after the timeout the failure is told and raised."""
    run, said = Storage(tmp_path / "store"), []
    (tmp_path / "scratch" / "state").mkdir(parents=True)
    (tmp_path / "scratch" / "state" / "w.pt").write_bytes(b"x")
    writer = Checkpoints(run, "s", rank=0, ranks=2, attempt="a", zero=1, last=2, best=0, timeout_s=1, say=said.append)
    writer._pending = writer._thread.submit(
        writer._upload, str(tmp_path / "scratch"), Saved("step-1-a", 1, ranks=2, zero=1)
    )
    with pytest.raises(Exception, match="rank 1 has not stored its part of step 1 after 1 s"):
        writer.wait()
    assert said[0].startswith("the checkpoint of step 1 was not stored")
    assert newest_good(run, "s", print) is None
    assert not (tmp_path / "scratch").exists()


def test_old_checkpoints_are_dropped_and_the_best_stays_to_the_end(store: Storage, tmp_path: Path) -> None:
    for step, loss in ((2, 3.0), (4, 1.0), (6, 2.0), (8, 1.5)):
        stored(store, tmp_path, step, best=1, loss=loss)
    assert [s.step for s in recorded(store, "checkpoints/s")] == [4, 6, 8]
    forget(store, "s", best=1)
    assert {name.split("/")[2] for name in store.list("checkpoints")} == {"latest.json", "step-00000004-a"}
    forget(store, "s", best=0)
    assert store.list("checkpoints") == []


@given(losses=st.lists(st.none() | st.floats(0, 10), max_size=12), last=st.integers(0, 4), best=st.integers(0, 4))
def test_what_is_kept_is_the_newest_and_the_lowest(losses: list[float | None], last: int, best: int) -> None:
    saved = [Saved(f"{i}", i, ranks=1, zero=1, loss=loss) for i, loss in enumerate(losses)]
    stays = kept(saved, last=last, best=best)
    assert stays == sorted(stays, key=lambda s: s.step)
    assert saved[len(saved) - min(last, len(saved)) :] == [s for s in stays if s.step >= len(saved) - last]
    known = [s.loss for s in saved if s.loss is not None]
    found = [s.loss for s in stays if s.loss is not None]
    assert sorted(known)[:best] == sorted(found)[: min(best, len(known))]
    assert len(stays) <= last + best
