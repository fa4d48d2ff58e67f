"""pack and unpack are exact inverses, and nothing is changed in silence."""

from dataclasses import replace

import pytest
import torch

from bitdistill_ray.core import Format, Granularity, PackedWeight, QuantSpec, ScaleDtype
from bitdistill_ray.errors import PackedError
from bitdistill_ray.packed.weight import check_packed, pack, packed_shapes, unpack
from bitdistill_ray.quant import QuantizedTensor, dequantize, fake_quantize, initial_alpha, quantize


def specs() -> list[QuantSpec]:
    """Every format with every granularity that it allows, in both scale dtypes."""
    groupings = [(Granularity.TENSOR, None), (Granularity.ROW, None), (Granularity.GROUP, 16)]
    return [
        QuantSpec(format=format, granularity=granularity, group_size=size, scale_dtype=dtype)
        for format in Format
        for granularity, size in groupings
        for dtype in ScaleDtype
        if format is not Format.NF3 or granularity is Granularity.GROUP
    ]


def quantized(spec: QuantSpec, N: int = 5, K: int = 43) -> QuantizedTensor:
    w_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return quantize(w_NK, spec, alpha=initial_alpha(w_NK, spec) if spec.format.learns_scale else None)


@pytest.mark.parametrize("spec", specs(), ids=lambda s: f"{s.format}-{s.granularity}-{s.scale_dtype}")
def test_unpack_undoes_pack(spec: QuantSpec) -> None:
    q = quantized(spec)
    packed = pack(q)
    back = unpack(packed)
    assert torch.equal(back.codes_NK, q.codes_NK)
    assert torch.equal(back.scale, q.scale)
    if q.zero is None or back.zero is None:
        assert q.zero is back.zero
    else:
        assert torch.equal(back.zero, q.zero)
    assert torch.equal(dequantize(back), dequantize(q))
    shapes = packed_shapes(spec, q.shape)
    assert (packed.codes.shape, packed.scales.shape) == (shapes.codes, shapes.scales)
    stored = packed.codes.nbytes + packed.scales.nbytes + (0 if packed.zeros is None else packed.zeros.nbytes)
    assert 8 * stored / 43 / 5 >= spec.bits_per_weight(5, 43)


def test_a_scale_that_would_be_rounded_is_refused() -> None:
    q = quantized(QuantSpec(format=Format.TERNARY))
    q.scale = q.scale * (1 + 2**-20)
    with pytest.raises(PackedError, match="scale_dtype=fp32"):
        pack(q)


def test_a_code_that_does_not_exist_is_refused() -> None:
    q = quantized(QuantSpec(format=Format.TERNARY))
    q.codes_NK[2, 3] = 3
    with pytest.raises(PackedError, match="code 3 in ternary"):
        pack(q)


def test_block_scales_are_refused_with_what_to_do() -> None:
    spec = QuantSpec(format=Format.TERNARY, granularity=Granularity.BLOCK, group_size=64)
    with pytest.raises(PackedError, match="block_as_group"):
        pack(quantized(spec, 4, 64))


@pytest.mark.parametrize("change", ["codes", "scales", "dtype", "no zeros"])
def test_wrong_tensors_are_refused(change: str) -> None:
    packed = pack(quantized(QuantSpec(format=Format.INT3, group_size=16)))
    damaged: dict[str, PackedWeight] = {
        "codes": replace(packed, codes=packed.codes[:, :-1]),
        "scales": replace(packed, scales=packed.scales[:, :-1]),
        "dtype": replace(packed, scales=packed.scales.float()),
        "no zeros": replace(packed, zeros=None),
    }
    with pytest.raises(PackedError):
        unpack(damaged[change])


def test_what_only_trains_is_packed_as_the_format_it_stands_for() -> None:
    w_NK = torch.randn(6, 40, generator=torch.Generator().manual_seed(3)) * 0.1
    spec = QuantSpec(format=Format.INT2_LSQ, group_size=16)
    alpha = initial_alpha(w_NK, spec)
    assert (alpha < 0).any()
    assert (alpha > 0).any()
    packed = pack(quantize(w_NK, spec, alpha=alpha))
    assert packed.spec == QuantSpec(format=Format.INT2, group_size=16)
    assert torch.equal(dequantize(unpack(packed)), fake_quantize(w_NK, spec, alpha=alpha))
    with pytest.raises(PackedError, match="says int2-lsq, which is packed as int2"):
        check_packed(replace(packed, spec=spec), "w")
