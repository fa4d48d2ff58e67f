"""Figures of a step are read as they were, and on a GPU without waiting for what came after them."""

from __future__ import annotations

import pytest
import torch

from bitdistill_ray.student.figures import Figures


def test_numbers_come_as_they_were_made() -> None:
    loss, tokens = torch.tensor(0.1), torch.tensor(16_777_217, dtype=torch.float64)  # more than fp32 can count
    figures = Figures({"loss": loss, "tokens": tokens})
    loss.fill_(5.0)
    assert figures.read() == {"loss": torch.tensor(0.1).item(), "tokens": 16_777_217.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's stream")
def test_a_gpu_is_not_waited_for_beyond_them() -> None:
    figures = Figures({"loss": torch.tensor(2.5, device="cuda")})
    torch.cuda._sleep(2_000_000_000)  # about a second of work that came later
    later = torch.cuda.current_stream().record_event()
    assert figures.read() == {"loss": 2.5}
    assert not later.query()
