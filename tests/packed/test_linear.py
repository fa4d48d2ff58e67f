"""PackedLinear in nn.Linear's place: dtypes, shapes, SubLN, gradients, copies and devices."""

import copy
import io

import pytest
import torch
from torch import nn

from bitdistill_ray.core import Format, Granularity, QuantSpec
from bitdistill_ray.packed.linear import PackedLinear
from bitdistill_ray.packed.weight import pack
from bitdistill_ray.quant import dequantize, fake_quantize_activation, initial_alpha, quantize

N, K = 37, 70


def packed_linear(spec: QuantSpec, *, bias: bool = True, norm: nn.Module | None = None) -> PackedLinear:
    generator = torch.Generator().manual_seed(0)
    w_NK, bias_N = torch.randn(N, K, generator=generator), torch.randn(N, generator=generator)
    q = quantize(w_NK, spec, alpha=initial_alpha(w_NK, spec) if spec.format.learns_scale else None)
    return PackedLinear(pack(q), bias_N if bias else None, norm=norm)


def reference(linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    x = x if linear.norm is None else linear.norm(x)
    if linear.packed.spec.activation_bits is not None:
        x = fake_quantize_activation(x.float(), 8)
    return nn.functional.linear(x.float(), linear.dequantized(), linear.bias)


@pytest.mark.parametrize("format", list(Format))
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_every_format_with_every_dtype(format: Format, activation_bits: int | None) -> None:
    linear = packed_linear(QuantSpec(format=format, group_size=16, activation_bits=activation_bits))
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(1)).to(dtype)
        y = linear(x)
        assert y.dtype is dtype
        assert y.shape == (2, 3, N)
        torch.testing.assert_close(y.float(), reference(linear, x), rtol=tolerance, atol=3 * tolerance)
    assert linear(torch.randn(K)).shape == (N,)
    assert linear(torch.randn(0, K)).shape == (0, N)


def test_the_norm_comes_first() -> None:
    norm = nn.RMSNorm(K)
    nn.init.constant_(norm.weight, 3.0)
    linear = packed_linear(QuantSpec(format=Format.TERNARY, activation_bits=8), norm=norm)
    x = 10 * torch.randn(4, K)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), reference(linear, x), rtol=1e-5, atol=1e-4)
    assert set(linear.state_dict()) == {"bias", "norm.weight"}


def test_gradients_flow_to_the_input_through_the_dequantised_weight() -> None:
    linear = packed_linear(QuantSpec(format=Format.INT2, group_size=16), bias=False)
    x = torch.randn(4, K, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, linear.dequantized().sum(dim=0).expand(4, K))


def test_moving_to_another_dtype_leaves_the_scales_alone() -> None:
    linear = packed_linear(QuantSpec(format=Format.INT3, group_size=16))
    before, x = linear.dequantized(), torch.randn(3, K)
    y = linear(x)
    linear.to(torch.bfloat16)
    assert torch.equal(linear.dequantized(), before)
    assert linear.bias is not None
    assert linear.bias.dtype is torch.bfloat16
    torch.testing.assert_close(linear(x), y, rtol=1e-2, atol=1e-2)


def test_another_device_takes_the_packed_bytes_along() -> None:
    linear = packed_linear(QuantSpec(format=Format.TERNARY, granularity=Granularity.ROW, group_size=None)).to("meta")
    assert linear.packed.codes.device.type == "meta"
    assert linear(torch.randn(2, K, device="meta")).shape == (2, N)


def test_copies_compute_the_same() -> None:
    linear = packed_linear(QuantSpec(format=Format.NF3, group_size=16))
    x = torch.randn(3, K)
    y = linear(x)
    assert torch.equal(copy.deepcopy(linear)(x), y)
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)


def test_without_kernels_it_is_the_reference() -> None:
    spec = QuantSpec(format=Format.LSQ3, group_size=16, activation_bits=8)
    linear = packed_linear(spec)
    x = torch.randn(3, K)
    linear.kernels = False
    torch.testing.assert_close(linear(x), reference(linear, x), rtol=0, atol=0)
    w_NK = linear.dequantized()
    assert w_NK.shape == (N, K)
    assert dequantize(quantize(w_NK, spec, alpha=initial_alpha(w_NK, spec))).shape == (N, K)
