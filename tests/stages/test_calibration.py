"""Stages that change weights before training leave the same student, however many tasks share its blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.model.student import load_student
from bitdistill_ray.runs import RunFolder, StageRecord
from bitdistill_ray.stage_config import AWQStage, CalibratedStage, ClipStage, GPTQStage, RefineStage
from bitdistill_ray.stages import STAGES, StageContext
from tests.road import tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def refined(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    """A run of a gemma3 (norms that awq changes) with learnable scales, after its `refine`."""
    root = tmp_path_factory.mktemp("run")
    (root / "corpus.jsonl").write_text("\n".join(f'{{"text": "the cat number {i} sat on the mat"}}' for i in range(99)))
    config = tiny_config(root, f"data={root}/corpus.jsonl", "stages.write=false", "quant.format=seq2", case="gemma3")
    config = config.model_copy(update={"stages": {"refine": RefineStage()}})
    folder = RunFolder(config)
    folder.finish(STAGES["refine"](context := StageContext(config, "refine", folder)))
    return context


def changed(refined: StageContext, stage: CalibratedStage, name: str) -> tuple[StageRecord, dict[str, torch.Tensor]]:
    """The stage's record, and the parameters of the student that it published."""
    config = refined.config.model_copy(update={"stages": {**refined.config.stages, name: stage}})
    context = StageContext(config, name, RunFolder(config))
    record = STAGES[stage.kind](context)  # type: ignore[attr-defined]
    assert not list(Path(context.run.storage.url).glob(context.path("parts/*")))
    model, _ = load_student(context.run.fetch(record.artefacts["student"]), dtype=torch.float32)
    return record, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", [ClipStage, AWQStage, pytest.param(GPTQStage, marks=pytest.mark.soak)])
def test_tasks_that_share_the_blocks_leave_the_student_of_one(
    kind: type[CalibratedStage], refined: StageContext
) -> None:
    name = kind.__name__
    one, alone = changed(refined, kind(calibration_sequences=4), f"{name}-one")
    two, shared = changed(
        refined, kind(calibration_sequences=4, tasks=3), f"{name}-three"
    )  # one of them without a block
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[parameter], shared[parameter]) for parameter in alone)
    assert two.facts == pytest.approx(one.facts)
    assert 0 < one.facts["error_left"] < 1
    before, _ = load_student(refined.run.fetch("stages/refine/student"), dtype=torch.float32)
    assert any(not torch.equal(alone[n], p) for n, p in before.named_parameters() if ".layers.0." in n)
    assert any(not torch.equal(alone[n], p) for n, p in before.named_parameters() if ".layers.1." in n)


def test_blocks_that_wait_for_each_other_cannot_be_shared() -> None:
    with pytest.raises(ConfigError, match=r"tasks: 2 with quantised_inputs"):
        ClipStage(tasks=2, quantised_inputs=True)
