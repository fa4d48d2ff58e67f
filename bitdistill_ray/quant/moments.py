"""Second moments of a linear's inputs over calibration tokens: mean_t x_t x_t^T, whole or in segments of its inputs.

The output error of any change d of the weights is exactly d^T H d, so this is all that clipping and GPTQ need to know
of the text: every token counts, and none is kept.

    S inputs of a segment, G segments; a shorter last one is a part of its own (`grouping`)
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistill_ray.errors import ModelError
from bitdistill_ray.quant.base import check_finite
from bitdistill_ray.quant.grouping import Grouping


def output_errors(d_MK: Tensor, gram_KK: Tensor) -> Tensor:
    """d^T H d of each row, [..., M]: what changes d of a linear's weights do to its outputs, mean over tokens."""
    return ((d_MK @ gram_KK) * d_MK).sum(dim=-1)


class Moments:
    """Sums in float32 over the tokens that were added; segments of `size` inputs."""

    def __init__(self, in_features: int, size: int, *, device: torch.device | str = "cpu") -> None:
        self.in_features, self.size, self.tokens = in_features, size, 0
        whole, tail = divmod(in_features, size)
        shapes = [(whole, size, size), (1, tail, tail)]
        self._sums = tuple(torch.zeros(shape, device=device) for shape in shapes if shape[-1])

    @torch.no_grad()
    def add(self, x_TK: Tensor) -> None:
        """Count these tokens; x is [..., K] of any float dtype, without padding tokens."""
        if x_TK.shape[-1] != self.in_features:
            raise ModelError("calibration", f"{x_TK.shape[-1]} inputs, not {self.in_features}",
                             "Give the inputs of the layer itself")  # fmt: skip
        x_TK = x_TK.reshape(-1, self.in_features).to(self._sums[0])
        parts = Grouping(x_TK.shape[0], self.in_features, self.size).split(x_TK)
        for sum_GSS, x_TGS in zip(self._sums, parts, strict=True):
            sum_GSS.baddbmm_(x_TGS.permute(1, 2, 0), x_TGS.transpose(0, 1))
        self.tokens += x_TK.shape[0]

    def take(self, whole: Moments) -> None:
        """Become the moments of these segments, out of `whole` ones of the same inputs."""
        (sum_1KK,) = whole._sums
        places = torch.arange(self.in_features, device=sum_1KK.device)
        parts = Grouping(1, self.in_features, self.size).split(places)
        self._sums = tuple(sum_1KK[0][part_GS[:, :, None], part_GS[:, None, :]] for (part_GS,) in parts)
        self.tokens = whole.tokens

    def grams(self, name: str) -> tuple[Tensor, ...]:
        """H [G, S, S] (and of the shorter last segment), means over the tokens; ModelError if none or not finite."""
        if not self.tokens:
            raise ModelError(name, "no calibration activations", "Run calibration batches through the layer first")
        grams = tuple(sum_GSS / self.tokens for sum_GSS in self._sums)
        for gram_GSS in grams:
            check_finite(gram_GSS, f"{name}: squared activations")
        return grams

    def mean(self, name: str) -> Tensor:
        """H [K, K] where the inputs are one segment; see `grams`."""
        (gram_1KK,) = self.grams(name)
        return gram_1KK[0]
