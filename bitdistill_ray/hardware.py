"""What this machine computes well: the compute dtype and the device, each with the reason that is printed."""

from __future__ import annotations

import torch

from bitdistill_ray.config import Dtype

TORCH_DTYPES = {Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16, Dtype.FP32: torch.float32}


def compute_dtype(wanted: Dtype, device: torch.device) -> tuple[torch.dtype, str]:
    """The torch dtype for `wanted` on `device`, and why.  AUTO asks whether bf16 products are native."""
    if wanted is not Dtype.AUTO:
        return TORCH_DTYPES[wanted], "as configured"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"{torch.cuda.get_device_name(device)} multiplies bf16"
        return torch.float32, f"{torch.cuda.get_device_name(device)} has no bf16 units"
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    for unit in ("amx_bf16", "avx512_bf16"):
        if can.get(unit):
            return torch.bfloat16, f"this CPU has {unit}"
    return torch.float32, "this CPU has no bf16 instructions"


def local_devices() -> list[torch.device]:
    """The GPUs that Ray gave to this process, else the CPU."""
    if not torch.cuda.is_available():
        return [torch.device("cpu")]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def local_device() -> torch.device:
    """The first GPU that Ray gave to this process, else the CPU."""
    return local_devices()[0]
