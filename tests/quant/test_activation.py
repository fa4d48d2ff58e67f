"""int8 activations, one scale per token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdistill_ray.errors import ConfigError
from bitdistill_ray.quant import fake_quantize_activation, quantize_activation


def test_absmax_by_hand() -> None:
    x = torch.tensor(
        [[127.0, -127.0, 0.5, 1.5, 2.5, -0.5], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [2.0, -1.0, 0.0, 1.0, 0.0, 0.0]]
    )
    q, scale = quantize_activation(x, 8)
    assert q.dtype is torch.int8
    assert q.tolist() == [[127, -127, 0, 2, 2, 0], [0] * 6, [127, -64, 0, 64, 0, 0]]  # ties to even: 63.5 is 64
    assert scale.shape == (3, 1)
    assert scale.flatten().tolist() == pytest.approx([1.0, 1e-5 / 127, 2 / 127])


def test_the_inverse_is_one_quotient_as_the_kernels_have_it() -> None:
    """For every peak numpy's float32 127 / peak, which torch's `127 / tensor` is not: it takes a reciprocal first."""
    peak = torch.rand(4096, 1, generator=torch.Generator().manual_seed(0)) + 1e-3
    x = torch.cat([peak, torch.rand(4096, 31, generator=torch.Generator().manual_seed(1)) * peak], dim=1)
    q, _ = quantize_activation(x, 8)
    inverse = np.float32(127) / peak.numpy()
    assert not np.array_equal(inverse, (127 / peak).numpy())
    assert np.array_equal(q.numpy(), np.rint(x.numpy() * inverse).astype(np.int8))
    below = [float(np.nextafter(np.float32(70.5 / of), np.float32(0))) for of in inverse.flatten().tolist()]
    tied = torch.stack([peak.flatten(), torch.tensor(below)], dim=1)
    expected = np.rint(tied.numpy() * (np.float32(127) / tied.abs().amax(1, keepdim=True).numpy())).astype(np.int8)
    assert np.array_equal(quantize_activation(tied, 8)[0].numpy(), expected)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1e-7, 1.0, 1e4]),
)
def test_fake_is_real_and_off_by_half_a_step_at_most(seed: int, dtype: torch.dtype, magnitude: float) -> None:
    x = (torch.randn(2, 3, 33, generator=torch.Generator().manual_seed(seed)) * magnitude).to(dtype)
    q, scale = quantize_activation(x, 8)
    fake = fake_quantize_activation(x, 8)
    real = q.float() * scale
    assert fake.dtype is dtype
    assert torch.equal(fake, real.to(dtype))
    assert torch.equal(fake.signbit(), real.signbit())
    assert scale.shape == (2, 3, 1)
    assert bool(((real - x.float()).abs() <= scale * 0.5001).all())


def test_the_gradient_is_the_identity() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    g = torch.randn(3, 5)
    fake_quantize_activation(x, 8).backward(g)
    assert x.grad is not None
    assert torch.equal(x.grad, g)


def test_bits_beyond_int8_are_refused() -> None:
    with pytest.raises(ConfigError, match="16 bits"):
        quantize_activation(torch.ones(1, 1), 16)
