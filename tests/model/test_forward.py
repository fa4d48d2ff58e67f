"""Packing keeps documents apart, and the head gives what Hugging Face gives, in every family."""

from __future__ import annotations

import pytest
import torch

from bitdistill_ray.core import TokenBatch
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.heads import FrozenHead, LMHead
from tests.tiny_models import EVERY_CASE, packed_batch, tiny_model

LENGTH = 24  # four times the sliding window of the gemma3 case
ROWS = [[9, 1, 1, 13], [17, 4], [24], [2, 8, 8]]


def one_document(ids_T: torch.Tensor) -> TokenBatch:
    segment_BT = torch.zeros(1, len(ids_T), dtype=torch.int32)
    return TokenBatch(ids_BT=ids_T[None], target_BT=segment_BT == 0, segment_BT=segment_BT, sequence_ids=("one",))


@pytest.mark.parametrize("case", EVERY_CASE)
@torch.no_grad()
def test_a_packed_document_is_what_it_is_alone(case: str) -> None:
    model, batch = tiny_model(case), packed_batch(ROWS, LENGTH)
    packed_BTD = hidden_states(model, batch)
    for row, lengths in enumerate(ROWS):
        for segment in range(len(lengths)):
            inside = batch.segment_BT[row] == segment
            alone_BTD = hidden_states(model, one_document(batch.ids_BT[row, inside]))
            torch.testing.assert_close(packed_BTD[row, inside], alone_BTD[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", EVERY_CASE)
@torch.no_grad()
def test_the_head_on_the_hidden_states_gives_the_models_logits(case: str) -> None:
    model, batch = tiny_model(case), packed_batch([[LENGTH], [LENGTH]], LENGTH)
    logits_BTV = LMHead(model)(hidden_states(model, batch))
    torch.testing.assert_close(logits_BTV, model(batch.ids_BT).logits, rtol=1e-5, atol=1e-5)


def test_gemmas_softcap_bounds_the_logits() -> None:
    model = tiny_model("gemma3")
    logits_V = LMHead(model)(100 * torch.randn(32, generator=torch.Generator().manual_seed(0)))
    assert logits_V.abs().max() <= 3.0
    assert model.lm_head(100 * torch.randn(32)).abs().max() > 3.0


@pytest.mark.parametrize("case", ["llama-untied", "gemma3"])
def test_a_frozen_head_travels_as_tensors(case: str) -> None:
    model = tiny_model(case)
    head = LMHead(model)
    hidden_ND = torch.randn(5, 32)
    before_NV = head(hidden_ND).detach()
    frozen = FrozenHead(head.frozen_copy().state_dict())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not frozen(hidden_ND).requires_grad
    assert torch.equal(frozen(hidden_ND), before_NV)
    assert not torch.equal(head(hidden_ND), before_NV)
