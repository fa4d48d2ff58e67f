"""BLOCK rewritten as GROUP is the same matrix."""

import pytest
import torch

from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.errors import ConfigError
from bitdistill_ray.quant import block_as_group, dequantize, quantize


@pytest.mark.parametrize(
    ("shape", "block", "group"), [((3, 48), 32, 16), ((4, 64), 256, 64), ((5, 40), 16, 8), ((2, 64), 64, 64)]
)
def test_the_same_matrix_with_group_scales(shape: tuple[int, int], block: int, group: int) -> None:
    torch.manual_seed(0)
    q = quantize(torch.randn(shape), QuantSpec(format=Format.TERNARY, granularity=Granularity.BLOCK, group_size=block))
    grouped = block_as_group(q)
    assert grouped.spec.granularity is Granularity.GROUP
    assert grouped.spec.group_size == group
    assert grouped.scale.shape == (shape[0], shape[1] // group)
    assert torch.equal(dequantize(grouped), dequantize(q))


def test_blocks_that_share_too_few_weights_with_a_row_are_refused() -> None:
    q = quantize(torch.ones(4, 36), QuantSpec(format=Format.TERNARY, granularity=Granularity.BLOCK, group_size=32))
    with pytest.raises(ConfigError, match="share only 4 weights"):
        block_as_group(q)


def test_other_granularities_come_back_as_they_are() -> None:
    q = quantize(torch.ones(4, 32), QuantSpec(format=Format.TERNARY, group_size=16))
    assert block_as_group(q) is q
