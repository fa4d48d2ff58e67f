"""The block masks of packed rows: who sees whom, and that flex_attention under them is sdpa under transformers' own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from bitdistill_ray.core import TokenBatch
from bitdistill_ray.model.forward import hidden_states
from bitdistill_ray.model.masks import FULL, SLIDING, block_masks, same_document
from bitdistill_ray.model.taps import FLEX
from tests.tiny_models import EVERY_CASE, packed_batch, tiny_model

BATCH = packed_batch([[9, 1, 13], [24], [2, 8, 8]], 24)


@pytest.mark.parametrize("window", [None, 6])
def test_a_token_sees_the_earlier_ones_of_its_own_document(window: int | None) -> None:
    rows, length = BATCH.ids_BT.shape
    mask_B1TT = create_mask(same_document(BATCH.segment_BT, window), rows, None, length, length, device="cpu")
    for row in range(rows):
        for q in range(length):
            first = 0 if window is None else q - window + 1
            seen = [k for k in range(max(0, first), q + 1) if BATCH.segment_BT[row, k] == BATCH.segment_BT[row, q]]
            assert mask_B1TT[row, 0, q].nonzero().flatten().tolist() == seen


@pytest.mark.parametrize("case", EVERY_CASE)
def test_each_family_gets_masks_in_the_form_that_it_takes(case: str) -> None:
    masks = block_masks(tiny_model(case).config, BATCH.segment_BT)
    if case.startswith("llama"):
        assert not isinstance(masks, dict)
        return
    assert set(masks) == ({FULL, SLIDING} if case == "gemma3" else {FULL})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention as it is used needs a GPU")
@pytest.mark.parametrize("batch", [BATCH, packed_batch([[24], [24]], 24)], ids=["documents", "one-a-row"])
@pytest.mark.parametrize("case", EVERY_CASE)
@torch.no_grad()
def test_flex_attention_gives_what_sdpa_gives(case: str, batch: TokenBatch) -> None:
    model, batch = tiny_model(case, hidden_size=64).cuda(), batch.to("cuda")
    by_sdpa_BTD = hidden_states(model, batch)
    model.config._attn_implementation = FLEX
    torch.testing.assert_close(hidden_states(model, batch), by_sdpa_BTD, rtol=5e-3, atol=5e-3)
