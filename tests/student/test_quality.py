"""What a run measures while it trains is what `evaluate` measures afterwards, however many ranks share the windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bitdistill_ray.core import Format, QuantSpec
from bitdistill_ray.data.batch import token_batch
from bitdistill_ray.errors import DataError
from bitdistill_ray.evaluation.language import measure
from bitdistill_ray.loss_config import LossConfig
from bitdistill_ray.model.heads import LMHead
from bitdistill_ray.model.surgery import quantize_linears
from bitdistill_ray.student.module import LossModule
from bitdistill_ray.student.objective import objective_of
from bitdistill_ray.student.quality import PADDING, AskedTeacher, QualityProbe, cut, shared
from bitdistill_ray.teacher import wire
from bitdistill_ray.teacher.scorer import scored
from tests.tiny_models import VOCAB_SIZE, tiny_model

CPU = torch.device("cpu")
IDS = np.random.default_rng(0).integers(VOCAB_SIZE, size=7 * 16 + 5)
WINDOWS = {"seven": cut("seven", IDS, 16), "two": cut("two", IDS[:40], 16)}


class OneTeacher:
    """A roster of one teacher in this process."""

    def call(self, method: str, arrays: Any, _request: Any, *, timeout_s: float) -> wire.Message:
        assert (method, timeout_s) == ("score", 5.0)
        message: wire.Message = {"sequence_ids": tuple(arrays["sequence_ids"]), "digest": wire.batch_digest(arrays)}
        wire.put(message, "hidden", scored(tiny_model(), token_batch(arrays), None)[0])
        return message


def probe(*, rank: int = 0, ranks: int = 1, taught: bool = True) -> QualityProbe:
    student = tiny_model(seed=1)
    quantize_linears(student, QuantSpec(format=Format.INT3, group_size=16))
    module = LossModule(student, objective_of(LossConfig(ce=1.0)), chunk_tokens=8)
    made = QualityProbe(module, WINDOWS, rank=rank, ranks=ranks, micro_batch=2, device=CPU)
    if taught:
        made.ask(AskedTeacher(OneTeacher(), LMHead(tiny_model()).frozen_copy(), 5.0))  # type: ignore[arg-type]
    return made


def test_it_is_what_evaluate_measures() -> None:
    made = probe()
    expected: dict[str, float] = {}
    for name, ids_WT in WINDOWS.items():
        metrics = measure(made.model, tiny_model(), torch.from_numpy(ids_WT).long(), name=name)
        expected |= {key: metric.value for key, metric in metrics.items()}
    assert made.look() == pytest.approx(expected, rel=1e-5)


def test_without_a_teacher_there_is_perplexity_alone() -> None:
    found, taught = probe(taught=False).look(), probe().look()
    assert found == {key: value for key, value in taught.items() if key.startswith("ppl:")}


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_have_as_many_batches_each_and_every_window_once(ranks: int) -> None:
    made = [probe(rank=rank, ranks=ranks) for rank in range(ranks)]
    for name, ids_WT in WINDOWS.items():
        assert len({len(each.batches[name]) for each in made}) == 1
        batches = [arrays for each in made for arrays in each.batches[name]]
        assert {arrays["ids"].shape for arrays in batches} == {(2, 16)}
        seen = [id_ for arrays in batches for id_ in arrays["sequence_ids"] if id_ != PADDING]
        assert sorted(seen) == [f"{name}#0#{window}" for window in range(len(ids_WT))]
        whole = probe()._sums(name)
        torch.testing.assert_close(sum(each._sums(name) for each in made), whole, rtol=1e-6, atol=0)


def test_padding_keeps_the_shape_of_a_micro_batch() -> None:
    batches = list(shared("one", WINDOWS["two"][:1], 0, 1, 4))
    assert batches[0]["sequence_ids"].tolist() == ["one#0#0", PADDING, PADDING, PADDING]


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(DataError, match=r"monitor.quality_texts: short.*9 tokens, a window has 16"):
        cut("short", IDS[:9], 16)
