"""Statistics of codes."""

import pytest
import torch

from bitdistill_ray.core import Format, Granularity
from bitdistill_ray.quant import code_histogram, flip_rate, quantize, zero_count
from tests.quant.cases import alpha_of, spec_of


def test_histogram_counts_every_code_also_absent_ones() -> None:
    q = quantize(
        torch.tensor([[1.0, -1.0, 0.0, 0.1], [1.0, 1.0, 0.0, -0.1]]), spec_of(Format.TERNARY, Granularity.TENSOR)
    )
    assert code_histogram(q).tolist() == [1, 4, 3]
    assert code_histogram(quantize(torch.ones(2, 2), q.spec)).tolist() == [0, 0, 4]


def test_flip_rate_is_the_fraction_of_codes_that_differ() -> None:
    codes = torch.tensor([[0, 1, 2, 1]], dtype=torch.uint8)
    assert flip_rate(codes, codes) == 0
    assert flip_rate(codes, torch.tensor([[0, 1, 2, 2]], dtype=torch.uint8)) == 0.25


@pytest.mark.parametrize("format", list(Format))
def test_zero_count_counts_values_not_codes(format: Format) -> None:
    w = torch.cat([torch.zeros(3, 8), torch.ones(3, 4), -torch.ones(3, 4)], dim=1)
    spec = spec_of(format, Granularity.GROUP)
    expected = 0 if format is Format.SEQ2 else 24  # seq2 has no level 0
    assert zero_count(quantize(w, spec, alpha=alpha_of(w, spec, 1.0))) == expected
