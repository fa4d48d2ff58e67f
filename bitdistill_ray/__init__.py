"""bitdistill-ray: distil an FP16 causal LM into a 1.58-, 2- or 3-bit student on a Ray cluster, and serve it packed."""

__version__ = "0.1.0"
