"""Benchmarks: what the kernels, the decoder, the teacher's wire and the training step reach, beside their limits."""

from bitdistill_ray.bench.command import main

__all__ = ["main"]
