"""A teacher's pass is its model's, however it is made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitdistill_ray.teacher.scorer import Scored, Scorer, scored
from tests.tiny_models import EVERY_CASE, packed_batch, tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BATCHES = [
    packed_batch(rows, length, seed=seed)
    for seed, (rows, length) in enumerate(
        [
            ([[90, 5, 3], [140]], 256),
            ([[256], [256]], 256),
            ([[40, 4], [20]], 256),
            ([[120]], 128),
            ([[30, 90]], 128),
            ([[20, 30]], 60),
        ]
    )
]


def tensors(scored: Scored) -> Iterator[Tensor]:
    yield scored[0]
    if scored[1] is not None:
        yield from (scored[1].q_BHTC, scored[1].k_BJTC, scored[1].v_BJTC)


@pytest.mark.parametrize("layer", [None, 1])
@torch.no_grad()
def test_on_a_cpu_it_is_the_plain_pass(layer: int | None) -> None:
    model = tiny_model("qwen3")
    scorer = Scorer(model, CPU, spread=False)
    assert scorer.how == "plain"
    for batch in BATCHES:
        for found, expected in zip(tensors(scorer(batch, layer)), tensors(scored(model, batch, layer)), strict=True):
            assert torch.equal(found, expected)


def test_a_teacher_over_several_gpus_keeps_the_plain_pass() -> None:
    assert Scorer(tiny_model(), GPU, spread=True).how == "plain"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records on a GPU")
@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("case", EVERY_CASE)
@torch.no_grad()
def test_on_a_gpu_it_says_what_the_model_says_and_keeps_it(case: str, layer: int | None) -> None:
    torch._dynamo.reset()
    model = tiny_model(case, hidden_size=64).to(GPU, torch.bfloat16)
    scorer = Scorer(model, GPU, spread=False)
    pairs = []
    for batch in (*BATCHES, *BATCHES[::-1]):  # the second of a shape is recorded, later ones are replayed
        batch = batch.to(GPU)
        pairs.append((scorer(batch, layer), scored(model, batch, layer)))
    for found, expected in pairs:
        for one, other in zip(tensors(found), tensors(expected), strict=True):
            torch.testing.assert_close(one, other, rtol=5e-2, atol=0.25)
    assert model.config._attn_implementation == "sdpa"  # which writing needs
    assert sum(replay is not None for replay in scorer._seen.values()) == 2
