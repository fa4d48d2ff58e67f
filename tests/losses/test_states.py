"""Layer states: directions of what layers give, averaged over the tokens that are there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitdistill_ray.core import LayerStates
from bitdistill_ray.errors import ModelError
from bitdistill_ray.losses.states import layer_states_loss

PRESENT_BT = torch.tensor([[True, True, False], [True, True, True]])


def states(seed: int, *, layers: int = 2, width: int = 8) -> LayerStates:
    generator = torch.Generator().manual_seed(seed)
    return LayerStates(layers=tuple(range(layers)), hidden_BLTD=torch.randn(2, layers, 3, width, generator=generator))


def by_hand(student: LayerStates, teacher: LayerStates) -> Tensor:
    """2 (1 - cosine), token by token."""
    cosine_BLT = torch.cosine_similarity(student.hidden_BLTD.double(), teacher.hidden_BLTD.double(), dim=-1)
    kept = [
        2 - 2 * cosine_BLT[b, layer, t] for b in range(2) for layer in range(2) for t in range(3) if PRESENT_BT[b, t]
    ]
    return torch.stack(kept).mean()


def test_it_is_twice_one_minus_the_cosine_averaged_over_tokens_and_layers() -> None:
    student, teacher = states(0), states(1)
    torch.testing.assert_close(layer_states_loss(student, teacher, PRESENT_BT).double(), by_hand(student, teacher))


def test_lengths_do_not_count() -> None:
    student, teacher = states(0), states(1)
    longer = LayerStates(
        layers=(0, 1), hidden_BLTD=student.hidden_BLTD * torch.tensor([0.01, 300.0])[:, None, None, None]
    )
    torch.testing.assert_close(
        layer_states_loss(longer, teacher, PRESENT_BT), layer_states_loss(student, teacher, PRESENT_BT)
    )
    assert float(layer_states_loss(longer, student, PRESENT_BT)) < 1e-6


def test_padding_is_left_out_whatever_stands_there_and_gets_no_gradient() -> None:
    student, teacher = states(0), states(1)
    student.hidden_BLTD[0, :, 2] = torch.nan
    student.hidden_BLTD.requires_grad_()
    value = layer_states_loss(student, teacher, PRESENT_BT)
    torch.testing.assert_close(value.detach().double(), by_hand(states(0), teacher))
    clean = states(0)
    clean.hidden_BLTD.requires_grad_()
    (expected,) = torch.autograd.grad(layer_states_loss(clean, teacher, PRESENT_BT), [clean.hidden_BLTD])
    (found,) = torch.autograd.grad(value, [student.hidden_BLTD])
    assert torch.equal(expected[0, :, 2], torch.zeros_like(expected[0, :, 2]))
    torch.testing.assert_close(found, expected)


def test_the_mean_over_micro_batches_is_that_of_the_batch() -> None:
    student, teacher, total = states(0), states(1), torch.tensor(5.0)
    halves = [
        layer_states_loss(
            LayerStates(layers=(0, 1), hidden_BLTD=student.hidden_BLTD[row : row + 1]),
            LayerStates(layers=(0, 1), hidden_BLTD=teacher.hidden_BLTD[row : row + 1]),
            PRESENT_BT[row : row + 1],
            total_tokens=total,
        )
        for row in range(2)
    ]
    torch.testing.assert_close(halves[0] + halves[1], layer_states_loss(student, teacher, PRESENT_BT))


def test_another_width_is_refused_with_a_remedy() -> None:
    with pytest.raises(ModelError, match="relations"):
        layer_states_loss(states(0), states(1, width=6), PRESENT_BT)
