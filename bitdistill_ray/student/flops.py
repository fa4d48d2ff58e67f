"""Model FLOPs utilisation: which part of the devices' arithmetic a student's training steps use.

PaLM's convention (arXiv 2204.02311, appendix B): a token costs 6 N + 12 L H C T floating-point operations forward and
backward (N parameters, L layers, H heads of size C, T tokens of a sequence), whatever was recomputed on the way.  Only
target tokens count, so padding reads as idleness.  The peak is the datasheet's dense bf16 figure, by the device's name;
a device that is not in the table, a CPU among them, has no utilisation rather than a guessed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bitdistill_ray.model.families import head_size

TERA = 1e12
# (part of torch's device name, dense bf16 FLOP/s); the first that fits counts, so that longer names come first.
PEAKS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756 * TERA),
    ("H100 NVL", 835 * TERA),
    ("H100", 989 * TERA),
    ("H200 NVL", 835 * TERA),
    ("H200", 989 * TERA),
    ("GH200", 989 * TERA),
    ("B200", 2250 * TERA),
    ("B100", 1750 * TERA),
    ("A100", 312 * TERA),
    ("A800", 312 * TERA),
    ("A40", 149.7 * TERA),
    ("A30", 165 * TERA),
    ("A10G", 70 * TERA),
    ("A10", 125 * TERA),
    ("L40S", 362 * TERA),
    ("L40", 181 * TERA),
    ("L4", 121 * TERA),
    ("MI300X", 1307 * TERA),
    ("MI250X", 383 * TERA),
)


def peak_bf16(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by torch's name for it; None where it is not known."""
    return next((peak for part, peak in PEAKS if part in device_name), None)


def flops_per_token(*, parameters: int, layers: int, heads: int, head_size: int, length: int) -> float:
    """Forward and backward operations of one token of a sequence of `length`."""
    return 6.0 * parameters + 12.0 * layers * heads * head_size * length


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """What a token costs, and what all workers' devices could do in a second (None: not known)."""

    token_flops: float
    peak: float | None

    @classmethod
    def of(cls, model: Any, *, length: int, device: torch.device, workers: int) -> Arithmetic:
        """Of a transformers model, as it is before ZeRO shards it, on `workers` devices like `device`."""
        config = model.config
        cost = flops_per_token(
            parameters=sum(p.numel() for p in model.parameters()),
            layers=int(config.num_hidden_layers),
            heads=int(config.num_attention_heads),
            head_size=head_size(config),
            length=length,
        )
        peak = peak_bf16(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return cls(token_flops=cost, peak=None if peak is None else peak * workers)

    def mfu(self, tokens_per_s: float) -> float | None:
        """Share of the peak, 0 to 1; None where the peak is not known."""
        return None if self.peak is None else tokens_per_s * self.token_flops / self.peak
