"""The stages of a recipe; importing this registers all of them."""

from bitdistill_ray.stages import clip, evaluate, export, gptq, refine, training, write
from bitdistill_ray.stages.base import STAGES, StageContext

__all__ = ["STAGES", "StageContext", "clip", "evaluate", "export", "gptq", "refine", "training", "write"]
