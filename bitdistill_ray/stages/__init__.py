"""The stages of a recipe; importing this registers all of them."""

from bitdistill_ray.stages import awq, clip, evaluate, export, gptq, reconstruct, refine, search, training, write
from bitdistill_ray.stages.base import STAGES, StageContext

__all__ = [
    "STAGES",
    "StageContext",
    "awq",
    "clip",
    "evaluate",
    "export",
    "gptq",
    "reconstruct",
    "refine",
    "search",
    "training",
    "write",
]
